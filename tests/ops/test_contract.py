"""The promises of docs/contract.md that hold for every operator: errors, masks, strides, autograd, compile, memory."""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import CHOSEN, DEVICE, cpu_only, in_memory_of_the_cpu, takes
from test_vocabulary_kernels import Rows, run_one_part
from torch._subclasses.fake_tensor import FakeTensorMode

import amtml_fast as af
from amtml_fast import backend, reference
from amtml_fast.ops import _base as ops
from amtml_fast.ops.angle import angle
from amtml_fast.ops.divergence import ALL_MODES
from amtml_fast.ops.hint import hint_mse, hint_pool
from amtml_fast.ops.multi_teacher_kd import multi_teacher_kd
from amtml_fast.reference import KDOptions
from amtml_fast.testing import CASES, convert, relative_error, tensors, value_and_grads

each_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
FAKED = "test_schema", "test_faketensor"  # of torch.library.opcheck
TRACED = *FAKED, "test_autograd_registration", "test_aot_dispatch_dynamic"


# --- the parts of an operator


@each_case
def test_every_operator_has_all_its_parts(case):
    assert case.op in backend.OPS and hasattr(reference, getattr(case.reference, "func", case.reference).__name__)
    schemas = [name for name in ops.SCHEMAS if name.startswith(case.op)]
    assert any(name.endswith("_fwd") for name in schemas)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in schemas:
        if name not in (
            ops.CPU_ONLY if CHOSEN == "emulated" else ops.GPU_ONLY
        ):  # whose library is that of the CUDA kernels
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


# --- strides, ownership, autograd


@each_case
def test_strides_do_not_matter_and_inputs_are_not_written(case, on):
    args = case.inputs(*case.small)
    want, want_grads = value_and_grads(case.function, args)

    def strided(t):
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), 7, dtype=t.dtype)
        view = wide[..., 1::2]
        return view.copy_(t.detach()).requires_grad_(t.requires_grad)

    views = tuple([strided(x) for x in a] if isinstance(a, list) else strided(a) for a in args)
    before = [t.detach().clone() for t in tensors(views)]
    got, grads = value_and_grads(case.function, views)
    assert relative_error(got, want) <= 1e-6
    assert all(relative_error(g, w) <= 1e-5 for g, w in zip(grads, want_grads))
    assert all(torch.equal(t, b) for t, b in zip(tensors(views), before))


@each_case
def test_expanded_and_transposed_inputs(case, fused):
    args = case.inputs(*case.small)

    def expanded(t):
        return t.detach()[:1].expand(t.shape) if t.is_floating_point() and t.dim() > 1 else t.detach()

    for change in (expanded, lambda t: t.detach().mT.contiguous().mT if t.dim() > 1 else t.detach()):
        same = tuple([change(x) for x in a] if isinstance(a, list) else change(a) for a in args)
        got = case.function(*same)
        want = case.reference(*convert(same, dtype=torch.float64))
        assert relative_error(got, want) <= 1e-6


@each_case
def test_backward_twice_gives_the_same(case, on):
    args = case.inputs(*case.small)
    leaves = [t for t in tensors(args) if t.requires_grad]
    out = case.function(*args).sum()
    first = torch.autograd.grad(out, leaves, torch.tensor(3.0), retain_graph=True)
    second = torch.autograd.grad(out, leaves, torch.tensor(3.0))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@each_case
def test_gradient_exactly_where_it_is_required(case, on):
    args = case.inputs(*case.small)
    _, all_grads = value_and_grads(case.function, args)
    leaves = [t for t in tensors(args) if t.requires_grad]
    for chosen, want in zip(leaves, all_grads):
        for t in leaves:
            t.requires_grad_(t is chosen)
        _, (got,) = value_and_grads(case.function, args)
        assert relative_error(got, want) <= 1e-5
    with torch.no_grad():
        assert not case.function(*args).requires_grad


@each_case
def test_second_derivative_is_right_or_loud(case, fused):
    args = case.inputs(*case.small)
    leaves = [t for t in tensors(args) if t.requires_grad]
    for options in ({}, {"reduction": "none"}) if case.op in ("angle", "multi_teacher_kd") else ({},):
        out = case.function(*args, **options)
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match=r'use_backend\("reference"\)'):
            torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)


@each_case
def test_second_derivative_with_respect_to_one_input_is_loud_too(case, fused):
    """Nothing but that input leads back to it: the gradient of the loss is a constant."""
    args = case.inputs(*case.small)
    leaves = [t for t in tensors(args) if t.requires_grad]
    for chosen in leaves:
        for t in leaves:
            t.requires_grad_(t is chosen)
        (grad,) = torch.autograd.grad(case.function(*args).sum(), chosen, create_graph=True)
        with pytest.raises(RuntimeError, match=r'use_backend\("reference"\)'):
            torch.autograd.grad(grad.square().sum(), chosen)


