"""Everything that needs a GPU, in one command: build, tests, memory checks, figures. Run by ``make gpu [PART=...]``.

    python benchmarks/gpu.py [--part all|tests|kd|angle|loss] [--out benchmarks/results/gpu.json]

It takes the Python it runs under, with torch >= 2.11, Triton >= 3.6, pytest and nvcc, and no network. Times are medians over CUDA
events, forward and backward, with the second-level cache flushed before each; ``graph`` rows are replays of a captured
CUDA graph. A case is timed only after its value and gradients were found to be those of the reference. Rows carry the
share of a limit measured in the same run: of the copy bandwidth, or of the rate of float32 multiply-adds.
"""

import argparse
import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PARTS = ("tests", "kd", "topk", "angle", "loss")
PLAN = {
    "tests": "the operators' tests on both GPU backends, CUDA graphs, syncs, launches; compute-sanitizer where it works",
    "kd": "KL + CE, 4096 x 128256 in bf16 and float32 and 4096 x 32000, T = 3; KL alone at T = 1",
    "topk": "KL from the 64 largest of 128256 classes, bf16, N = 4096, T = 3",
    "angle": "angle loss, N = 1024 and 4096 with C = 100, N = 8192 with C = 1000",
    "loss": "AMTMLLoss, N = 128 C = 100 T = 3, called and as a CUDA graph",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("all", *PARTS), default="all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--built", action="store_true", help="take the library that lies in amtml_fast/")
    args = parser.parse_args()
    parts = PARTS if args.part == "all" else (args.part,)
    build(args.built)
    if not torch.cuda.is_available():
        print("\nWould run:", *(f"  {part}: {PLAN[part]}" for part in parts), sep="\n")
        print("\nNo GPU was found: the extension is built, nothing was run and nothing was measured.")
        return 1
    report: dict[str, Any] = {"machine": machine(), "parts": list(parts), "rows": [], "path": str(args.out)}
    failed = False
    if parts != ("tests",):  # before the tests: what is measured is kept, whatever they do
        report["limits"] = limits()
    for part, measure in (
        ("loss", measure_loss),
        ("kd", measure_kd),
        ("angle", measure_angle),
        ("topk", measure_topk),
    ):
        if part in parts:
            measure(report)
    if "tests" in parts:
        report["tests"] = run_tests()
        write(report)
        report["memory_checks"] = memory_checks()
        failed = report["tests"]["status"] != 0 or report["memory_checks"]["status"] not in (0, None)
    write(report)
    print_table(report)
    print(f"\nWritten: {args.out}")
    return int(failed)


def build(built: bool) -> None:
    """The extension with its CUDA kernels, in place, for the GPU of this machine, unless it was built elsewhere."""
    if not built:
        compile_extension()
    import amtml_fast

    amtml_fast.__path__.append(str(ROOT))  # where amtml_fast.kernels is, as long as the package is not installed


def compile_extension() -> None:
    env = {**os.environ, "AMTML_BUILD_EXT": "1", "AMTML_BUILD_CUDA": "1"}
    if torch.cuda.is_available():
        env.setdefault("TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability()))
    print("Building the extension with CUDA, for some minutes ...", flush=True)
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
        "multiprocessors": here.multi_processor_count,
        "memory_bytes": here.total_memory,
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "commit": said("git", "rev-parse", "HEAD"),
        "changed": bool(said("git", "status", "--porcelain", "--untracked-files=no")),
    }


# --- tests


def operator_tests() -> list[str]:
    """The files that the Makefile runs on every backend."""
    names = re.search(r"^OPERATORS := \$\(addprefix tests/test_,(.*)\)$", (ROOT / "Makefile").read_text(), re.M)
    assert names is not None, "Makefile: no OPERATORS"
    return [f"tests/test_{name}" for name in names[1].split()]


def run_tests() -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py", *operator_tests()]
    if importlib.util.find_spec("xdist"):  # each worker holds a context on the GPU: 15 of them took 95 s on an H200
        command += ["-n", str(max(1, min(15, (os.cpu_count() or 1) - 1)))]
    env = {**os.environ, "AMTML_TEST_BACKENDS": "gpu"}
    start = time.time()
    status, said = limited(command, env, 420)
    lines = said.strip().splitlines()
    print(*lines[-60:], sep="\n", flush=True)
    return {"status": status, "summary": lines[-1] if lines else "", "seconds": round(time.time() - start)}


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


