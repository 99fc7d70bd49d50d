"""What holds for every operator: strides, ownership, autograd, compile, determinism, dtypes; and the other spellings of arguments."""

import ctypes
import gc
import itertools

import pytest
import torch
from backends import CHOSEN, DEVICE, cpu_only, in_memory_of_the_cpu, takes
from parallel import on_threads
from test_values import _kd

import amtml_fast as af
from amtml_fast import dropin
from amtml_fast.ops.hint import hint_mse, hint_pool
from amtml_fast.ops.multi_teacher_kd import multi_teacher_kd
from amtml_fast.terms import KDOptions
from amtml_fast.testing import CASES, convert, relative_error, tensors, value_and_grads

each_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


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
def test_tensors_that_are_negated_when_read(case, on):
    """As the imaginary part of a conjugate is: its memory holds the negative of its numbers."""

    def negated(t):
        if not isinstance(t, torch.Tensor):
            return [negated(x) for x in t]
        if not t.is_floating_point():
            return t
        return torch._neg_view(t.detach().neg()).requires_grad_(t.requires_grad)

    options = {"reduction": "none"} if case.op in ("angle", "multi_teacher_kd") else {}
    args = case.inputs(*case.small)
    upstream = torch.randn_like(case.function(*args, **options))
    want = value_and_grads(case.function, args, upstream, **options)
    seen = tuple(map(negated, args))
    assert seen[0].is_neg()
    torch.testing.assert_close(value_and_grads(case.function, seen, negated(upstream), **options), want)
    # The kernels of backward that only multiply.
    torch.testing.assert_close(
        value_and_grads(case.function, args, negated(upstream), **options)[1],
        want[1],
    )


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
    # What is traced differs in little but the kernels' names.
    for options in case.variants[: 2 if fused == "cpp" else 1]:
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


class _Heap(ctypes.Structure):
    """What glibc's mallinfo2 gives."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


@cpu_only
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc what is in use")
@each_case
def test_calls_leave_no_memory_behind(case):
    """A string among an operator's arguments may cost 48 bytes a call."""
    in_use = ctypes.CDLL(None).mallinfo2
    in_use.restype = _Heap
    args = case.inputs(*case.small)

    def after(calls):
        for _ in range(calls):
            value_and_grads(case.function, args)
        gc.collect()
        return in_use().uordblks

    calls, sizes = 200, [after(100)]
    sizes += [after(calls), after(calls)]
    # The interpreter takes more once in a while (3.10 does); what is lost with a call is lost with every one.
    assert min(b - a for a, b in itertools.pairwise(sizes)) < 16 * calls


def _on_meta(args):
    return convert(args, device=torch.device("meta"))


@cpu_only
@each_case
def test_meta_tensors_give_shapes_and_dtypes(case):
    args = case.inputs(*case.small, dtype=torch.bfloat16)
    want = case.function(*args)
    got, grads = value_and_grads(case.function, _on_meta(args), torch.empty_like(want, device="meta"))
    assert (got.is_meta, got.shape, got.dtype) == (True, want.shape, want.dtype)
    of = [t for t in tensors(args) if t.requires_grad]
    assert [(g.is_meta, g.shape, g.dtype) for g in grads] == [(True, t.shape, t.dtype) for t in of]


@cpu_only
def test_modules_on_meta_tensors():
    student, teachers, weights, labels = _on_meta(CASES["multi_teacher_kd"].inputs(6, 5, 3))
    criterion = af.AMTMLLoss(af.TeacherAdapter(4, 3)).to("meta")
    out = criterion(student, teachers, labels, torch.empty(6, 4, device="meta"))
    out.loss.backward()
    assert out.weights.shape == weights.shape and student.grad.is_meta
    assert af.TeacherGate(3, 5).to("meta")(teachers).shape == weights.shape
    maps = torch.empty(2, 4, 3, 3, device="meta"), torch.empty(2, 6, 3, 3, device="meta")
    assert dropin.FitNet(4, 6).to("meta")(*maps).shape == ()


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
    with af.use_backend("cpp"):
        runs = on_threads((1, 2, 3), lambda: value_and_grads(function, case.inputs(*case.parallel)))
    for value, grads in runs[1:]:
        assert torch.equal(value, runs[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, runs[0][1]))


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