@each_case
def test_compiles_without_a_graph_break(case, fused):
    torch._dynamo.reset()
    for options in case.variants[
        : 2 if fused == "cpp" else 1
    ]:  # what is traced differs in little but the kernels' names
        args = case.inputs(*case.small)
        want, want_grads = value_and_grads(case.function, args, **options)
        compiled = torch.compile(lambda *a, o=options: case.function(*a, **o), fullgraph=True, backend="aot_eager")
        got, grads = value_and_grads(compiled, args)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(grads, want_grads)
        without = convert(args)
        for t in tensors(without):
            t.requires_grad_(False)
        torch.testing.assert_close(compiled(*without), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kd_compiles_with_any_of_its_arguments_missing(dtype, fused):
    student, teachers, weights, labels = CASES["multi_teacher_kd"].inputs(6, 5, 3, dtype=dtype)
    for learned in ((student, weights), (student.detach(), weights), (student, weights.detach()), (student, None)):
        for y in (None, labels):
            torch._dynamo.reset()
            args = (learned[0], teachers, learned[1], y)
            compiled = torch.compile(af.multi_teacher_kd_loss, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(value_and_grads(compiled, args), value_and_grads(af.multi_teacher_kd_loss, args))


def test_a_schedule_of_the_temperature_compiles(fused):
    torch._dynamo.reset()
    compiled = torch.compile(af.multi_teacher_kd_loss, fullgraph=True, backend="aot_eager")
    student, teachers, weights, labels = CASES["multi_teacher_kd"].inputs(6, 5, 3)
    for temperature in (1.0, 2.0, 3.0, 4.5):
        options = dict(temperature=temperature, alpha=temperature / 5)
        got = compiled(student, teachers, weights, labels, **options)
        torch.testing.assert_close(got, af.multi_teacher_kd_loss(student, teachers, weights, labels, **options))


def test_teachers_from_inference_mode(on):
    with torch.inference_mode():
        teachers = [torch.randn(6, 5) for _ in range(2)]
        features = torch.randn(6, 4, 3, 3)
    for dtype in (torch.float32, torch.bfloat16):
        student = torch.randn(6, 5, dtype=dtype, requires_grad=True)
        af.multi_teacher_kd_loss(student, teachers, None).backward()
        af.angle_loss(student, teachers[0]).backward()
        assert student.grad.isfinite().all()
    weight = torch.randn(4, 4, requires_grad=True)
    af.hint_loss(torch.randn(6, 4, 3, 3), features, weight).backward()
    assert weight.grad.isfinite().all()


@each_case
def test_same_bits_twice(case, fused):
    size = case.parallel if fused == "cpp" or CHOSEN == "gpu" else case.small  # an interpreter's time
    runs = [value_and_grads(case.function, case.inputs(*size)) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1]))


def _all_of_hint(student_map, teacher_map, weight):
    pooled = [hint_pool("cpp", m, 20, 20, True) for m in (student_map, teacher_map)]
    return hint_mse(*pooled) + af.hint_loss(student_map, teacher_map, weight)


@cpu_only
@each_case
def test_same_bits_from_one_thread_and_from_several(case):
    """Work is cut the same way however many threads share it."""
    function = case.function if case.op != "hint" else _all_of_hint
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with af.use_backend("cpp"):
                runs.append(value_and_grads(function, case.inputs(*case.parallel)))
    finally:
        torch.set_num_threads(threads)
    for value, grads in runs[1:]:
        assert torch.equal(value, runs[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, runs[0][1]))


@pytest.mark.parametrize("ratio", [60, 70, 1e4], ids=["fixed point", "past it", "far past it"])
def test_angle_of_distances_that_differ_is_as_good_as_float64(ratio, fused):
    """Up to a ratio of 64 of the squared distances sums are made in 32-bit fixed point, beyond it in float64."""
    n = 90 if fused == "cpp" or CHOSEN == "gpu" else 40  # an interpreter's time
    student = torch.eye(n, dtype=torch.float64) + 1e-3 * torch.randn(n, n, dtype=torch.float64)  # all distances 2^1/2
    student[0] = torch.eye(n, dtype=torch.float64)[0] * (2 * ratio - 1) ** 0.5  # but those to one row far away
    squared = torch.pdist(student).square()
    assert (squared.max() / squared.min()).item() == pytest.approx(ratio, rel=0.05)
    sides = student.float().requires_grad_(), torch.randn(n, 7, requires_grad=True)
    want, want_grads = value_and_grads(reference.angle_loss, convert(sides, dtype=torch.float64))
    got, grads = value_and_grads(af.angle_loss, sides)
    assert relative_error(got, want) <= 1e-6
    assert all(relative_error(g, w) <= 1e-6 for g, w in zip(grads, want_grads))


def _near_and_far(kind, generator):
    """Rows of which some are up to 1e15 times closer to each other than to the rest."""
    rows = torch.randn(24, 10, dtype=torch.float64, device="cpu", generator=generator)
    if kind == "sure":  # what a sure teacher says: rows of a class 1e-4 to 1e-12 apart
        rows = (25 * rows).softmax(1)
    elif kind == "three sizes":
        rows[:6] *= 1e-6
        rows[:3] *= 1e-4
    else:  # features after a ReLU, two rows of which are all but dead
        rows = float(kind) * rows.relu()
        rows[:2] = 0
        rows[0, 4], rows[1, 3] = 2e-10, 1e-10
    return rows.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["sure", "three sizes", "1", "1e3", "1e5"])
def test_angle_between_arms_of_very_different_length(kind, dtype, fused):
    """Three squared distances then leave a small part of each: within 1e-6, or twice the error of plain float32."""
    if not takes(fused, dtype):
        pytest.skip("takes no float64")
    generator = torch.Generator("cpu").manual_seed(36)
    sides = tuple(_near_and_far(kind, generator).to(dtype).requires_grad_() for _ in range(2))
    want, want_grads = value_and_grads(reference.angle_loss, convert(sides, dtype=torch.float64))
    _, plain = value_and_grads(reference.angle_loss, sides)
    got, grads = value_and_grads(af.angle_loss, sides)
    exact = dtype == torch.float64
    assert relative_error(got, want) <= (1e-12 if exact else 1e-6)
    for g, p, w in zip(grads, plain, want_grads):
        g, p, w = (x.double() / w.norm() for x in (g, p, w))  # a small gradient is no rounding here
        assert relative_error(g, w) <= max(1e-10 if exact else 1e-6, 2 * relative_error(p, w))