def memory_checks() -> dict[str, Any]:
    """The CUDA kernels on small cases under compute-sanitizer; status None where the tool is missing or does not work."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"status": None, "summary": "compute-sanitizer is not installed"}
    env = {**os.environ, "AMTML_BACKEND": "cuda", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", SMALL_CASES]
    status, said = limited(command, env, 120)
    summary = [line for line in said.splitlines() if "ERROR SUMMARY" in line or "Device not supported" in line]
    print("compute-sanitizer:", *(summary or [said[-300:]]), flush=True)
    works = "ERROR SUMMARY" in said
    return {"status": status if works else None, "summary": summary[-1] if summary else said[-300:]}


# --- time


@functools.cache
def other_data() -> torch.Tensor:
    """More than any second-level cache holds."""
    return torch.empty(256 << 20, dtype=torch.int8, device="cuda")


def flushed_median(step: Callable[[], object], repeat: int = 20) -> float:
    """Seconds, the median over ``repeat``; each starts with a second-level cache that holds something else."""
    for _ in range(3):
        step()
    times = []
    for _ in range(repeat):
        other_data().zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def replayed_median(step: Callable[[], object], repeat: int = 50) -> float:
    """Seconds of a replay of the captured step, ten replays a measurement."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replays() -> None:
        for _ in range(10):
            graph.replay()

    return flushed_median(replays, repeat) / 10


def limits() -> dict[str, float]:
    """Copy bandwidth in bytes a second (read and written), float32 and float64 operations a second of vector units."""

    def copy_bandwidth() -> float:
        source = torch.empty(1 << 30, dtype=torch.float32, device="cuda").normal_()
        target = torch.empty_like(source)
        return 2 * source.nbytes / flushed_median(lambda: target.copy_(source))

    found = {"copy_bytes_per_s": copy_bandwidth()}
    torch.backends.cuda.matmul.allow_tf32 = False
    for name, dtype, n in (("float32_flops", torch.float32, 8192), ("float64_flops", torch.float64, 4096)):
        a = torch.randn(n, n, device="cuda", dtype=dtype)
        found[name] = 2 * n**3 / flushed_median(functools.partial(torch.matmul, a, a), 5)
    print({k: f"{v:.3g}" for k, v in found.items()}, flush=True)
    return found


def measured(
    report: dict, case: str, provider: str, step: Callable, timer: Callable = flushed_median, **limit: float
) -> None:
    """One row; a provider that runs out of memory or fails says so instead of a time."""
    row: dict[str, Any] = {"case": case, "provider": provider}
    other_data()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        seconds = timer(step)
        row.update(seconds=seconds, extra_bytes=torch.cuda.max_memory_allocated() - before)
        if "bytes" in limit:
            row["share_of_copy"] = limit["bytes"] / seconds / report["limits"]["copy_bytes_per_s"]
        if "flops" in limit:
            row["share_of_float32"] = limit["flops"] / seconds / report["limits"]["float32_flops"]
    except torch.OutOfMemoryError:
        row["failed"] = "out of memory"
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
    add(report, row)


def add(report: dict, row: dict[str, Any]) -> None:
    report["rows"].append(row)
    print(row, flush=True)
    write(report)


def right(report: dict, case: str, provider: str, got: Callable[[], Any], want: Any, tolerance: float) -> bool:
    """Whether what is to be timed gives the right numbers; if not, a row says so."""
    try:
        check(provider, got(), want, tolerance)
    except Exception as error:
        add(report, {"case": case, "provider": provider, "failed": f"{type(error).__name__}: {str(error)[:300]}"})
        return False
    return True


def providers(function: Callable[..., Any], graph_breaks: bool = False) -> dict[str, Callable[..., Any]]:
    """cuda, triton, eager and compile, each called with the same arguments."""
    import amtml_fast as af

    def on(backend: str, f: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with af.use_backend(backend):
                return f(*args)

        return call

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=not graph_breaks)
    return {
        "cuda": on("cuda", function),
        "triton": on("triton", function),
        "eager": on("reference", function),
        "compile": on("reference", compiled),
    }


