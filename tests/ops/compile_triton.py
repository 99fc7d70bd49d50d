"""Compiles what the Triton launchers would launch, without a GPU: ``python compile_triton.py CAPABILITY FOLDER [PART]``.

A driver that only knows the target stands in for CUDA's, launches stop after compilation, and the launchers are called with
tensors of the CPU: of sizes as people use them, and of every size, variant and dtype of the operators' tests (PART 0, 1 or 2:
some of them, see below, and EACH of a kernel at most; in 1 nearly all of the large sizes and one of the tests'). Triton compiles once what differs in nothing that the code depends on. One cubin each, named after its kernel,
and a JSON file with its warps, its shared memory, whether it is one of the large sizes', and its narrow_addresses.
"""

import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ["AMTML_TEST_BACKENDS"] = ""  # of the tests' modules: all that they would run
sys.path.append(str(Path(__file__).parents[1]))  # where backends.py is

import torch
import triton
from amtml_fast.kernels import _launch
from narrow_addresses import narrow_addresses
from test_ops import GRID, STEP
from test_topk import dense_calls
from test_vocabulary_kernels import Rows, run_one_part
from triton.runtime.jit import JITFunction
from triton_host import Driver

import amtml_fast as af
from amtml_fast import backend
from amtml_fast.ops.divergence import ALL_MODES, DIVERGENCES
from amtml_fast.testing import CASES, value_and_grads

EACH = 3  # compilers differ in kernels more than in a kernel's sizes, and each takes half a second


def large_calls(part: int | None) -> Iterator[tuple[Any, tuple, dict]]:
    """All; in the first and the last of the three parts, those of multi_teacher_kd and a quarter of the others. In the second one
    each size of multi_teacher_kd, which takes longest, in one of the dtypes, in turn."""
    at = 0
    for case in CASES.values():
        kd = case.op == "multi_teacher_kd"
        for i, size in enumerate(case.large):
            for j, (options, dtype) in enumerate(zip(case.variants, (torch.bfloat16, torch.float32))):
                at += 1
                in_part = {None: True, 1: not kd or (i + j) % 2 == 1}.get(part, kd or at % 4 == part)
                if in_part:
                    yield case.function, case.inputs(*size, dtype=dtype), options
    student, teachers, weights, _ = CASES["multi_teacher_kd"].inputs(64, 1000, 1)
    yield af.multi_teacher_kd_loss, (student, teachers, weights, None), {}  # no case lacks its labels
    yield from numbers_by_row()
    yield from parts(4, 32000, torch.bfloat16, [("jsd", "mixture"), ("reverse_kl", "logits"), ("forward_kl", "sum")])
    yield from whole_losses(128, 64, 8)


def numbers_by_row() -> Iterator[tuple[Any, tuple, dict]]:
    """What no case has: alpha and temperature of rows, and statistics."""
    for size, mode in (((128, 100, 3), "mixture"), ((4, 32000, 3), "logits")):
        student, teachers, weights, labels = CASES["divergence"].inputs(*size)
        alpha = torch.full(size[:1], 0.5, requires_grad=True)
        options = {"divergence": "jsd", "mode": mode, "temperature": alpha.detach(), "return_stats": True}
        args = student, teachers, weights, labels, alpha
        yield lambda *a, **o: af.multi_teacher_kd_loss(*a[:4], alpha=a[4], **o)[0], args, options
    top = CASES["topk_bucket"].inputs(4, 32000, 64, 3)
    yield lambda *a, **o: af.topk_kd_loss(*a, **o)[0], top, {"tail": "uniform", "return_stats": True}


def parts(n: int, classes: int, dtype: torch.dtype, kinds: list[tuple[str, str]]) -> Iterator[tuple[Any, tuple, dict]]:
    """The part that a process has of a split vocabulary."""
    student, teachers, weights, labels = CASES["divergence"].inputs(n, classes, 3, dtype=dtype)
    rows = Rows(student.detach(), teachers, weights.detach(), labels)
    for divergence, mode in kinds:
        taus = [1.0, 2.0, 3.0] if mode == "logits" else None

        def part(x: Any, kind: tuple = (divergence, mode, taus)) -> Any:
            run_one_part(rows, "triton", *kind)
            return x.sum()

        yield part, (student,), {}