def test_mixed_dtypes_and_autocast(on):
    student, teachers, weights, labels = CASES["multi_teacher_kd"].inputs(6, 5, 3)
    third = teachers[2].double() if takes(on, torch.float64) else teachers[2]
    narrow = [teachers[0].bfloat16(), teachers[1].half(), third]
    want, want_grads = value_and_grads(af.reference.multi_teacher_kd_loss, (student, narrow, weights, labels))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got, grads = value_and_grads(af.multi_teacher_kd_loss, (student, narrow, weights, labels))
        angle = af.angle_loss(student.detach().softmax(1), teachers[0].softmax(1))
    assert relative_error(got, want) <= 1e-6
    assert all(relative_error(g, w) <= 1e-5 for g, w in zip(grads, want_grads))
    exact = af.reference.angle_loss(student.detach().double().softmax(1), teachers[0].double().softmax(1))
    assert relative_error(angle, exact) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_inside_a_checkpoint(dtype, fused):
    """A checkpoint gives each saved tensor only once."""
    student, teachers, weights, labels = CASES["multi_teacher_kd"].inputs(6, 5, 2, dtype=dtype)

    def loss():
        return 0.3 * af.multi_teacher_kd_loss(student, teachers, weights, labels)

    want = torch.autograd.grad(loss(), (student, weights))
    # (The emulated device has no index after a recomputation.)
    whole = torch.utils.checkpoint.checkpoint(loss, use_reentrant=False, determinism_check="none")
    got = torch.autograd.grad(whole, (student, weights))
    assert all(torch.equal(x, y) for x, y in zip(got, want))


def test_16_bit_gradients_do_not_underflow_under_a_loss_scale(fused):
    """Most elements of this gradient are below half's smallest number until the scale is applied."""
    student = torch.zeros(1, 60000, dtype=torch.half, requires_grad=True)
    teacher = torch.zeros(1, 60000, dtype=torch.half)
    teacher[0, 0] = 5
    scale = 2.0**22
    (grad,) = torch.autograd.grad(scale * af.multi_teacher_kd_loss(student, [teacher], None), student)
    exact = (teacher.double() / 4).softmax(1)
    want = scale * 4 * (1 / 60000 - exact)
    assert (want[0, 1:] / scale).abs().max() < 5e-8  # it would underflow
    torch.testing.assert_close(grad[0, 1:].double(), want[0, 1:], rtol=1e-2, atol=0)


@pytest.mark.parametrize("size", [(9, 1040, 3), (6, 5, 2)])
@pytest.mark.parametrize("kept", [False, True], ids=["freed", "kept"])
def test_bfloat16_gradients_are_rounded_once(size, kept, fused):
    """Whatever comes back to the loss, and whether forward has made them or backward does."""
    case = CASES["multi_teacher_kd"]
    student, teachers, weights, labels = case.inputs(*size, dtype=torch.bfloat16)
    args = student, teachers, weights.detach().float().requires_grad_(), labels
    exact, scales = convert(args, dtype=torch.float64), torch.tensor([1.0, 0.25, -8.0, 3.0, 0.0, 1e-3, 2.0**20])
    for reduction, upstream in [("batchmean", g) for g in scales] + [("none", scales[torch.arange(size[0]) % 7])]:
        loss = af.multi_teacher_kd_loss(*args, reduction=reduction)
        grads = torch.autograd.grad(loss, (args[0], args[2]), upstream, retain_graph=kept)
        again = torch.autograd.grad(loss, (args[0], args[2]), upstream) if kept else grads
        want = torch.autograd.grad(
            af.reference.multi_teacher_kd_loss(*exact, reduction=reduction), (exact[0], exact[2]), upstream.double()
        )
        assert all(map(torch.equal, grads, again)) and relative_error(grads[1], want[1]) <= 1e-5
        error, most = (grads[0].double() - want[0]).abs(), want[0].abs().max()
        assert (error <= 1.01 * 2**-8 * want[0].abs() + 1e-6 * most).all(), (reduction, upstream)


def _odd_rows(student, teachers):
    """Rows with numbers that need care, a kind each."""
    least = torch.finfo(student.dtype).min
    student[0, 3:500] = teachers[0][0, 3:500] = teachers[1][0, 3:500] = -torch.inf  # masked everywhere
    student[1, :2] = -torch.inf  # by the student alone: an infinite loss
    student[2, 5] = torch.nan
    student[3, 7] = torch.inf
    teachers[0][4, 900] = torch.nan
    student[5] = teachers[1][5] = -torch.inf  # no class has a probability
    student[6, :600] = teachers[0][6, :600] = teachers[1][6, :600] = least  # masked by the least number
    student[7] = least
    teachers[0][8] = 0.9 * -least
    student[9] += 20000
    teachers[0][10] *= 40  # most probabilities underflow
    teachers[1][10] *= 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("labeled", [False, True])