def check(name: str, got: Any, want: Any, tolerance: float) -> None:
    from amtml_fast.testing import relative_error

    for g, w in zip(got, want, strict=True):
        error = relative_error(g, w)
        if not error <= tolerance:
            raise RuntimeError(f"{name}: wrong, relative error {error:.2g}")


def gradients(function: Callable[..., torch.Tensor], args: tuple, leaves: list[torch.Tensor]) -> Callable[[], Any]:
    def step() -> Any:
        out = function(*args)
        return (out.detach(), *torch.autograd.grad(out, leaves))

    return step


def measure_kd(report: dict) -> None:
    import amtml_fast as af

    bf16, f32 = torch.bfloat16, torch.float32
    for n, c, t, labelled, dtype in (
        (4096, 128256, 3, True, bf16),
        (4096, 32000, 3, True, bf16),
        (4096, 128256, 1, False, bf16),
        (4096, 128256, 3, True, f32),
    ):
        make = lambda: 2 * torch.randn(n, c, device="cuda", dtype=dtype)  # noqa: B023, E731
        teachers, labels = [make() for _ in range(t)], torch.randint(0, c, (n,), device="cuda") if labelled else None
        student, weights = make().requires_grad_(), torch.randn(n, t, device="cuda").softmax(-1)
        temperature = 4.0 if labelled else 1.0
        case = f"kd {'bf16' if dtype == bf16 else 'fp32'} {n}x{c} T={t}" + ("" if labelled else ", no labels, tau=1")

        def function(z: torch.Tensor, ts: list, w: torch.Tensor, y: Any, tau: float = temperature) -> torch.Tensor:
            return af.multi_teacher_kd_loss(z, ts, w, y, temperature=tau)

        some = slice(0, 32)
        few = [x[some].detach() for x in teachers], weights[some], None if labels is None else labels[some]
        leaf = student.detach()[some].requires_grad_()
        exact = student.detach()[some].double().requires_grad_()
        plain = functools.partial(af.reference.multi_teacher_kd_loss, temperature=temperature)
        want = gradients(plain, (exact, [x.double() for x in few[0]], *few[1:]), [exact])()
        for provider, call in providers(function).items():
            if provider in ("cuda", "triton") and not right(
                report, case, provider, gradients(call, (leaf, *few), [leaf]), want, 5e-3
            ):
                continue
            step = gradients(call, (student, teachers, weights, labels), [student])
            measured(report, case, provider, step, bytes=dtype.itemsize * n * c * (t + 2))
        if not labelled:
            measure_liger(report, case, student, teachers[0], 2 * n * c * (t + 2))
        del teachers, student, labels, weights