def whole_losses(rows: int, channels: int, side: int) -> Iterator[tuple[Any, tuple, dict]]:
    student, teachers, _, labels = CASES["multi_teacher_kd"].inputs(rows, 100, 3)
    features = torch.randn(rows, channels, side, side, requires_grad=True)
    for options in ({}, {"angle_trains_weights": True, "regularizer_weight": 0.0}, {"angle_weight": 0.0}):
        loss = af.AMTMLLoss(af.TeacherAdapter(channels, 3), **options)
        yield lambda *args: loss(*args).loss, (student, teachers, labels, features), {}  # noqa: B023


def test_calls(part: int | None) -> Iterator[tuple[Any, tuple, dict]]:
    """All of the operators' tests, or in the three parts together each size and each variant, but not each pair of them, in one of
    the dtypes."""
    for grid in GRID:
        case, size, options = grid.values
        at, of = case.sizes.index(size) + case.variants.index(options) + 1, min(6, len(case.variants))
        mine = at % of == 0 and at // of % 3 == part
        for i, dtype in enumerate(d for d in STEP if d != torch.float64):
            if part is None or (mine and case.sizes.index(size) % 3 == i):
                yield case.function, case.inputs(*size, dtype=dtype), options
    for at, (args, options) in enumerate(dense_calls()):
        if part is None or at % 18 == 6 * part:
            yield af.topk_kd_loss, args, {"reduction": "none", **options}
    kinds = [(divergence, mode) for divergence in DIVERGENCES for mode in ALL_MODES]
    yield from parts(9, 30, torch.float32, kinds if part is None else kinds[part::7])
    yield from whole_losses(9, 6, 3)


def main(capability: int, folder: Path, part: int | None = None) -> int:
    triton.runtime.driver.set_active(Driver(capability))
    backend.DEVICES["triton"] = ("cpu",)
    compiled: dict[str, Any] = {}
    failed: Counter[str] = Counter()
    of_kernel: Counter[str] = Counter()
    _launch.by_hand = False  # each launch goes through JITFunction.run
    launch = JITFunction.run

    def only_compile(self: JITFunction, *args: object, grid: object, warmup: bool = False, **options: object) -> object:
        enough = {None: sys.maxsize, 1: 1 if large else sys.maxsize}.get(part, EACH)
        if of_kernel[self.__name__] >= enough:
            return None
        try:
            kernel = launch(self, *args, grid=grid, warmup=True, **options)
        except RuntimeError as error:  # the compiler's; the rest is to be tried even so
            if not failed:
                traceback.print_exc()
            failed[f"{self.__name__}: {str(error).splitlines()[0]}"] += 1
            return None
        key = f"{self.__name__}-{kernel.hash[:12]}"
        of_kernel[self.__name__] += key not in compiled
        compiled[key] = kernel
        return kernel

    JITFunction.run = only_compile  # type: ignore[method-assign]
    large: set[str] = set()
    for calls in (large_calls(part), test_calls(part)):
        for function, args, options in calls:
            with af.use_backend("triton"):
                value_and_grads(function, args, **options)
        large = large or set(compiled)
        if part == 1:
            of_kernel.clear()
    for name, kernel in compiled.items():
        (folder / f"{name}.cubin").write_bytes(kernel.asm["cubin"])
        facts = {"warps": kernel.metadata.num_warps, "shared_bytes": kernel.metadata.shared, "large": name in large}
        facts["narrow"] = sorted(narrow_addresses(kernel.asm["ttir"]))
        (folder / f"{name}.json").write_text(json.dumps(facts))
    print(len(compiled), "kernels,", len(large), "of large sizes; Triton", triton.__version__)
    for what, count in failed.items():
        print(count, "launches failed:", what, file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])))
