"""An operator has all its parts: reference, schemas, fakes, a kernel on every backend, and in the CPU's one for each width of vectors."""

import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import CHOSEN, cpu_only
from test_vocabulary_kernels import Rows, run_one_part

import amtml_fast as af
from amtml_fast import backend, reference
from amtml_fast.ops import _base as ops
from amtml_fast.ops.divergence import ALL_MODES
from amtml_fast.ops.hint import hint_mse
from amtml_fast.testing import CASES, convert, value_and_grads

each_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
FAKED = "test_schema", "test_faketensor"  # of torch.library.opcheck
TRACED = *FAKED, "test_autograd_registration", "test_aot_dispatch_dynamic"


# Module forms, and what they are given with each batch.
MODULES = {
    af.MultiTeacherKDLoss: {"labels", "num_items_in_batch"},
    af.TopKKDLoss: {"labels", "num_items_in_batch"},
    af.FusedLinearKDLoss: {"teacher_weights", "labels", "num_items_in_batch", "student_bias", "teacher_index"},
    af.AngleLoss: set(),
    af.RKDDistanceLoss: set(),
    af.DualSoftmax: set(),
}


@each_case
def test_every_operator_has_all_its_parts(case):
    assert case.op in backend.OPS and hasattr(reference, getattr(case.reference, "func", case.reference).__name__)
    schemas = [name for name in ops.SCHEMAS if name.startswith(case.op)]
    assert any(name.endswith("_fwd") for name in schemas)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in schemas:
        # The emulator's library is that of the CUDA kernels.
        if name not in (ops.CPU_ONLY if CHOSEN == "emulated" else ops.GPU_ONLY):
            assert has_kernel(f"amtml::{name}", "CPU"), f"csrc/cpu lacks {name}"
        assert has_kernel(f"amtml::{name}", "Meta"), f"ops/{case.op}.py lacks {name}'s fake"


@pytest.mark.skipif(not backend.HAS_CUDA, reason="the extension was built without CUDA")
@pytest.mark.parametrize("name", sorted(set(ops.SCHEMAS) - set(ops.CPU_ONLY)))
def test_every_schema_has_a_cuda_kernel(name):
    key = "CPU" if CHOSEN == "emulated" else "CUDA"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"amtml::{name}", key), f"csrc/cuda lacks {name}"


