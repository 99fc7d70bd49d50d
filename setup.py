"""Builds amtml_fast._C, one stable-ABI library for every torch from 2.11 on. Metadata lives in pyproject.toml.

AMTML_BUILD_EXT=1 makes a failed build fatal, =0 skips it. Otherwise a machine without torch's headers or a working
compiler gets the pure-Python package with a notice; it then runs on the reference backend.
"""

import os
import sys
from pathlib import Path

from setuptools import find_packages, setup

WANTED = os.environ.get("AMTML_BUILD_EXT", "auto")
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11


def give_up(reason: object) -> None:
    if WANTED == "1":
        raise SystemExit(
            f"amtml_fast: the C++ extension was asked for (AMTML_BUILD_EXT=1) but cannot be built: {reason}"
        )
    print(f"\n*** amtml_fast: built WITHOUT its C++ extension ({reason}).", file=sys.stderr)
    print("*** It will run on the slow reference backend. Install torch and a C++ compiler, then", file=sys.stderr)
    print("*** pip install --no-build-isolation --force-reinstall --no-deps amtml-fast\n", file=sys.stderr)


def extension() -> dict:
    """The keywords of setup() that build _C, or none of them."""
    if WANTED == "0":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        give_up(error)
        return {}

    class BuildOrGoOn(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # whatever compilers raise: setuptools' errors, ninja's RuntimeError
                give_up(error)
                self.extensions.clear()

    sources = ["csrc/module.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
    # -ffp-contract=fast is GCC's default, stated for Clang. No -ffast-math: NaN and -inf are part of the contract; but
    # without -fno-trapping-math, which leaves values alone, GCC turns selects into branches and gives up vectors.
    flags = ["-O3", "-std=c++17", "-fopenmp-simd", "-ffp-contract=fast", "-fno-math-errno"]
    flags += ["-fno-trapping-math", "-Wno-psabi", "-fvisibility=hidden", f"-ffile-prefix-map={Path.cwd()}/="]
    ext = CppExtension(
        "amtml_fast._C",
        sources,
        depends=sorted(map(str, Path("csrc").rglob("*.h"))),
        py_limited_api=True,
        extra_compile_args={"cxx": [*flags, "-Wall", STABLE_ABI]},
    )
    return {"ext_modules": [ext], "cmdclass": {"build_ext": BuildOrGoOn}}


setup(
    packages=[*find_packages(include=["amtml_fast*"]), "amtml_fast.kernels", "amtml_fast.benchmarks"],
    package_dir={"amtml_fast.kernels": "kernels", "amtml_fast.benchmarks": "benchmarks"},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    **extension(),
)
