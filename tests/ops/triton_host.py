"""Host time of the Triton backend without a GPU: ``python tests/ops/triton_host.py [SECONDS] [-v]``.

A driver that launches nothing stands in for CUDA's, and tensors of the CPU for a GPU's. Kernels are compiled as ever, for
compute capability 9.0, and never run: what they would write is not there. What is left is what Python, torch and Triton do for
one call, without the driver's own part of a launch and without the allocator of a GPU. Times are in
microseconds: the median of all calls, and the 20th of 400, which other work on the machine disturbs less.
"""

import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

import amtml_fast as af
from amtml_fast import backend, checks
from amtml_fast.testing import CASES


class Driver:
    """Answers what the launch path asks, and counts launches."""

    def __init__(self, capability: int = 90):
        self.target = GPUTarget("cuda", capability, 32)
        self.launches: Counter[str] = Counter()
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.target.arch, 10)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}

    def load_binary(self, name: str, *_: Any) -> tuple:
        return 0, name, 0, 0, 1024

    def unload_module(self, module: int) -> None: ...

    def launcher_cls(self, source: Any, metadata: Any) -> Callable:
        return self.launch

    def launch(self, x: int, y: int, z: int, stream: int, function: str, *_: Any) -> None:
        self.launches[function] += 1


class Aten(TorchDispatchMode):
    """Counts torch's own operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


class Empty(torch.autograd.Function):
    """One node with the inputs of the whole loss."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*inputs)
        return inputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        return tuple(t if needed else None for t, needed in zip(ctx.saved_tensors, ctx.needs_input_grad))


def times_of(step: Callable[[], object], seconds: float) -> tuple[float, float]:
    for _ in range(20):
        step()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times), 1e6 * statistics.quantiles(times, n=20)[0]


def steps() -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    student, teachers, weights, labels = CASES["multi_teacher_kd"].inputs(128, 100, 3)
    features = torch.randn(128, 64, 8, 8, requires_grad=True)
    loss = af.AMTMLLoss(adapter := af.TeacherAdapter(64, 3))
    leaves = [student, features, *loss.parameters()]
    targets = teachers[0].softmax(1)

    def both_ways() -> None:
        torch.autograd.grad(loss(student, teachers, labels, features).loss, leaves)

    def kd() -> None:
        torch.autograd.grad(af.multi_teacher_kd_loss(student, teachers, weights, labels), (student, weights))

    def jsd() -> None:
        options: dict = {"divergence": "jsd", "teacher_temperature": [1.0, 2.0, 3.0]}
        torch.autograd.grad(af.multi_teacher_kd_loss(student, teachers, weights, labels, **options), (student, weights))

    def forward(function: Callable, *args: Any) -> Callable:
        def step() -> None:
            with torch.no_grad():
                function(*args)

        return step

    empty = (student, features, *loss.parameters(), *teachers, labels)
    return {
        "an empty node with eight inputs": lambda: torch.autograd.grad(Empty.apply(*empty), leaves),
        "KL, forward": forward(af.multi_teacher_kd_loss, student, teachers, weights, labels),
        "KL, both ways": kd,
        "another divergence, both ways": jsd,
        "angle, forward": forward(af.angle_loss, student, targets),
        "weights, forward": forward(adapter, features),
        "AMTMLLoss, both ways": both_ways,
    }


def main(seconds: float = 3.0) -> None:
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    backend.DEVICES["triton"] = ("cpu",)
    checks.values_are_free = lambda t: False  # as on a GPU
    torch.set_num_threads(1)
    print("Triton", triton.__version__, "torch", torch.__version__)
    with af.use_backend("triton"):
        for name, step in steps().items():
            middle, low = times_of(step, seconds)
            driver.launches.clear()
            with Aten() as aten:
                step()
            counts = f"{driver.launches.total()} launches, {aten.calls.total()} of torch's operators"
            print(f"{name:35}{middle:8.0f} {low:8.0f}   {counts}")
            if "-v" in sys.argv:
                print("   ", dict(driver.launches), dict(aten.calls))


if __name__ == "__main__":
    main(*(float(a) for a in sys.argv[1:] if a != "-v"))