@pytest.mark.skipif(not backend.HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("name", ops.TRITON)
def test_triton_launchers_have_the_signature_of_their_schema(name):
    launcher = getattr(importlib.import_module(f"amtml_fast.kernels.{ops.TRITON[name]}"), name)
    schema = getattr(torch.ops.amtml_triton, name).default._schema
    assert list(inspect.signature(launcher).parameters) == [a.name for a in schema.arguments]


def test_reference_signatures_are_the_public_ones():
    for case in CASES.values():
        public, plain = (inspect.signature(f).parameters for f in (case.function, case.reference))
        assert list(public) == list(plain)
        assert [p.default for p in public.values()] == [p.default for p in plain.values()]


@cpu_only
@pytest.mark.parametrize(
    ("taker", "like"),
    [
        (af.fused_linear_kd_loss, reference.fused_linear_kd_loss),
        (af.fused_linear_kd_loss, af.multi_teacher_kd_loss),
        (af.topk_kd_loss, af.multi_teacher_kd_loss),
        (af.MultiTeacherKDLoss, af.multi_teacher_kd_loss),
        (af.TopKKDLoss, af.topk_kd_loss),
        (af.FusedLinearKDLoss, af.fused_linear_kd_loss),
        (af.AMTMLLoss, af.multi_teacher_kd_loss),
        (af.AngleLoss, af.angle_loss),
        (af.RKDDistanceLoss, af.rkd_distance_loss),
        (af.DualSoftmax, af.dual_softmax),
        (af.TeacherAdapter, af.teacher_weights),
        (af.MultiGroupHintLoss, af.hint_loss),
        (af.TeacherGate.fit, af.multi_teacher_kd_loss),
    ],
    ids=lambda call: call.__qualname__,
)
def test_an_argument_of_one_name_has_one_default(taker, like):
    ours, theirs = (inspect.signature(call).parameters for call in (taker, like))
    shared = {name for name in ours if name in theirs and ours[name].default is not inspect.Parameter.empty}
    optional = {name for name in theirs if theirs[name].default is not inspect.Parameter.empty}
    shared &= optional
    assert shared and all(ours[name].default == theirs[name].default for name in shared)
    if taker in MODULES:  # all settings of the function, and no other ones
        assert shared == set(ours) == optional - MODULES[taker]


@each_case
def test_opcheck(case, fused):
    """Schemas, fakes and dynamic shapes of every raw op, on the calls that the public function makes."""
    seen = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace in ("amtml", "amtml_triton"):
                seen.append((func, args, utils))
            return func(*args, **(kwargs or {}))

    # Dynamic shapes are traced, which takes time, for every dtype of the first variant and for the other variants in one, in
    # turn, of the first three. An interpreter has the time for one dtype of each, and to trace the first: all backends have the
    # same fakes.
    variants = [options for options in case.variants if options.get("dim1") != 0]
    dtypes = torch.float32, torch.bfloat16, torch.float16
    with Record():
        for i, options in enumerate(variants):
            for j, dtype in enumerate(dtypes):
                turn = j == i % len(dtypes) or (i == 0 and fused == "cpp")
                traced = turn and i < (3 if fused == "cpp" else 1)
                if (turn and i < 5) or fused == "cpp":
                    utils = TRACED if traced else FAKED
                    value_and_grads(case.function, case.inputs(*case.small, dtype=dtype), **options)
        utils = TRACED
        if case.op == "hint":  # the error alone, which on the CPU is not part of it
            value_and_grads(hint_mse, case.inputs(*case.small)[:1] * 2)
        if case.op == "divergence":  # and in a split vocabulary
            student, teachers, weights, labels = case.inputs(*case.small)
            rows = Rows(student.detach(), teachers, weights.detach(), labels)
            for mode in ALL_MODES[:1] if fused == "triton" else ALL_MODES:
                run_one_part(rows, fused, "jsd", mode)
        if case.op == "topk_bucket":  # the CPU sweeps for statistics alone, and back in a split vocabulary
            value_and_grads(lambda *args: case.function(*args, return_stats=True)[0], case.inputs(*case.small))
            if fused == "cpp":
                student, index = torch.randn(6, 5), torch.tensor([[3, 1]]).repeat(6, 1)
                sums, of_z, found = (torch.randn(6, k, dtype=torch.float64) for k in (4, 2, 8))
                settings = 2.0, -100, False, False, False
                torch.ops.amtml.topk_bucket_bwd.default(sums, of_z, student, index, None, found, *settings)
    elsewhere = ops.GPU_ONLY if fused == "cpp" else ops.CPU_ONLY - (set(ops.TRITON) if fused == "triton" else set())
    assert {f.overloadpacket.__name__ for f, *_ in seen} - {"scale_rows_"} == {
        n for n in ops.SCHEMAS if n.startswith(case.op) and n not in elsewhere
    }
    assert {f.namespace for f, *_ in seen} == {"amtml_triton" if fused == "triton" else "amtml"}
    for func, args, utils in seen:
        torch.library.opcheck(func, convert(args) if isinstance(args, tuple) else args, test_utils=utils)


VECTORS = """
import sys, torch
import amtml_fast as af
from amtml_fast.testing import CASES, convert, relative_error, value_and_grads
for case in CASES.values():
    for size in case.sizes:
        args = case.inputs(*size)
        want, want_grads = value_and_grads(case.reference, convert(args, dtype=torch.float64))
        got, grads = value_and_grads(case.function, args)
        assert relative_error(got, want) <= 1e-6, (case.op, size)
        assert all(relative_error(g, w) <= 1e-5 for g, w in zip(grads, want_grads)), (case.op, size)
        print(case.op, size, got.double().sum().item())
x, w, g = (torch.randn(35, 50), torch.randn(99, 50), torch.randn(35, 99))
made = [torch.empty(35, 99), torch.empty(35, 50), torch.empty(99, 50)]
torch.ops.amtml.fused_linear_kd_logits_(made[0], x, w, None, 1.0)
torch.ops.amtml.fused_linear_kd_grad_hidden_(made[1], g, w, 1.0)
torch.ops.amtml.fused_linear_kd_grad_weight_(made[2], g, x, 1.0, False)
x, w, g = x.double(), w.double(), g.double()
assert all(relative_error(m, e) <= 1e-6 for m, e in zip(made, (x @ w.T, g @ w, g.T @ x)))
"""


@cpu_only
def test_narrower_vectors_give_right_numbers_too():
    """What a processor without AVX-512 or AVX2 runs: chosen at run time, from the same library."""
    seen = {}
    for vectors in ("baseline", "avx2"):
        run = subprocess.run(
            [sys.executable, "-c", VECTORS],
            capture_output=True,
            text=True,
            env={**os.environ, "AMTML_CPU_VECTORS": vectors, "AMTML_BACKEND": "cpp"},
        )
        assert run.returncode == 0, run.stderr
        seen[vectors] = run.stdout
    assert seen["baseline"].count("\n") == sum(len(case.sizes) for case in CASES.values())
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert seen["baseline"] != seen["avx2"]  # other roundings: the choice was taken


@pytest.mark.skipif(not backend.HAS_CUDA or CHOSEN == "emulated", reason="the extension was built without CUDA")
def test_the_library_reaches_the_current_stream():
    """It needs libtorch.so, through which a CUDA build of torch brings libtorch_cuda.so: else the first launch would fail."""
    assert b"\0libtorch.so\0" in Path(importlib.util.find_spec("amtml_fast._C").origin).read_bytes()
