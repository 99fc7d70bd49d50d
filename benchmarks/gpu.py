"""Everything that needs a GPU, in one command: build, figures, tests, memory checks. Run by ``make gpu [PART=...]``.

    python -m benchmarks.gpu [--part all|tests|an operator] [--out benchmarks/results/gpu]

It runs with the Python that has torch >= 2.11, Triton >= 3.6, pytest and pytest-benchmark, and needs nvcc, but no network. It
writes results.json (the benchmark suite's own, for benchmarks/report.py) and checks.json (the tests) to the folder.
"""

import argparse
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
PARTS = ("all", "tests", "kl", *sorted(file.stem for file in (ROOT / "amtml_fast" / "ops").glob("[a-z]*.py")))
OPERATORS_SECONDS, SANITIZER_SECONDS = 420, 120  # after which they are stopped


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, default="all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--built", action="store_true", help="take the library that lies in amtml_fast/")
    args = parser.parse_args()
    if not args.built:
        build()
    if not torch.cuda.is_available():
        print("\nNo GPU was found: the extension is built, nothing was run and nothing was measured.")
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
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
    status = subprocess.run([*command, *(["-k", f"{op} and not test_memory"] if op else [])], cwd=ROOT).returncode
    if path.is_file():
        from .report import load, report

        print(report(load([path])))
    return status


# --- tests


def run_tests() -> dict[str, Any]:
    """The operators' tests on both GPU backends."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops"]
    if importlib.util.find_spec("xdist"):  # each worker holds a context on the GPU: 15 of them fit on an H200
        command += ["-n", str(max(1, min(15, (os.cpu_count() or 1) - 1)))]
    start = time.time()
    status, said = limited(command, {**os.environ, "AMTML_TEST_BACKENDS": "gpu"}, OPERATORS_SECONDS)
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
    status, said = limited(command, env, SANITIZER_SECONDS)
    summary = [line for line in said.splitlines() if "ERROR SUMMARY" in line or "Device not supported" in line]
    print("compute-sanitizer:", *(summary or [said[-300:]]), flush=True)
    works = "ERROR SUMMARY" in said
    return {"status": status if works else None, "summary": summary[-1] if summary else said[-300:]}


def limited(command: list[str], env: dict[str, str], seconds: float) -> tuple[int | None, str]:
    """Exit status and output of a command; None if it was stopped, with all that it started, after so long."""
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            said = process.communicate(timeout=seconds)[0]
            return process.returncode, said
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[0] + f"\nstopped after {seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
