"""Compiles what the Triton launchers would launch, without a GPU: ``python compile_triton.py CAPABILITY FOLDER``.

A driver that only knows the target stands in for CUDA's, launches stop after compilation, and the launchers are called with
empty tensors of the CPU. One cubin a variant, named after its kernel, and a JSON file with its warps and shared memory.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import amtml_fast as af
from amtml_fast import backend
from amtml_fast.testing import CASES, value_and_grads

SIZES = {  # as large as people use them, small enough for the CPU to hold
    "teacher_weights": [(128, 64, 8, 8, 3), (16, 64, 0, 0, 3)],
    "multi_teacher_kd": [(128, 100, 3), (50_000, 10, 2), (64, 1000, 3), (4, 32000, 3), (4, 128256, 1)],
    "topk_kd": [(128, 100, 8, 3), (4, 32000, 64, 3), (4, 128256, 32, 1)],
    "angle": [(128, 100)],
    "distance": [(128, 100)],
    "hint": [(16, 16, 16, 64, 8)],
    "dual_softmax": [(512, 512), (2, 4096)],
}


class Driver:
    """Answers what the launch path asks before it launches."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

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


def main(capability: int, folder: Path) -> None:
    triton.runtime.driver.set_active(Driver(capability))
    backend.DEVICES["triton"] = ("cpu",)
    compiled: dict[str, Any] = {}
    launch = JITFunction.run

    def only_compile(self: JITFunction, *args: object, grid: object, warmup: bool = False, **options: object) -> object:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        compiled[f"{self.__name__}-{kernel.hash[:12]}"] = kernel
        return kernel

    JITFunction.run = only_compile  # type: ignore[method-assign]
    for case in CASES.values():
        for size in SIZES[case.op]:
            for options, dtype in zip(case.variants, (torch.bfloat16, torch.float32)):
                with af.use_backend("triton"):
                    value_and_grads(case.function, case.inputs(*size, dtype=dtype), **options)
    student, teachers, weights, _ = CASES["multi_teacher_kd"].inputs(64, 1000, 1)
    with af.use_backend("triton"):  # no case lacks its labels
        value_and_grads(af.multi_teacher_kd_loss, (student, teachers, weights, None))
    for name, kernel in compiled.items():
        (folder / f"{name}.cubin").write_bytes(kernel.asm["cubin"])
        sizes = {"warps": kernel.metadata.num_warps, "shared_bytes": kernel.metadata.shared}
        (folder / f"{name}.json").write_text(json.dumps(sizes))
    print(len(compiled), "kernels")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