def measure_topk(report: dict) -> None:
    import amtml_fast as af

    n, c, k, t = 4096, 128256, 64, 3
    case = f"topk bf16 {n}x{c} k={k} T={t}"
    student = (2 * torch.randn(n, c, device="cuda", dtype=torch.bfloat16)).requires_grad_()
    labels, weights = torch.randint(0, c, (n,), device="cuda"), torch.randn(n, t, device="cuda").softmax(-1)
    indices = [torch.rand(n, c, device="cuda").topk(k).indices for _ in range(t)]
    log_probs = [torch.randn(n, k, device="cuda").log_softmax(-1) - 0.1 for _ in range(t)]

    def function(z: torch.Tensor, i: list, p: list, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return af.topk_kd_loss(z, i, p, w, y)

    some = slice(0, 32)
    few = [x[some] for x in indices], [x[some] for x in log_probs], weights[some], labels[some]
    leaf = student.detach()[some].requires_grad_()
    exact = student.detach()[some].double().requires_grad_()
    want = gradients(
        af.reference.topk_kd_loss,
        (exact, few[0], [x.double() for x in few[1]], weights[some].double(), few[3]),
        [exact],
    )()
    for provider, call in providers(function).items():
        if provider in ("cuda", "triton") and not right(
            report, case, provider, gradients(call, (leaf, *few), [leaf]), want, 5e-3
        ):
            continue
        step = gradients(call, (student, indices, log_probs, weights, labels), [student])
        measured(report, case, provider, step, bytes=2 * n * c * 2 + 12 * n * k * t)


def measure_liger(report: dict, case: str, student: torch.Tensor, teacher: torch.Tensor, moved: int) -> None:
    try:
        from liger_kernel.transformers import LigerKLDIVLoss
    except ImportError:
        add(report, {"case": case, "provider": "liger", "failed": "not installed"})
        return
    loss = LigerKLDIVLoss(reduction="batchmean")
    step = gradients(lambda z, x: loss(z.log_softmax(-1), x.softmax(-1)), (student, teacher), [student])
    measured(report, case, "liger", step, bytes=moved)


def measure_angle(report: dict) -> None:
    import amtml_fast as af

    for n, c in ((1024, 100), (4096, 100), (8192, 1000)):
        teacher, student = (torch.randn(n, c, device="cuda").softmax(-1) for _ in range(2))
        student.requires_grad_()
        if n == 1024:
            small = [x.detach()[:96].double().requires_grad_() for x in (student, teacher)]
            want = gradients(af.reference.angle_loss, tuple(small), small)()
        for provider, call in providers(af.angle_loss).items():
            if provider in ("eager", "compile") and n > 1024:
                continue  # N^3 elements do not fit
            if provider in ("cuda", "triton") and n == 1024:
                few = [x.float().detach().requires_grad_() for x in small]
                if not right(report, f"angle {n}x{c}", provider, gradients(call, tuple(few), few), want, 1e-5):
                    continue
            # counted for the half of the triplets that is different: 20 operations each
            flops = 10.0 * n**3
            timer = flushed_median if n < 4096 else lambda step: flushed_median(step, 3)
            measured(
                report, f"angle {n}x{c}", provider, gradients(call, (student, teacher), [student]), timer, flops=flops
            )


def measure_loss(report: dict) -> None:
    import amtml_fast as af
    from amtml_fast.testing import CASES

    torch.set_default_device("cuda")
    student, teachers, _, labels = CASES["multi_teacher_kd"].inputs(128, 100, 3)
    features, labels = torch.randn(128, 64, 8, 8, requires_grad=True), labels.clamp(min=0)
    loss = af.AMTMLLoss(af.TeacherAdapter(64, 3))
    torch.set_default_device(None)
    leaves = [student, features, *loss.parameters()]
    args = (student, teachers, labels, features)
    want = gradients(lambda *a: _reference(loss, *a), args, leaves)()
    for provider, call in providers(lambda *a: loss(*a).loss, graph_breaks=True).items():
        step = gradients(call, args, leaves)
        if not right(report, "whole loss 128x100 T=3", provider, step, want, 1e-4):
            continue
        measured(report, "whole loss 128x100 T=3", provider, step)
        measured(report, "whole loss 128x100 T=3, graph", provider, step, replayed_median)
        if provider in ("cuda", "triton"):
            report["rows"][-2]["launches"] = launches(step)


def _reference(loss: Any, *args: Any) -> torch.Tensor:
    import amtml_fast as af

    with af.use_backend("reference"):
        return loss(*args).loss


def launches(step: Callable[[], object]) -> int:
    """Kernels of one forward and backward, copies and fills included."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


# --- output


def write(report: dict) -> None:
    path = Path(report["path"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({k: v for k, v in report.items() if k != "path"}, indent=1) + "\n")


def print_table(report: dict) -> None:
    if "tests" in report:
        print("\ntests:", report["tests"]["summary"])
        print("memory:", report["memory_checks"]["summary"])
    times = {(r["case"], r["provider"]): r for r in report["rows"]}
    print(f"\n{'case':38} {'provider':8} {'ms':>9} {'vs eager':>9} {'vs compile':>10} {'share':>7} {'GB':>6} launches")
    for (case, provider), row in times.items():
        if "failed" in row:
            print(f"{case:38} {provider:8} {row['failed'][:60]}")
            continue
        ratio = {}
        for other in ("eager", "compile"):
            base = times.get((case, other), {}).get("seconds")
            ratio[other] = f"{base / row['seconds']:.2f}x" if base else ""
        share = row.get("share_of_copy") or row.get("share_of_float32")
        print(
            f"{case:38} {provider:8} {row['seconds'] * 1e3:9.3f} {ratio['eager']:>9} {ratio['compile']:>10} "
            f"{f'{share:.0%}' if share else '':>7} {row['extra_bytes'] / 1e9:6.2f} {row.get('launches', '')}"
        )


if __name__ == "__main__":
    sys.exit(main())
