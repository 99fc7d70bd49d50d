"""Builds amtml_fast._C, one stable-ABI library for every torch from 2.11 on. Metadata lives in pyproject.toml.

AMTML_BUILD_CUDA=1 adds the CUDA kernels, with nvcc: neither a GPU nor a CUDA build of torch is needed to build the
library or to load it. (Not by default: most who build it have no nvcc.)
AMTML_BUILD_EXT=0 builds no library. AMTML_BUILD_EXT=1, and AMTML_BUILD_CUDA=1 too, makes a failed build fatal. Otherwise a
machine without torch's headers or a working compiler gets the pure-Python package with a notice; it then runs on the
reference backend. TORCH_CUDA_ARCH_LIST chooses the GPUs (default: 8.0, 9.0 and PTX for later ones).
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import __version__ as setuptools_version
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

# Without build isolation nobody else looks, and its own error is about a license.
if int(setuptools_version.split(".")[0]) < 77:
    raise SystemExit(
        f"amtml_fast: setuptools must be 77 or later to build it, got {setuptools_version}: pip install -U setuptools"
    )


def asked(name: str, *choices: str) -> str:
    """What this environment variable asks for; where it is not set or empty, the first choice."""
    value = os.environ.get(name) or choices[0]
    if value not in choices:
        raise SystemExit(f"amtml_fast: {name} must be one of {', '.join(choices)}, got {value!r}")
    return value


WANTED = asked("AMTML_BUILD_EXT", "auto", "0", "1")
CUDA_WANTED = asked("AMTML_BUILD_CUDA", "0", "1")
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")  # which a Python without the lock does not have
NOT_BUILT = ""  # why there is no extension
SOURCE = Path("amtml_fast").resolve()


def give_up(reason: object) -> None:
    global NOT_BUILT
    by_name = ("AMTML_BUILD_EXT", WANTED), ("AMTML_BUILD_CUDA", CUDA_WANTED)
    if wishes := [f"{name}=1" for name, value in by_name if value == "1"]:
        raise SystemExit(
            f"amtml_fast: the C++ extension was asked for ({', '.join(wishes)}) but cannot be built: {reason}"
        )
    NOT_BUILT = str(reason)
    print(f"\n*** amtml_fast: built WITHOUT its C++ extension ({reason}).", file=sys.stderr)
    print("*** It will run on the slow reference backend.", file=sys.stderr)
    if sys.platform != "win32":
        print("*** Install torch and GCC or Clang, then in its folder", file=sys.stderr)
        print("*** pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps .\n", file=sys.stderr)


def leave_word(folder: Path) -> None:
    """A build folder's package says why it has no extension. Not a source folder: there it would outlive its reason."""
    if NOT_BUILT and folder.is_dir() and folder.resolve() != SOURCE:
        (folder / "not_built.txt").write_text(f"{NOT_BUILT}\n", encoding="utf-8")


class BuildPython(build_py):
    """Into an empty folder: what an earlier build has left there would be packed, too."""

    def run(self) -> None:
        folder = Path(self.build_lib, "amtml_fast")
        if not self.editable_mode and folder.resolve() != SOURCE:
            shutil.rmtree(folder, ignore_errors=True)
        super().run()
        leave_word(folder)


def cuda_home() -> str | None:
    """The CUDA toolkit's folder. Asks nvcc where it is: the one on the PATH may be a link or a script."""
    if CUDA_WANTED != "1":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is not None:
        plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        if top := re.search(r"^#\$ TOP=(.+)$", plan, re.M):
            return str(Path(top[1]).resolve())
    raise SystemExit("amtml_fast: CUDA kernels were asked for (AMTML_BUILD_CUDA=1) but nvcc is not found")


