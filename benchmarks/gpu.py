"""Everything that needs a GPU, in one command: build, figures, tests, memory checks. Run by ``make gpu [PART=...]``.

    python -m benchmarks.gpu [--part all|tests|tune|step|an operator] [--out benchmarks/results/gpu]

It runs with the Python that has torch >= 2.11, Triton >= 3.6, pytest and pytest-benchmark, and needs nvcc, but no network. It
writes results.json (the benchmark suite's own, for benchmarks/report.py), checks.json (the tests) and, with --part step, step.json to the folder. Each part has
a time limit; a part that is stopped keeps what it has.

`make gpu-kit` on another machine makes build/gpu-kit: the library, built, and the Python packages beside torch. Where that folder
is, nothing is built and nothing else is needed.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PARTS = (
    "all",
    "tests",
    "tune",
    "step",
    "kl",
    *sorted(file.stem for file in (ROOT / "amtml_fast" / "ops").glob("[a-z]*.py")),
)
KIT = ROOT / "build" / "gpu-kit"
LIBRARY = "_C.abi3.so"
# After which a part is stopped.
SECONDS = {"figures": 240, "tests": 240, "memory checks": 90, "tuning": 180, "step": 180}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, default="all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    args = parser.parse_args()
    if KIT.is_dir():
        unpack()
    else:
        build()
    if not torch.cuda.is_available():
        print("\nNo GPU was found: the extension is built, nothing was run and nothing was measured.")
        return 1
    if args.part == "tune":  # the lines of backend.AUTO for this GPU
        tuned, _ = limited("tuning", [sys.executable, "-m", "benchmarks.tune"], dict(os.environ), shown=True)
        return 1 if tuned is None else tuned
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part == "step":  # the trainer's, checked and measured
        command = [sys.executable, "-m", "benchmarks.step", "--out", str(args.out / "step.json")]
        done, _ = limited("step", command, dict(os.environ), shown=True)
        return 1 if done is None else done
    status = 0
    if args.part != "tests":  # first: what is measured is kept, whatever the tests do
        status = measure(None if args.part == "all" else args.part, args.out / "results.json")
    if args.part in ("all", "tests"):
        checks: dict[str, Any] = {"machine": machine(), "tests": run_tests()}
        write(args.out / "checks.json", checks)
        checks["memory"] = check_memory()
        write(args.out / "checks.json", checks)
        status = status or checks["tests"]["status"] != 0 or checks["memory"]["status"] not in (0, None)
    print(f"\nWritten: {args.out}")
    return int(status)


def unpack() -> None:
    """Takes what `make gpu-kit` has made, if it was made from the sources that are here."""
    if (KIT / "sources").read_text().strip() != sources():
        raise SystemExit(f"{KIT.relative_to(ROOT)} must be of these csrc/ and setup.py, got others: make gpu-kit again")
    print(f"Using {KIT.relative_to(ROOT)}: nothing is built", flush=True)
    shutil.copy2(KIT / LIBRARY, ROOT / "amtml_fast" / LIBRARY)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(KIT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])
    sys.path.insert(0, str(KIT / "python"))


def sources() -> str:
    """A hash of what the library is compiled from."""
    state = hashlib.sha256()
    for file in sorted([ROOT / "setup.py", *(ROOT / "csrc").rglob("*.*")]):
        state.update(file.read_bytes())
    return state.hexdigest()


def build() -> None:
    """The extension with its CUDA kernels, in place, for the GPU of this machine."""
    env = {**os.environ, "AMTML_BUILD_EXT": "1", "AMTML_BUILD_CUDA": "1"}
    if torch.cuda.is_available():
        env.setdefault("TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability()))
    print("Building the extension with CUDA, which takes some minutes ...", flush=True)
    start = time.time()
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, env=env, check=True)
    print(f"... built in {time.time() - start:.0f} s", flush=True)


def machine() -> dict[str, Any]:
    import triton

    def said(*command: str) -> str | None:
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    here = torch.cuda.get_device_properties(0)
    return {
        "gpu": here.name,
        "compute_capability": f"{here.major}.{here.minor}",
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "commit": said("git", "rev-parse", "HEAD"),
        "changed": bool(said("git", "status", "--porcelain", "--untracked-files=no")),
    }


def write(path: Path, facts: dict[str, Any]) -> None:
    path.write_text(json.dumps(facts, indent=1) + "\n")


# --- figures


def measure(op: str | None, path: Path) -> int:
    """The suite's operators, or one of them, and the table of what came out."""
    command = [sys.executable, "-m", "pytest", "benchmarks/test_ops.py", "benchmarks/test_graph.py", "-v", "-s"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", f"--benchmark-json={path}", "--benchmark-quiet"]
    command += ["-k", f"{op} and not test_memory"] if op else []
    path.unlink(missing_ok=True)
    status, _ = limited("figures", command, dict(os.environ), shown=True)
    if path.is_file():
        from .report import head, load, operators

        results = load([path])
        print(head(results), operators(results), sep="\n\n", flush=True)
    return 1 if status is None else status


# --- tests


def run_tests() -> dict[str, Any]:
    """The operators' tests on both GPU backends."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops"]
    if importlib.util.find_spec("xdist"):  # each worker holds a context on the GPU: 15 of them fit on an H200
        command += ["-n", str(max(1, min(15, (os.cpu_count() or 1) - 1)))]
    start = time.time()
    status, said = limited("tests", command, {**os.environ, "AMTML_TEST_BACKENDS": "gpu"})
    lines = said.strip().splitlines()
    print(*lines[-60:], sep="\n", flush=True)
    return {"status": status, "summary": lines[-1] if lines else "", "seconds": round(time.time() - start)}


SMALL_CASES = """
import torch, amtml_fast as af
from amtml_fast.testing import CASES, value_and_grads
torch.set_default_device("cuda")
for case in CASES.values():
    for size in case.sizes[:6]:
        for options in case.variants:
            if options.get("dim1") == 0 and len(size) < 3: continue
            for dtype in (torch.float32, torch.bfloat16):
                value_and_grads(case.function, case.inputs(*size, dtype=dtype), **options)
torch.cuda.synchronize()
print("clean")
"""


def check_memory() -> dict[str, Any]:
    """The CUDA kernels on small cases under compute-sanitizer; status None where the tool is missing or does not work."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"status": None, "summary": "compute-sanitizer is not installed"}
    env = {**os.environ, "AMTML_BACKEND": "cuda", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", SMALL_CASES]
    status, said = limited("memory checks", command, env)
    summary = [line for line in said.splitlines() if "ERROR SUMMARY" in line or "Device not supported" in line]
    print("compute-sanitizer:", *(summary or [said[-300:]]), flush=True)
    works = "ERROR SUMMARY" in said
    return {"status": status if works else None, "summary": summary[-1] if summary else said[-300:]}


def limited(part: str, command: list[str], env: dict[str, str], shown: bool = False) -> tuple[int | None, str]:
    """Exit status and output (empty where it is shown) of a command; None if it was stopped after ``SECONDS``: like by Ctrl-C, after
    which pytest still says what it has, and killed with all that it started where that does not help."""
    output = None if shown else subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            said = process.communicate(timeout=SECONDS[part])[0]
            return process.returncode, said or ""
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        try:
            said = process.communicate(timeout=20)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said = process.communicate()[0]
        print(f"{part}: stopped after {SECONDS[part]} s", flush=True)
        return None, said or ""


if __name__ == "__main__":
    sys.exit(main())