def _of_symbolic_rows():
    """Losses, each with which of its inputs have a number of rows that compiled code knows only as a symbol."""
    n, c, d = 8, 6, 5
    z, t, h, w = (torch.randn(size) for size in ((n, c), (n, c), (n, d), (c, d)))
    weights, temperature = torch.rand(n, 1), torch.rand(n) + 1
    top, index = t.log_softmax(1).topk(2), torch.zeros(n, dtype=torch.long)
    teachers = {"linear": af.LinearTeacher(h, w), "logits": t, "topk": af.TopKTeacher(top.indices, top.values)}
    for kind, teacher in teachers.items():
        yield kind, lambda h, teacher=teacher: af.fused_linear_kd_loss(h, w, [teacher]), (h.clone(),)
    yield "index", lambda h, t: af.fused_linear_kd_loss(h, w, [t], teacher_index=index), (h, t)
    yield "temperature", lambda z, t: af.multi_teacher_kd_loss(z, [t], None, temperature=temperature), (z, t)
    yield "weights", lambda z, t: af.multi_teacher_kd_loss(z, [t], weights), (z, t)


@pytest.mark.parametrize("name", ["linear", "logits", "topk", "index", "temperature", "weights"])
def test_compiled_code_takes_equal_sizes_of_which_one_is_symbolic(name):
    loss, given = {name: case for name, *case in _of_symbolic_rows()}[name]
    want = loss(*given)
    torch._dynamo.reset()
    for x in given:
        torch._dynamo.maybe_mark_dynamic(x, 0)
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="eager")(*given), want)


@pytest.mark.parametrize("channels", [3, 384])  # the CPU's own kernel, and torch's convolution
def test_autocast_does_not_narrow_a_hint(channels, on):
    maps = [torch.randn(2, channels, 2, 3, requires_grad=True) for _ in range(2)]
    given = *maps, (torch.randn(channels, channels) * channels**-0.5).requires_grad_()
    exact = tuple(x.detach().double().requires_grad_() for x in given)
    want, want_grads = value_and_grads(af.reference.hint_loss, exact)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got, grads = value_and_grads(af.hint_loss, given)
    assert relative_error(got, want) <= 1e-6
    assert all(relative_error(g, w) <= 1e-5 for g, w in zip(grads, want_grads))


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


@in_memory_of_the_cpu
def test_numbers_of_teachers_2_30_elements_apart(fused):
    """The third teacher's stand beyond 32 bits."""
    storage = torch.UntypedStorage(4 * (2**31 + 64), device="cpu")  # untouched pages cost nothing
    far = lambda like, *stride: torch.empty(0).set_(storage, 0, like.shape, stride).copy_(like)  # noqa: E731
    student, teachers, weights, labels = CASES["multi_teacher_kd"].inputs(4, 30, 3)
    for options in ({}, {"divergence": "jsd"}):
        want = af.multi_teacher_kd_loss(student, teachers, weights, labels, **options)
        got = af.multi_teacher_kd_loss(student, teachers, far(weights.detach(), 1, 2**30), labels, **options)
        torch.testing.assert_close(got, want)
    features, theta, v = CASES["teacher_weights"].inputs(4, 6, 3, 3, 3)
    back = torch.randn(4, 3)
    want = af.teacher_weights(features, theta, v)
    grads = torch.autograd.grad(want, (features, theta, v), back)
    apart = far(theta.detach(), 2**30, 1).requires_grad_()
    got = af.teacher_weights(features, apart, v)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, (features, apart, v), back), grads)
    got = af.teacher_weights(features, theta, v)
    torch.testing.assert_close(torch.autograd.grad(got, (features, theta, v), far(back, 1, 2**30)), grads)


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


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_saved_may_come_back_at_any_address(case, dtype, on):
    """As hooks give it back that keep saved tensors in one buffer."""
    sizes = {"teacher_weights": (4, 8, 8, 8, 3), "hint": (4, 8, 16, 8, 8)}  # of whole packs of 16 bytes
    args = convert(case.inputs(*sizes.get(case.op, (8, 96, *case.small[2:]))), dtype=dtype)
    leaves = [t for t in tensors(args) if t.requires_grad]

    def grads(moved=None):
        """With the one of this number moved, and how many are saved."""
        count = itertools.count()

        def unpack(saved):
            k, t = saved
            return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view_as(t) if k == moved else t.clone()

        with torch.autograd.graph.saved_tensors_hooks(lambda t: (next(count), t), unpack):
            out = case.function(*args)
        return torch.autograd.grad(out, leaves, torch.full_like(out, -0.3)), next(count)

    want, count = grads()
    for k in range(count):
        torch.testing.assert_close(grads(k)[0], want)


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