def cuda_part(home: str, flags: list[str]) -> dict:
    """What the CUDA sources add to the extension's keywords. The CUDA runtime is linked in, so that no driver is
    needed to load the library."""
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = home  # None in a CPU build of torch
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")  # torch would ask a GPU that may not be there
    host = [f for flag in flags for f in ("-Xcompiler", flag)]
    nvcc = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "--expt-extended-lambda", *host, STABLE_ABI]
    # Kernels for one architecture: 1.3 MB instead of 11.5. Drivers older than CUDA 13, which could not read them, do not run its code.
    version = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
    if int(re.search(r"release (\d+)", version)[1]) >= 13:
        nvcc.append("--compress-mode=size")
    library = next(str(p) for p in (Path(home, "lib64"), Path(home, "lib")) if p.exists())
    return {
        "sources": sorted(map(str, Path("csrc/cuda").glob("*.cu"))),
        "nvcc": nvcc,
        "include_dirs": [f"{home}/include"],
        "library_dirs": [library],
        "libraries": ["cudart_static", "dl", "rt", "pthread"],
        # The linker would drop libtorch.so, and with it a CUDA build's libtorch_cuda.so, where the current stream is asked.
        "extra_link_args": ["-Wl,--push-state,--no-as-needed", "-ltorch", "-Wl,--pop-state"],
    }


def extension() -> tuple[list, dict]:
    """The module _C and the command that builds it, or neither."""
    if WANTED == "0":
        return [], {}
    if sys.platform == "win32":
        give_up("it needs GCC's or Clang's vectors, and torch's extensions MSVC")
        return [], {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except (ImportError, OSError) as error:  # OSError: of a library that torch does not find
        give_up(f"{error}; an installed torch is not seen without --no-build-isolation")
        return [], {}

    class BuildOrGoOn(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # whatever compilers raise: setuptools' errors, ninja's RuntimeError
                give_up(f"{error}; with AMTML_BUILD_EXT=1 pip shows what the compiler says")
                self.extensions.clear()
                folder = Path(self.build_lib, "amtml_fast")
                for earlier in folder.glob("_C.*") if folder.resolve() != SOURCE else []:
                    earlier.unlink()
                leave_word(folder)
                if wheel := self.distribution.command_obj.get("bdist_wheel"):
                    wheel.root_is_pure = True  # with the name of what it is: not that of one with an extension

    # -ffp-contract=fast is GCC's default, stated for Clang. No -ffast-math: NaN and -inf are part of the contract; but
    # without -fno-trapping-math, which leaves values alone, GCC turns selects into branches and gives up vectors.
    headers = Path(torch.__file__).parents[1]  # error messages name files, not where they were at the builder's
    hidden = ["-fvisibility=hidden", f"-ffile-prefix-map={Path.cwd()}/=", f"-ffile-prefix-map={headers}/="]
    flags = ["-O3", "-std=c++17", "-fopenmp-simd", "-ffp-contract=fast", "-fno-math-errno"]
    # Clang's list of loops that it leaves scalar is not for users.
    flags += ["-fno-trapping-math", "-Wno-psabi", "-Wno-pass-failed", *hidden]
    sources = ["csrc/module.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
    # Python's own flags ask for debugging information: most of the library, and a quarter of the build's time.
    debug = "-g" in os.environ.get("CFLAGS", "")
    flags += [] if debug else ["-g0"]
    home = cuda_home()
    cuda = cuda_part(home, hidden) if home else {"sources": [], "nvcc": []}
    nvcc = cuda.pop("nvcc")
    ext = CppExtension(
        "amtml_fast._C",
        sources + cuda.pop("sources"),
        depends=sorted(map(str, [*Path("csrc").rglob("*.h"), *Path("csrc").rglob("*.cuh")])),
        py_limited_api=LIMITED_API,
        extra_link_args=[*cuda.pop("extra_link_args", []), *([] if debug or sys.platform != "linux" else ["-Wl,-s"])],
        extra_compile_args={"cxx": [*flags, "-Wall", STABLE_ABI], "nvcc": nvcc},
        **cuda,
    )
    return [ext], {"build_ext": BuildOrGoOn}


modules, commands = extension()
setup(
    packages=[*find_packages(include=["amtml_fast*"]), "amtml_fast.configs", "amtml_fast.kernels"],
    package_dir={"amtml_fast.kernels": "kernels"},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API else {},
    ext_modules=modules,
    cmdclass={"build_py": BuildPython, **commands},
)