@pytest.mark.parametrize("classes", [1040, 1041])
@pytest.mark.parametrize(
    "long",
    [False, pytest.param(True, marks=pytest.mark.skipif(CHOSEN != "triton", reason="Triton reads such in chunks"))],
)
def test_odd_numbers_stay_in_their_rows(long, classes, labeled, dtype, fused, monkeypatch):
    if long:
        monkeypatch.setattr("amtml_fast.kernels.multi_teacher_kd.HELD_BYTES", 0)
        monkeypatch.setattr("amtml_fast.kernels.multi_teacher_kd.LONG_WARPS", 2)  # several chunks to a row, and a rest
    student, teachers, weights, labels = CASES["multi_teacher_kd"].inputs(12, classes, 2, dtype=dtype)
    with torch.no_grad():
        _odd_rows(student, teachers)
    weights = weights.detach().float().requires_grad_()
    labels = labels.clamp(min=0) if labeled else None
    for temperature in (1.0, 4.0):
        args, options = (student, teachers, weights, labels), {"reduction": "none", "temperature": temperature}
        got, grads = value_and_grads(af.multi_teacher_kd_loss, args, **options)
        want, wanted = value_and_grads(
            af.reference.multi_teacher_kd_loss, convert(args, dtype=torch.float64), **options
        )
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(grads[1].double(), wanted[1], rtol=2e-5, atol=1e-5, equal_nan=True)
        near = {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
        torch.testing.assert_close(grads[0].double(), wanted[0], **near, equal_nan=True)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_probabilities_are_right_to_rounding(temperature, fused):
    """Against a point mass in class 0 the gradient of the others is the probabilities of one side alone."""
    x = torch.rand(64, 1000)
    options = {"temperature": temperature, "reduction": "sum", "t2_scale": False}
    first = torch.arange(1000) == 0
    at_first = torch.where(first, 0.0, -torch.inf).expand(64, -1)
    losses = {
        "student": lambda z: af.multi_teacher_kd_loss(z, [at_first], None, **options),
        "student, topk": lambda z: af.topk_kd_loss(
            z, [torch.zeros(64, 1, dtype=torch.long)], [torch.zeros(64, 1)], None, **options
        ),
        "teacher": lambda z: -af.multi_teacher_kd_loss(z + 1000.0 * first, [x], None, **options),
    }
    want = (x.double() / temperature).softmax(-1)
    for side, loss in losses.items():
        z = torch.zeros_like(x) if side == "teacher" else x.clone()
        (grad,) = torch.autograd.grad(loss(z.requires_grad_()), z)
        assert relative_error(grad[:, 1:] * temperature, want[:, 1:]) <= 2.5e-7, side


@in_memory_of_the_cpu
def test_two_rows_past_2_31_elements(fused):
    stride = 2**31 + 64
    storage = torch.UntypedStorage(4 * (stride + 8), device="cpu")  # untouched pages cost nothing
    rows = torch.empty(0).set_(storage, 0, (2, 8), (stride, 1))
    rows.copy_(torch.randn(2, 8))
    want = af.multi_teacher_kd_loss(rows.contiguous(), [rows.flip(0)], None, reduction="none")
    torch.testing.assert_close(af.multi_teacher_kd_loss(rows, [rows.flip(0)], None, reduction="none"), want)
    torch.testing.assert_close(
        af.multi_teacher_kd_loss(rows.flip(0), [rows], None, reduction="none"), want.flip(0), rtol=1, atol=1
    )
    torch.testing.assert_close(af.angle_loss(rows, rows.flip(0)), torch.tensor(0.0))


# --- values that bite


def _kd(*args, **options):
    return value_and_grads(af.multi_teacher_kd_loss, args, **options)


@pytest.mark.parametrize("depth", [-86.0, -90.0, -100.0, -103.0, -104.0, -106.0])
def test_probabilities_down_to_the_smallest_float32(on, depth):
    """Below exp(-87) a float32 is subnormal, below exp(-103.3) it is 0. A teacher without weight meets the logarithm of such a
    probability in the gradient of its weight; a masked student makes the loss infinite as long as there is one."""
    low = torch.tensor([[0.0, depth]])
    weights = torch.tensor([[1.0, 0.0]], requires_grad=True)
    args = (torch.zeros(1, 2), [low, low.flip(1)], weights)
    _, (grad,) = _kd(*args, temperature=1.0)
    exact = value_and_grads(reference.multi_teacher_kd_loss, convert(args, dtype=torch.float64), temperature=1.0)[1][0]
    if depth > -103:  # the last bit of a subnormal number is a large part of it
        assert relative_error(grad[:, 1], exact[:, 1]) <= (1e-6 if depth > -87 else 2e-3)
    masked = torch.tensor([[0.0, -torch.inf]])
    for mode in ("mixture", "sum"):
        loss = af.multi_teacher_kd_loss(masked, [low], None, temperature=1.0, mode=mode)
        assert loss == torch.inf if depth > -103 else not loss.isnan()


def test_masked_classes_have_probability_0_and_gradient_0(on):
    student, teachers, weights, labels = CASES["multi_teacher_kd"].inputs(6, 5, 2)
    student, teachers = student.detach(), list(teachers)
    student[:, 4] = -torch.inf
    for t in teachers:
        t[:, 4] = -torch.inf
    labels = labels.clamp(max=3)
    keep = slice(0, 4)
    for mode in ("mixture", "sum"):
        got = _kd(student.clone().requires_grad_(), teachers, weights, labels, mode=mode)
        want = _kd(
            student[:, keep].clone().requires_grad_(), [t[:, keep] for t in teachers], weights, labels, mode=mode
        )
        torch.testing.assert_close(got[0], want[0])
        torch.testing.assert_close(got[1][0][:, keep], want[1][0])
        torch.testing.assert_close(got[1][1], want[1][1])
        assert (got[1][0][:, 4] == 0).all()


def test_mass_on_a_masked_student_class_is_infinite_with_finite_gradient(on):
    student = torch.randn(3, 5)
    student[1, 2] = -torch.inf
    student.requires_grad_()
    for mode in ("mixture", "sum"):
        loss, (grad,) = _kd(student, [torch.randn(3, 5)], None, None, mode=mode, reduction="none")
        assert loss.isinf().tolist() == [False, True, False]
        assert grad.isfinite().all() and grad[1, 2] == 0
    loss, (grad,) = _kd(
        student,
        [torch.zeros(3, 5)],
        None,
        torch.zeros(3, dtype=torch.long),
        alpha=0.0,
        label_smoothing=0.1,
        reduction="none",
    )
    assert loss.isinf().tolist() == [False, True, False] and grad.isfinite().all() and grad[1, 2] == 0


def test_nan_stays_in_its_row(on):
    for bad in (torch.nan, -torch.inf):  # a whole row of -inf has no softmax: NaN
        student, teachers, weights, _ = CASES["multi_teacher_kd"].inputs(6, 5, 2)
        clean, clean_grads = _kd(student, teachers, weights, reduction="none")
        for spoil in (student.detach().clone(), teachers[1].clone()):
            given = [student.detach().clone(), [t.clone() for t in teachers], weights]
            spoiled = spoil
            spoiled[2] = bad
            if torch.equal(spoiled[:2], student.detach()[:2]):
                given[0] = spoiled
            else:
                given[1][1] = spoiled
            given[0].requires_grad_()
            loss, grads = _kd(*given, reduction="none")
            others = [0, 1, 3, 4, 5]
            assert loss[2].isnan()
            torch.testing.assert_close(loss[others], clean[others])
            for got, want in zip(grads, clean_grads):
                torch.testing.assert_close(got[others], want[others])


def test_nan_in_a_map_stays_in_its_example(on):
    for side, bad in ((0, torch.nan), (1, torch.nan), (0, torch.inf)):
        args = CASES["hint"].inputs(20, 3, 4, 5, 2)  # two blocks of pixels for the CPU's kernels, the second is short
        _, (clean, *_) = value_and_grads(af.hint_loss, args)
        with torch.no_grad():
            args[side][2, 1] = bad
        loss, (grad, *_) = value_and_grads(af.hint_loss, args)
        others = [i for i in range(20) if i != 2]
        assert not loss.isfinite() and not grad[2].isfinite().all()
        torch.testing.assert_close(grad[others], clean[others])


@pytest.mark.parametrize("mode", ["mixture", "sum"])
@pytest.mark.parametrize("classes", [10, 100, 1030])
def test_one_nan_among_numbers_makes_the_row_nan(classes, mode, on):
    student, teachers, weights, labels = CASES["multi_teacher_kd"].inputs(3, classes, 2)
    labels = labels.clamp(min=0)
    for at in (0, 3, classes - 1):
        for alpha in (0.0, 0.5):
            spoiled = student.detach().clone()
            spoiled[1, at] = torch.nan
            loss, (grad, _) = _kd(
                spoiled.requires_grad_(), teachers, weights, labels, alpha=alpha, mode=mode, reduction="none"
            )
            assert loss[1].isnan() and grad[1].isnan().all() and loss[[0, 2]].isfinite().all()
            assert grad[[0, 2]].isfinite().all()
        spoiled = teachers[1].clone()
        spoiled[1, at] = torch.nan
        loss, _ = _kd(student, [teachers[0], spoiled], weights, labels, mode=mode, reduction="none")
        assert loss.isnan().tolist() == [False, True, False]
        only = torch.tensor([[1.0, 0.0]] * 3)
        got = _kd(student, [teachers[0], spoiled], only, labels, mode=mode)
        torch.testing.assert_close(got, _kd(student, teachers[:1], None, labels, mode=mode))


def test_what_comes_back_may_start_at_any_address(on):
    """A view into a larger tensor, one element on: no reason for a wide load to fail."""
    student, teachers, weights, labels = CASES["multi_teacher_kd"].inputs(4, 100, 2)

    def grads(shift):
        terms = multi_teacher_kd(
            student, teachers, weights, labels, KDOptions(2.0, 0.7, "mixture", "batchmean", True, -100, 0.0)
        )
        outputs = terms.loss, terms.student_probs, terms.soft_targets
        back = [torch.ones_like(terms.loss)]
        for out in outputs[1:]:
            whole = torch.linspace(-1, 1, out.numel(), device=out.device)
            back.append(torch.cat([whole.new_zeros(shift), whole])[shift:].view_as(out))
        return torch.autograd.grad(outputs, (student, weights), back)

    torch.testing.assert_close(grads(1), grads(0))


@pytest.mark.skipif(not backend.HAS_CUDA or CHOSEN == "emulated", reason="the extension was built without CUDA")
def test_the_library_reaches_the_current_stream():
    """It needs libtorch.so, through which a CUDA build of torch brings libtorch_cuda.so: else the first launch would fail."""
    assert b"\0libtorch.so\0" in Path(importlib.util.find_spec("amtml_fast._C").origin).read_bytes()


def test_ignored_rows_give_0_whatever_they_hold(on):
    student, teachers, weights, labels = CASES["multi_teacher_kd"].inputs(6, 5, 2)
    used = labels != -100
    student = student.detach()
    student[~used] = torch.nan
    teachers[0][~used] = torch.nan
    student.requires_grad_()
    for reduction in ("none", "mean", "batchmean", "sum"):
        got, grads = _kd(student, teachers, weights, labels, reduction=reduction)
        dropped = student.detach()[used].requires_grad_(), [t[used] for t in teachers]
        want, want_grads = _kd(*dropped, weights.detach()[used].requires_grad_(), labels[used], reduction=reduction)
        if reduction == "none":
            assert (got[~used] == 0).all()
        else:
            torch.testing.assert_close(got, want)
            for g, w in zip(grads, want_grads):
                torch.testing.assert_close(g[used], w)
        assert all((g[~used] == 0).all() for g in grads)
    everything = _kd(student, teachers, weights, torch.full_like(labels, -100))
    assert everything[0] == 0 and all((g == 0).all() for g in everything[1])


def test_a_teacher_of_weight_0_counts_nothing(on):
    student, teachers, _, labels = CASES["multi_teacher_kd"].inputs(6, 5, 2)
    for mode in ("mixture", "sum"):
        want = _kd(student, teachers[:1], None, labels, mode=mode)
        got = _kd(
            student, [teachers[0], torch.full_like(teachers[1], torch.nan)], torch.tensor([1.0, 0.0]), labels, mode=mode
        )
        torch.testing.assert_close(got, want)


def test_a_teacher_without_a_softmax_is_no_matter_where_the_kl_has_no_weight(on):
    student, teachers, weights, labels = CASES["multi_teacher_kd"].inputs(6, 5, 2)
    teachers[0][0] = -torch.inf
    loss, grads = _kd(student, teachers, weights, labels, alpha=0.0)
    assert loss.isfinite() and grads[0].isfinite().all()


@pytest.mark.parametrize("tau", [0.01, 1.0, 100.0])
def test_extreme_logits_and_temperatures(on, tau):
    student = (torch.randn(8, 50) * 1e4).requires_grad_()
    teachers = [torch.randn(8, 50) * 1e4, torch.randn(8, 50)]
    args = (student, teachers, None, torch.arange(8))
    got, grads = _kd(*args, temperature=tau)
    want, want_grads = value_and_grads(
        reference.multi_teacher_kd_loss, convert(args, dtype=torch.float64), temperature=tau
    )
    assert relative_error(got, want) <= 1e-6 and relative_error(grads[0], want_grads[0]) <= 1e-5


@pytest.mark.parametrize("depth", [200.0, 1e4, float("inf")])
@pytest.mark.parametrize("op", ["multi_teacher_kd", "topk_kd"])
def test_weights_have_a_finite_gradient_where_all_teachers_underflow_to_0(op, depth, on):
    case = CASES[op]
    student, *teachers, weights, labels = case.inputs(*case.small, seed=3)
    spread = 2 if op == "multi_teacher_kd" else 1
    for one in teachers[-1]:  # logits or log-probabilities of the first class; the student is sure of it
        one[:, 0] -= spread * depth
    student.data[:, 0] += 20
    for options in ({"temperature": 1.0}, {"temperature": 1.0, "reduction": "none"}):
        args = student, *teachers, weights, labels
        got, grads = value_and_grads(case.function, args, **options)
        with af.use_backend("reference"):
            want, wanted = value_and_grads(case.reference, convert(args, dtype=torch.float64), **options)
        assert all(g.isfinite().all() for g in grads)
        for a, b in zip([got, *grads], [want, *wanted]):
            torch.testing.assert_close(a, b.float(), rtol=2e-5, atol=2e-6)


def test_kl_is_0_where_the_student_is_the_teacher_and_never_negative(on):
    student = torch.randn(64, 1000, requires_grad=True)
    for mode in ("mixture", "sum"):
        loss, (grad,) = _kd(student, [student.detach()] * 3, torch.full((3,), 1 / 3), mode=mode, reduction="none")
        assert loss.abs().max() < 1e-5 and grad.abs().max() < 1e-6
    close = [student.detach() + 1e-4 * torch.randn(64, 1000)]
    assert af.multi_teacher_kd_loss(student, close, None, reduction="none").min() > -1e-5


def test_degenerate_pairs_of_the_angle_loss(on):
    """Equal rows: psi is 0 with gradient 0, and 1 against 0 at i = k where only one side is degenerate."""
    student = torch.randn(5, 3)
    student[1] = student[0]
    student.requires_grad_()
    teacher = torch.randn(5, 3)
    loss, (grad,) = value_and_grads(af.angle_loss, (student, teacher), torch.tensor(1.0), reduction="sum")
    x, y = student.detach().double(), teacher.double()
    total = 0.0
    for j in range(5):
        for i in range(5):
            for k in range(5):
                psi = []
                for r in (x, y):
                    a, b = r[i] - r[j], r[k] - r[j]
                    psi.append(float(a @ b / (a.norm() * b.norm())) if a.norm() > 0 and b.norm() > 0 else 0.0)
                d = abs(psi[0] - psi[1])
                total += d * d / 2 if d <= 1 else d - 0.5
    assert loss.item() == pytest.approx(total, rel=1e-6)
    assert grad.isfinite().all()
    nan = student.detach().clone()
    nan[0, 0] = torch.nan
    assert af.angle_loss(nan, teacher).isnan()


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
@pytest.mark.parametrize(
    ("loss", "reduction"),
    [(af.angle_loss, "mean"), (af.angle_loss, "none"), (af.rkd_distance_loss, "mean")],
    ids=["angle", "angle of vertices", "distance"],
)
def test_a_row_that_is_not_finite_is_no_degenerate_one(loss, reduction, side, value, on):
    rows = [torch.randn(20, 5) for _ in range(2)]
    rows[side][3, 2] = value
    for x in rows:
        x.requires_grad_()
    out, grads = value_and_grads(loss, rows, reduction=reduction)
    assert out.isnan().all() and grads[side].isnan().all()


def test_distinct_without_three_rows_is_0(on):
    for n in (0, 1, 2):
        assert af.angle_loss(torch.ones(n, 3), torch.eye(3)[:n], reduction="distinct") == 0


@cpu_only
@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_shifting_all_rows_leaves_the_angle_loss_alone(name):
    student, teacher = (x.detach().double() for x in CASES["angle"].inputs(20, 5))
    with af.use_backend(name):
        want = af.angle_loss(student, teacher)
        torch.testing.assert_close(af.angle_loss(student * 3 + 7, teacher - 2), want, rtol=1e-9, atol=0)


def test_angle_of_masked_rows_is_that_of_the_others(on):
    student, teacher = CASES["angle"].inputs(9, 4)
    mask = torch.tensor([True, False, True, True, True, False, True, True, True])
    for reduction in ("mean", "sum"):
        got, grads = value_and_grads(
            lambda s, t, reduction=reduction: angle(s, t, mask, delta=1.0, reduction=reduction),
            (student, teacher),
        )
        want, want_grads = value_and_grads(af.angle_loss, (student, teacher), reduction=reduction)
        rows = tuple(x.detach()[mask].requires_grad_() for x in (student, teacher))
        want, want_grads = value_and_grads(af.angle_loss, rows, reduction=reduction)
        torch.testing.assert_close(got, want)
        for g, w in zip(grads, want_grads):
            torch.testing.assert_close(g[mask], w)
            assert (g[~mask] == 0).all()


@cpu_only
@pytest.mark.slow
def test_angle_memory_is_quadratic_and_small():
    """Peak memory of a child process over what it had before: a quarter of the gigabyte promised at 4096 rows."""
    code = """
import resource, torch, amtml_fast as af
s = torch.randn(2048, 100).softmax(1).requires_grad_()
t = torch.randn(2048, 100).softmax(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
af.angle_loss(s, t).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""
    gigabytes = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert gigabytes < 0.25, gigabytes


# --- the other spellings of the arguments


def test_three_dimensional_logits_are_rows(on):
    student, teachers, weights, labels = CASES["multi_teacher_kd"].inputs(6, 5, 2)
    args = (student, torch.stack(teachers), weights, labels)
    want, want_grads = value_and_grads(af.multi_teacher_kd_loss, args, torch.ones(6), reduction="none")
    for w in (weights.detach(), weights.detach().view(2, 3, 2)):
        cube = (student.detach().view(2, 3, 5).requires_grad_(), [t.view(2, 3, 5) for t in teachers])
        got, grads = value_and_grads(
            af.multi_teacher_kd_loss, (*cube, w.requires_grad_(), labels.view(2, 3)), torch.ones(2, 3), reduction="none"
        )
        torch.testing.assert_close(got, want.view(2, 3))
        torch.testing.assert_close(grads[0].view(6, 5), want_grads[0])
        torch.testing.assert_close(grads[1].view(6, 2), want_grads[1])


def test_one_weight_a_teacher_or_none(on):
    student, teachers, _, labels = CASES["multi_teacher_kd"].inputs(6, 5, 2)
    even = torch.tensor([0.5, 0.5], requires_grad=True)
    torch.testing.assert_close(
        af.multi_teacher_kd_loss(student, teachers, even, labels),
        af.multi_teacher_kd_loss(student, teachers, None, labels),
    )
    _, grads = _kd(student, teachers, even, labels)
    _, rows = _kd(student, teachers, even.detach().expand(6, 2).clone().requires_grad_(), labels)
    torch.testing.assert_close(grads[1], rows[1].sum(0))


@pytest.mark.parametrize("items", [10, torch.tensor(10)])
def test_num_items_in_batch_is_the_denominator(on, items):
    student, teachers, weights, labels = CASES["multi_teacher_kd"].inputs(6, 5, 2)
    total = af.multi_teacher_kd_loss(student, teachers, weights, labels, reduction="sum")
    got = af.multi_teacher_kd_loss(student, teachers, weights, labels, num_items_in_batch=items)
    torch.testing.assert_close(got, total / 10)


def test_mean_is_what_torch_computes(on):
    student, teachers, _, labels = CASES["multi_teacher_kd"].inputs(6, 5, 1)
    labels = labels.clamp(min=0)
    kl = torch.nn.functional.kl_div((student / 4).log_softmax(1), (teachers[0] / 4).softmax(1), reduction="mean")
    ce = torch.nn.functional.cross_entropy(student, labels, label_smoothing=0.1)
    got = af.multi_teacher_kd_loss(student, teachers, None, labels, reduction="mean", label_smoothing=0.1)
    torch.testing.assert_close(got, 0.3 * ce + 0.7 * 16 * kl)


# --- errors

Z, T2, W = torch.zeros(4, 5), [torch.zeros(4, 5)] * 2, torch.full((4, 2), 0.5)
Y = torch.zeros(4, dtype=torch.long)
F4, TH, V = torch.zeros(4, 3, 2, 2), torch.zeros(2, 3), torch.zeros(3)
M = torch.zeros(4, 3, 2, 2)
# fmt: off
BAD = [  # one call a line

    (lambda: af.multi_teacher_kd_loss(Z, [Z, torch.zeros(4, 6)], W), r"teacher_logits\[1\] must be \[4, 5\] like student_logits, got \[4, 6\]"),
    (lambda: af.multi_teacher_kd_loss(Z, [], W), "at least one teacher"),
    (lambda: af.multi_teacher_kd_loss(Z, Z, W), "teacher_logits must be a list"),
    (lambda: af.multi_teacher_kd_loss(Z, 3, W), "teacher_logits must be a list"),
    (lambda: af.multi_teacher_kd_loss(Z[0], T2, W), r"student_logits must be \[N, C\]"),
    (lambda: af.multi_teacher_kd_loss(Z[:, :0], T2, W), "C >= 1"),
    (lambda: af.multi_teacher_kd_loss(Z.long(), T2, W), "student_logits must be float32"),
    (lambda: af.multi_teacher_kd_loss(Z, [Z.clone().requires_grad_(), Z], W), "teachers are frozen"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W[:, :1]), r"teacher_weights must be \[2\] or \[4, 2\] for 2 teachers, got \[4, 1\]"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, -W), "finite and not negative"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W * torch.nan), "finite and not negative"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, Y.float()), "labels must be an int64"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, Y[:3]), r"labels must be \[4\]"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, Y + 5), r"labels\[0\] must be in \[0, 5\) or ignore_index -100, got 5"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, Y - 1), r"labels\[0\] must be in \[0, 5\)"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, temperature=0), "temperature must be a number"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, temperature=float("nan")), "temperature must be a number"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, alpha=1.5), "alpha must be a number"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, mode="both"), "mode must be one of mixture, sum"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, reduction="avg"), "reduction must be one of none"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, label_smoothing=-0.1), "label_smoothing must be a number"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, reduction="sum", num_items_in_batch=3), "num_items_in_batch must be None"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, num_items_in_batch=0), "num_items_in_batch must be positive without labels, got 0"),
    (lambda: af.multi_teacher_kd_loss(Z.to("meta"), T2, W), "must be on meta like student_logits, got cpu"),
    (lambda: af.teacher_weights(F4[0], TH, V), r"features must be \[N, d, H, W\] or \[N, d\]"),
    (lambda: af.teacher_weights(F4, TH[:, :2], V), r"theta must be \[T, 3\]"),
    (lambda: af.teacher_weights(F4, TH, V[:2]), r"v must be \[3\]"),
    (lambda: af.teacher_weights(F4, TH, V, pool="mean"), "pool must be one of max, avg"),
    (lambda: af.teacher_weights(F4[:, :, :0], TH, V), "at least one pixel"),
    (lambda: af.angle_loss(Z, Z[:3]), r"teacher must be \[4, C\]"),
    (lambda: af.angle_loss(Z[0], Z), r"student must be \[N, C\]"),
    (lambda: af.angle_loss(Z, Z, delta=0), "delta must be a number"),
    (lambda: af.angle_loss(Z, Z, eps=-1), "eps must be a number"),
    (lambda: af.angle_loss(Z, Z, reduction="batchmean"), "reduction must be one of mean"),
    (lambda: af.hint_loss(M, M[:3], torch.zeros(3, 3)), "teacher_map must have 4 examples"),
    (lambda: af.hint_loss(M, M[:, :2], torch.zeros(3, 2)), r"weight must be \[2, 3\]"),
    (lambda: af.hint_loss(M[0], M, torch.zeros(3, 3)), r"student_map must be \[N, c, h, w\]"),
    (lambda: af.dual_softmax(Z[0]), "at least 2 dimensions"),
    (lambda: af.dual_softmax(Z, 0, -2), "dim1 and dim2 must differ"),
    (lambda: af.dual_softmax(Z, 0, 2), "dim2 must be in"),
    (lambda: af.dual_softmax(Z, mode="sum"), "mode must be one of sequential"),
    (lambda: af.use_backend("fast").__enter__(), "backend must be one of auto"),
    (lambda: af.dual_softmax([1.0]), "scores must be a tensor, got list"),
]
# fmt: on


@pytest.mark.skipif(CHOSEN == "gpu", reason="the same checks, on tensors of the CPU")
@pytest.mark.parametrize(("call", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(on, call, message):
    with pytest.raises((ValueError, TypeError, RuntimeError, IndexError), match=message):
        call()


@cpu_only
def test_compiled_code_still_refuses_wrong_values():
    """Checks of values cannot be traced, so the kernel itself looks before it reads."""
    torch._dynamo.reset()
    compiled = torch.compile(af.multi_teacher_kd_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"labels\[0\] must be in \[0, 5\)"):
        compiled(Z, T2, W, Y + 5)
    for wrong in (-W, W * torch.nan, W * torch.inf):
        with pytest.raises(RuntimeError, match="teacher_weights must be finite and not negative"):
            compiled(Z, T2, wrong, Y)


# --- backends


def test_backends_tell_why_not():
    rows = {(r.op, r.backend): r for r in af.backends()}
    assert set(rows) == {(op, b) for op in backend.OPS for b in backend.BACKENDS[1:]}
    assert all(r.available != bool(r.why_not) for r in rows.values())
    assert all(rows[op, "reference"].available for op in backend.OPS)
    assert CHOSEN or all(rows[op, "cpp"].available for op in backend.OPS)


def test_auto_goes_by_operator_and_size():
    """The first line of the table that fits; the table is complete."""
    table = [backend.Choice("cpu", "angle", 6, ("triton",)), *backend.AUTO]
    small, large = torch.empty(1, 5, device="cpu"), torch.empty(2, 3, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "AUTO", tuple(table))
        assert backend.order("angle", large) == ("triton",) and backend.order("angle", small) == ("cpp",)
        assert backend.order("distance", large) == ("cpp",)
        assert backend.order("angle", torch.empty(6, device="meta")) == ()
    for choice in backend.AUTO:
        assert choice.op in (None, *backend.OPS) and set(choice.backends) < set(backend.BACKENDS[1:])
        assert choice.numbers == 0 or choice.op
    everything = [c.device_type for c in backend.AUTO if c.op is None]
    assert sorted(everything) == ["cpu", "cuda", "xpu"]


@pytest.mark.parametrize(
    "capability, code, reasons",
    [
        ((9, 0), 90, {"cuda": None, "triton": None}),
        ((7, 5), 0, {"cuda": "no CUDA kernels for compute capability 7.5; .* 8.0 or later", "triton": None}),
        ((12, 0), 0, {"cuda": "no CUDA kernels for compute capability 12.0; .* 12.0", "triton": None}),
        ((6, 1), 0, {"cuda": "no CUDA kernels for", "triton": "needs compute capability 7.0 or later, got 6.1"}),
    ],
    ids=lambda x: str(x) if isinstance(x, tuple) else None,
)
def test_a_gpu_without_code_in_the_library_falls_to_triton_and_then_to_the_reference(
    monkeypatch, capability, code, reasons
):
    with FakeTensorMode():
        rows = torch.empty(3, 4, device="cuda")  # while there is none: a build of torch for CUDA would ask its driver
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.ops.amtml, "cuda_code", lambda device: code, raising=False)
    monkeypatch.setattr(backend, "HAS_EXTENSION", True)
    monkeypatch.setattr(backend, "HAS_CUDA", True)
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    monkeypatch.setattr(backend, "DEVICES", {"cuda": ("cuda",), "triton": ("cuda",), "cpp": ("cpu",)})
    backend.why_not_gpu.cache_clear()
    try:
        for name, reason in reasons.items():
            said = backend.why_not("angle", name, "cuda", 0)
            assert said is None if reason is None else re.search(reason, said), said
        taken = next((name for name, reason in reasons.items() if reason is None), "reference")
        assert backend.choose("angle", rows) == taken
        status = {row.backend: row for row in af.backends() if row.op == "angle"}
        assert status["cuda"].available == (reasons["cuda"] is None)
    finally:
        backend.why_not_gpu.cache_clear()


@cpu_only
def test_a_chosen_backend_runs_or_says_why_not():
    with (
        af.use_backend("cuda"),
        pytest.raises(RuntimeError, match=r'angle: backend "cuda" cannot run here: .*(cuda|CUDA)'),
    ):
        af.angle_loss(Z, Z)
    with af.use_backend("cpp"), pytest.raises(RuntimeError, match="needs cpu tensors, got meta"):
        af.angle_loss(Z.to("meta"), Z.to("meta"))
    assert backend._active == "auto"


def test_without_extension_and_extras_the_reference_runs_with_one_notice():
    """A plain install: torch and numpy only, no compiled library, no Triton."""
    code = """
import sys, warnings
blocked = {"amtml_fast._C", "triton", "accelerate", "typer", "rich", "omegaconf", "matplotlib", "safetensors"}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name in blocked or name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import amtml_fast as af, torch
    z = torch.randn(4, 5, requires_grad=True)
    af.multi_teacher_kd_loss(z, [torch.randn(4, 5)], None).backward()
ours = [str(w.message) for w in caught if "amtml_fast" in str(w.message)]
assert len(ours) == 1 and "pip install --no-build-isolation" in ours[0], ours
assert not any(r.available for r in af.backends() if r.backend == "cpp")
try:
    with af.use_backend("cpp"):
        af.angle_loss(z, z)
except RuntimeError as error:
    assert "does not load" in str(error)
else:
    raise SystemExit("cpp did not raise")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
