"""fused_linear_kd_loss against its reference in float64, and what is particular to chunks, kinds of teachers and routing."""

import functools

import pytest
import torch
from backends import CHOSEN, DEVICE, FUSED, cpu_only, run_on
from parallel import on_threads
from torch.utils._python_dispatch import TorchDispatchMode

import amtml_fast as af
from amtml_fast.ops import _linear_chunks
from amtml_fast.ops.divergence import ALL_MODES, DIVERGENCES
from amtml_fast.testing import relative_error, value_and_grads

N, H, C, H_T, K = 9, 6, 13, 4, 3
MIXED = ("linear", "logits", "topk", "bias")


def randn(*size):
    return torch.randn(*size, dtype=torch.float32, device="cpu")


def teacher(kind, rows=N, classes=C):
    if kind == "logits":
        return 2 * randn(rows, classes)
    if kind == "topk":
        index = torch.stack([torch.randperm(classes, device="cpu")[:K] for _ in range(rows)])
        index[::2, 2] = index[::2, 0]  # named twice
        return af.TopKTeacher(index, randn(rows, K).log_softmax(-1) - 0.2)
    bias = randn(classes) if kind == "bias" else None
    return af.LinearTeacher(randn(rows, H_T), randn(classes, H_T), bias)


def inputs(*kinds, labels=True, weights=True, bias=True):
    """Hidden, weight, teachers, teacher weights, labels, bias: float32, leaves where they are differentiated."""
    label = torch.randint(0, C, (N,), device="cpu")
    label[1::4] = -100
    return (
        randn(N, H).requires_grad_(),
        randn(C, H).requires_grad_(),
        [teacher(kind) for kind in kinds],
        randn(N, len(kinds)).softmax(-1).requires_grad_() if weights else None,
        label if labels else None,
        randn(C).requires_grad_() if bias else None,
    )


def cast(x, dtype, device=DEVICE):
    """The same arguments as fresh leaves; only floating tensors change dtype."""
    if isinstance(x, torch.Tensor):
        new = x.detach().to(device, dtype if x.is_floating_point() else None, copy=True)
        return new.requires_grad_(x.requires_grad)
    if hasattr(x, "_fields"):
        return type(x)(*(cast(each, dtype, device) for each in x))
    return type(x)(cast(each, dtype, device) for each in x) if isinstance(x, (list, tuple)) else x


def calls(function):
    """With the bias as the last argument in place, and only the loss of several results."""

    def call(hidden, weight, teachers, weights, labels, bias, **options):
        out = function(hidden, weight, teachers, weights, labels, student_bias=bias, **options)
        return out[0] if isinstance(out, tuple) else out

    return call


fused_loss, plain_loss = calls(af.fused_linear_kd_loss), calls(af.reference.fused_linear_kd_loss)


def agrees(args, value=1e-6, grads=1e-5, **options):
    """Like the reference in float64, on numbers that the arguments' own dtype holds."""
    given = {name: cast(x, torch.float32) for name, x in options.items()}
    got, got_grads = value_and_grads(fused_loss, args, **given)
    del given["accumulate"], given["chunk_size"]
    exact = {name: cast(x, torch.float64, "cpu") for name, x in given.items()}
    want, want_grads = value_and_grads(plain_loss, cast(args, torch.float64, "cpu"), **exact)
    assert relative_error(got, want) <= value
    assert len(got_grads) == len(want_grads) > 0
    for grad, want_grad in zip(got_grads, want_grads):
        assert relative_error(grad, want_grad) <= grads
    return got, got_grads


def check(*kinds, dtype=torch.float32, value=1e-6, grads=1e-5, labels=True, weights=True, bias=True, **options):
    options = {"chunk_size": 4, "accumulate": "fp32", **options}
    return agrees(cast(inputs(*kinds, labels=labels, weights=weights, bias=bias), dtype), value, grads, **options)


# --- on every backend


@pytest.mark.parametrize(
    ("kinds", "options"),
    [
        (("linear", "bias"), {}),
        (("linear", "topk"), {"divergence": "jsd", "reduction": "none", "softcap": 4.0, "logit_scale": 0.7}),
        (("topk", "topk"), {"temperature": 2.0, "reduction": "mean"}),
    ],
)
def test_chunks_are_the_loss_of_all_logits(fused, kinds, options):
    check(*kinds, **options)


def test_routed_rows_learn_from_one_teacher_each(fused):
    index = torch.tensor([2, 0, 1, 1, 2, 0, 0, 2, 2])
    check("linear", "logits", "bias", weights=False, teacher_index=index, chunk_size=2)


# --- formulas


@cpu_only
@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_in_every_mode(divergence, mode):
    kinds = ("linear", "bias", "logits")
    for reduction in ("none", "sum", "mean", "batchmean"):
        check(*kinds, divergence=divergence, mode=mode, reduction=reduction)
    check(*kinds, divergence=divergence, mode=mode, labels=False, teacher_temperature=[1.0, 2.0, 3.0])


@cpu_only
@pytest.mark.parametrize("mode", ["mixture", "sum"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"])
def test_kinds_of_teachers_mix(divergence, mode):
    check(*MIXED, divergence=divergence, mode=mode, softcap=3.0, temperature=1.5)
    check("topk", "topk", divergence=divergence, mode=mode, reduction="none", weights=False)
    check("topk", "logits", divergence=divergence, mode=mode, teacher_temperature=2.0, return_stats=True)


@cpu_only
def test_numbers_of_each_row():
    for reduction in ("mean", "batchmean", "none"):
        rows = {"alpha": torch.rand(N).requires_grad_(), "temperature": torch.rand(N) + 0.5}
        check(*MIXED, divergence="jsd", reduction=reduction, label_smoothing=0.1, **rows)
        check("linear", weights=False, bias=False, reduction=reduction, alpha=torch.rand(N), t2_scale=False)
    check("linear", num_items_in_batch=torch.tensor(5), alpha=1.0)


@cpu_only
def test_gradient_to_alpha():
    args, alpha = cast(inputs("linear", "topk"), torch.float64), torch.rand(N, dtype=torch.float64).requires_grad_()
    for reduction in ("mean", "batchmean", "none"):
        options = {"alpha": alpha, "reduction": reduction, "temperature": torch.rand(N) + 0.5}
        grads = [
            torch.autograd.grad(function(*args, **options).sum(), alpha)[0] for function in (fused_loss, plain_loss)
        ]
        assert relative_error(*grads) <= 1e-12


@cpu_only
def test_float64_is_exact():
    for reduction in ("none", "batchmean"):
        options = {
            "softcap": 3.0,
            "reduction": reduction,
            "divergence": "skew_kl",
            "chunk_size": 4,
            "accumulate": "fp32",
        }
        agrees(cast(inputs(*MIXED), torch.float64), 1e-13, 1e-13, **options)


@cpu_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_have_float32_logits(dtype):
    eps = torch.finfo(dtype).eps  # of gradients: one rounding
    for reduction in ("batchmean", "none"):
        _, grads = check("linear", "logits", dtype=dtype, grads=eps, reduction=reduction)
        assert {g.dtype for g in grads} == {dtype}
    hidden, *rest = cast(inputs("linear", "bias"), dtype)
    agrees((hidden.detach().float().requires_grad_(), *rest), grads=eps, chunk_size=None, accumulate="fp32")
    # A gradient in float32 shows that nothing was rounded on the way to it.
    (grad, *_) = value_and_grads(fused_loss, args := (cast(hidden, torch.float32), *rest))[1]
    (want, *_) = value_and_grads(plain_loss, cast(args, torch.float64))[1]
    assert grad.dtype == torch.float32 and relative_error(grad, want) <= 1e-5


@cpu_only
def test_sums_in_bfloat16_round_once_a_chunk():
    exact, rounded = (check("linear", grads=2e-2, accumulate=kind, chunk_size=1)[1][1] for kind in ("fp32", "bf16"))
    assert rounded.dtype == torch.float32
    torch.manual_seed(0)
    assert torch.equal(rounded, rounded.bfloat16().float()) and not torch.equal(exact, exact.bfloat16().float())


@cpu_only
def test_chunk_sizes_give_the_same_numbers():
    args = inputs(*MIXED)
    for reduction in ("batchmean", "none"):
        for size in (*range(1, N + 2), None):
            agrees(args, chunk_size=size, accumulate="fp32", reduction=reduction)


@cpu_only
def test_shapes_of_tokens():
    hidden, weight, teachers, weights, labels, bias = inputs("linear", "logits", "topk")
    options = {"student_bias": bias, "reduction": "none", "return_stats": True}
    flat, flat_stats = af.fused_linear_kd_loss(hidden, weight, teachers, weights, labels, **options)

    def tokens(x):
        return x.reshape(3, 3, *x.shape[1:])

    linear, logits, topk = teachers
    deep = [linear._replace(hidden=tokens(linear.hidden)), tokens(logits), af.TopKTeacher(*map(tokens, topk))]
    given = tokens(hidden), weight, deep, tokens(weights), tokens(labels)
    loss, stats = af.fused_linear_kd_loss(*given, **options)
    assert torch.equal(loss, tokens(flat)) and stats.teacher_kl.shape == (3, 3, 3)
    mixed = af.fused_linear_kd_loss(
        tokens(hidden), weight, teachers, weights, tokens(labels), **options
    )  # teachers' as rows
    assert torch.equal(mixed[0], loss)
    index = torch.arange(N) % 3
    by_index = [
        af.fused_linear_kd_loss(tokens(hidden), weight, deep, None, tokens(labels), teacher_index=x)
        for x in (index, tokens(index))
    ]
    assert torch.equal(*by_index)
    assert torch.equal(stats.agreement, tokens(flat_stats.agreement))
    module = af.FusedLinearKDLoss(temperature=2.0, softcap=5.0)
    want = af.fused_linear_kd_loss(*given, student_bias=bias, temperature=2.0, softcap=5.0, num_items_in_batch=7)
    assert torch.equal(module(*given, 7, student_bias=bias), want)
    with af.use_backend("reference"):
        plain, plain_stats = af.fused_linear_kd_loss(*given, **options)
    assert relative_error(loss, plain) <= 1e-6
    assert all(relative_error(x, y) <= 1e-5 for x, y in zip(stats, plain_stats))


@cpu_only
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_routing(divergence):
    index = torch.tensor([3, 0, 3, 3, 1, 0, 1, 3, 3])  # teacher 2 has no row
    kinds = ("linear", "logits", "bias", "topk" if divergence != "reverse_kl" else "linear")
    for reduction in ("none", "mean", "batchmean"):
        options = {"teacher_index": index, "divergence": divergence, "reduction": reduction, "weights": False}
        check(*kinds, return_stats=reduction == "none", **options)
        check(*kinds, labels=False, teacher_temperature=[1.0, 2.0, 3.0, 4.0], **options)
    check("topk", "topk", weights=False, teacher_index=index % 2, mode="sum", labels=False)
    args = inputs(*kinds, weights=False, labels=False)
    _, stats = af.fused_linear_kd_loss(*args[:5], teacher_index=index, return_stats=True, divergence=divergence)
    with af.use_backend("reference"):
        _, want = af.fused_linear_kd_loss(*args[:5], teacher_index=index, return_stats=True, divergence=divergence)
    assert all(relative_error(x, y) <= 1e-5 for x, y in zip(stats, want))


@cpu_only
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("wrong", [-1, 2, 3])
def test_a_teacher_that_is_not_there_is_an_error_where_the_operator_itself_has_to_see_it(wrong, labels):
    compiled = torch.compile(
        fused_loss, fullgraph=True, backend="aot_eager"
    )  # checks of values are not part of a graph
    args = inputs("linear", "topk", weights=False, labels=labels)
    index = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 0])
    index[0] = wrong
    assert not labels or args[4][0] != -100
    with pytest.raises(
        ValueError, match=rf"teacher_index must be in \[0, 2\), got values in \[{min(wrong, 0)}, {max(wrong, 1)}\]"
    ):
        compiled(*args, teacher_index=index)


@cpu_only
def test_only_the_products_of_routed_and_counted_rows_are_made(monkeypatch):
    made, product = [], _linear_chunks.Call.logits

    def count(call, name, hidden, *others):
        made.append(hidden.shape)
        return product(call, name, hidden, *others)

    monkeypatch.setattr(_linear_chunks.Call, "logits", count)
    hidden, weight, teachers, _, labels, _ = inputs("linear", "linear", "linear")
    index = torch.tensor([0, 1, 1, 2, 1, 0, 0, 1, 0])
    af.fused_linear_kd_loss(hidden, weight, teachers, None, labels, teacher_index=index, chunk_size=2)
    counted = index[labels != -100]
    assert sum(n for n, width in made if width == H) == len(counted) == 7
    assert sum(n for n, width in made if width == H_T) == len(counted)


@cpu_only
def test_an_ignored_row_may_hold_anything():
    args = inputs("linear", "logits", "topk")
    hidden, _, teachers, weights, labels, _ = args
    want = agrees(args, chunk_size=4, accumulate="fp32")
    away = labels == -100
    with torch.no_grad():
        hidden[away], weights[away] = torch.nan, torch.nan
        for x in (teachers[0].hidden, teachers[1], teachers[2].log_probs):
            x[away] = torch.nan
        teachers[2].indices[away] = 10**9
    weights.data[away] = 0.5
    got = value_and_grads(fused_loss, args, chunk_size=4)
    assert torch.equal(got[0], want[0]) and all(torch.equal(x, y) for x, y in zip(got[1], want[1]))
    labels[:] = -100
    loss, grads = value_and_grads(fused_loss, args)
    assert loss == 0 and all((g == 0).all() for g in grads)


@cpu_only
def test_no_rows_and_one_of_all():
    args = cast(inputs("linear", "topk"), torch.float32)
    hidden, weight, (linear, topk), weights, labels, bias = args
    none = [linear._replace(hidden=linear.hidden[:0]), af.TopKTeacher(topk.indices[:0], topk.log_probs[:0])]
    loss = af.fused_linear_kd_loss(hidden[:0], weight, none, weights[:0], labels[:0], student_bias=bias)
    grads = torch.autograd.grad(loss, (hidden, weight, bias))
    assert loss == 0 and all((g == 0).all() for g in grads)
    one = af.LinearTeacher(torch.ones(1, 1), torch.ones(1, 1))
    assert af.fused_linear_kd_loss(torch.ones(1, 1), torch.ones(1, 1), [one]) == 0


@cpu_only
def test_a_class_that_one_side_has_not():
    """-inf in a bias: probability 0, with gradient 0."""
    args = inputs("bias", "linear")
    args[2][0].bias[3] = -torch.inf
    agrees(args, chunk_size=4, accumulate="fp32", divergence="jsd")
    with torch.no_grad():
        args[-1][5] = -torch.inf
    _, grads = agrees(args, chunk_size=4, accumulate="fp32", divergence="jsd")
    assert grads[3][5] == 0


# --- what GPUs do otherwise: no look at values, and 16-bit factors as they are


@pytest.fixture
def like_a_gpu(monkeypatch):
    def product(a, b, out):
        assert a.dtype == b.dtype != torch.float32
        torch.mm(a.float(), b.float(), out=out)

    def narrow(hidden, weight, wide):
        return hidden.dtype == weight.dtype != wide == torch.float32

    monkeypatch.setattr(_linear_chunks.Call, "own_products", False)
    monkeypatch.setattr(_linear_chunks, "_reads_free", lambda hidden: False)
    monkeypatch.setattr(_linear_chunks, "_narrow", narrow)
    monkeypatch.setattr(_linear_chunks, "_narrow_product", product)
    monkeypatch.setattr(_linear_chunks, "_adds_to_float32", lambda device, dtype: False)


@cpu_only
def test_without_a_look_at_labels(like_a_gpu):
    for reduction in ("none", "mean", "batchmean", "sum"):
        check(*MIXED, divergence="jsd", reduction=reduction)
    check("linear", "linear", weights=False, teacher_index=torch.arange(N) % 2)
    args = inputs("linear", "topk")
    want = agrees(args, chunk_size=4, accumulate="fp32")
    with torch.no_grad():
        args[0][args[4] == -100] = args[2][0].hidden[args[4] == -100] = torch.nan
    got = value_and_grads(fused_loss, args, chunk_size=4)
    assert torch.equal(got[0], want[0]) and all(torch.equal(x, y) for x, y in zip(got[1], want[1]))


@cpu_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_16_bit_factors(dtype, like_a_gpu):
    eps = torch.finfo(dtype).eps
    for reduction in ("none", "mean", "batchmean", "sum"):
        options = {"dtype": dtype, "grads": eps, "reduction": reduction}
        check("linear", "logits", "topk", softcap=4.0, logit_scale=0.7, **options)
        check("linear", labels=False, bias=False, **options)
    check("linear", "topk", dtype=dtype, grads=2 * torch.finfo(torch.bfloat16).eps, accumulate="bf16")


@cpu_only
def test_torchs_products_of_a_weight_that_is_converted_by_blocks(monkeypatch):
    monkeypatch.setattr(_linear_chunks.Call, "own_products", False)
    monkeypatch.setattr(_linear_chunks, "BLOCK", 4 * 5 * H)
    for dtype in (torch.bfloat16, torch.float32):
        for accumulate in ("fp32", "bf16"):
            eps = torch.finfo(torch.bfloat16).eps
            check("linear", "bias", "topk", dtype=dtype, grads=eps, softcap=4.0, logit_scale=0.7, accumulate=accumulate)


# --- the products of csrc/cpu


@cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_of_few_rows(dtype):
    """Sizes below, at and past a tile, a part of the classes, and what threads share; other strides."""
    own = torch.ops.amtml
    for rows, width, classes in ((1, 1, 1), (5, 7, 13), (12, 32, 24), (33, 40, 300), (70, 96, 8300)):
        hidden, weight = randn(rows, width).to(dtype), randn(classes, 2 * width).to(dtype)[:, ::2]
        bias, grad = randn(2 * classes).to(dtype)[::2], randn(rows, classes)
        rows_apart = torch.full((classes, width + 3), torch.nan, dtype=dtype)[:, :width].copy_(weight)
        for layer in (weight, weight.contiguous(), rows_apart):
            logits, to_hidden, to_weight = (
                torch.full(size, torch.nan) for size in ((rows, classes), (rows, width), (classes, width))
            )
            own.fused_linear_kd_logits_(logits, hidden, layer, bias, 0.5)
            own.fused_linear_kd_grad_hidden_(to_hidden, grad, layer, 2.0)
            own.fused_linear_kd_grad_weight_(to_weight, grad, hidden, 2.0, False)
            own.fused_linear_kd_grad_weight_(to_weight, grad, hidden, 1.0, True)
            x, w, b, g = (t.double() for t in (hidden, weight, bias, grad))
            assert relative_error(logits, 0.5 * (x @ w.t() + b)) <= 1e-6
            assert relative_error(to_hidden, 2 * g @ w) <= 1e-6
            assert relative_error(to_weight, 3 * g.t() @ x) <= 1e-6
    with pytest.raises(RuntimeError, match=r"fused_linear_kd_loss: out must be \[70, 8300\], got \[70, 96\]"):
        own.fused_linear_kd_logits_(to_hidden, hidden, weight, None, 1.0)


@cpu_only
def test_any_number_of_threads_gives_the_same_bits():
    rows, width, classes = 40, 64, 9000
    hidden, weight = randn(rows, width).requires_grad_(), randn(classes, width).requires_grad_()
    teachers = [af.LinearTeacher(randn(rows, 8), randn(classes, 8))]

    def run():
        loss = af.fused_linear_kd_loss(hidden, weight, teachers, chunk_size=17)
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    first, *others = on_threads((1, 2, 3), run)
    assert all(torch.equal(x, y) for other in others for x, y in zip(other, first))


# --- promises


@cpu_only
def test_backward_again_and_several_at_once():
    args = inputs("linear", "logits")
    leaves = [args[0], args[1], args[3], args[5]]
    for reduction in ("batchmean", "none"):
        loss = fused_loss(*args, reduction=reduction)
        up = torch.ones_like(loss)
        first = torch.autograd.grad(loss, leaves, up, retain_graph=True)
        twice = torch.autograd.grad(loss, leaves, torch.stack([up, 2 * up]), is_grads_batched=True, retain_graph=True)
        last = torch.autograd.grad(loss, leaves, up)
        for a, b, c in zip(first, twice, last):
            assert torch.equal(a, c) and torch.equal(b[0], a) and relative_error(b[1], 2 * a) <= 1e-6
    with pytest.raises(RuntimeError, match="second derivative"):
        (grad,) = torch.autograd.grad(fused_loss(*args), args[0], create_graph=True)
        grad.sum().backward()


class Made(TorchDispatchMode):
    """The most numbers that are in one tensor."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.itemsize)
        return out


@cpu_only
def test_nothing_is_as_large_as_the_logits(monkeypatch):
    """Nor are there gradients that nobody asked for."""
    rows, classes, width = 64, 500, 8
    hidden, weight = randn(rows, width).requires_grad_(), randn(classes, width).requires_grad_()
    teachers = [af.LinearTeacher(randn(rows, 4), randn(classes, 4)), teacher("topk", rows, classes)]
    made = Made()
    raw = _linear_chunks.Call.run
    monkeypatch.setattr(_linear_chunks.Call, "run", lambda call: _inside(made, raw, call))
    loss = af.fused_linear_kd_loss(hidden, weight, teachers, chunk_size=5)
    loss.backward()
    assert made.largest == classes * width < rows * classes
    made.largest = 0
    with torch.no_grad():
        af.fused_linear_kd_loss(hidden, weight, teachers, chunk_size=1)
    assert made.largest <= classes * width
    outputs = []
    monkeypatch.setattr(_linear_chunks.Call, "run", lambda call: outputs.append(raw(call)) or outputs[-1])
    af.fused_linear_kd_loss(hidden.detach(), weight, teachers)
    af.fused_linear_kd_loss(hidden, weight.detach(), teachers, torch.ones(2))
    with torch.no_grad():
        af.fused_linear_kd_loss(hidden, weight, teachers)
    sizes = [[x.numel() for x in out[1:]] for out in outputs]
    assert sizes == [[0, classes * width, 0, 0, 0, 0], [rows * width, 0, 0, 0, 0, 0], [0] * 6]


def _inside(mode, function, *args):
    with mode:
        return function(*args)


@cpu_only
def test_chunks_stay_within_their_budget():
    for rows, width, classes, count in ((2048, 512, 32000, 3), (2048, 512, 32000, 1), (10**6, 64, 1000, 8)):
        hidden = torch.empty(1, width).expand(rows, -1)
        teachers = [af.LinearTeacher(hidden, torch.empty(1, width).expand(classes, -1))] * count
        seen = []

        def fake(call, seen=seen):
            step = call.chunk_rows(call.rows, list(range(len(call.kinds))), True, False)
            seen.append(step * call.classes * 4 * (len(call.kinds) + 2))
            raise InterruptedError

        with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
            patch.setattr(_linear_chunks.Call, "run_chunks", fake)
            weight = torch.empty(1, width).expand(classes, -1)
            af.fused_linear_kd_loss(hidden, weight, teachers)
        assert 20e6 < seen[0] < 60e6


@cpu_only
def test_autocast_does_not_narrow():
    for dtype in (torch.bfloat16, torch.float16):
        args = inputs("linear", "topk")
        want = value_and_grads(fused_loss, args)
        with torch.autocast("cpu", dtype=dtype):
            got = value_and_grads(fused_loss, args)
            with af.use_backend("reference"):
                plain = fused_loss(*args)
        assert torch.equal(got[0], want[0]) and all(torch.equal(x, y) for x, y in zip(got[1], want[1]))
        assert relative_error(plain, want[0]) <= 1e-6


@cpu_only
def test_compiled_in_one_graph():
    compiled = torch.compile(fused_loss, fullgraph=True, backend="aot_eager")
    index = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 0])
    for options in ({}, {"reduction": "none", "softcap": 3.0}, {"return_stats": True, "teacher_index": index}):
        args = inputs("linear", "topk", weights="teacher_index" not in options)
        want, got = (value_and_grads(f, args, **options) for f in (fused_loss, compiled))
        assert torch.equal(got[0], want[0]) and all(torch.equal(x, y) for x, y in zip(got[1], want[1]))


def detached(x):
    if isinstance(x, torch.Tensor):
        return x.detach()
    return type(x)(map(detached, x)) if isinstance(x, (list, tuple)) else x


@cpu_only
def test_opcheck():
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "amtml":
                seen.append((func, detached(args)))
            return func(*args, **(kwargs or {}))

    with Record():
        for dtype in (torch.float32, torch.bfloat16):
            args = cast(inputs("linear", "topk", "logits"), dtype)
            for options in ({"return_stats": True}, {"reduction": "none"}, {"accumulate": "bf16"}):
                value_and_grads(fused_loss, args, **options)
    assert {f.overloadpacket.__name__ for f, _ in seen} >= {"fused_linear_kd_fwd", "fused_linear_kd_bwd"}
    for i, (func, args) in enumerate(seen):
        if func.overloadpacket.__name__.startswith("fused_linear_kd"):
            utils = ["test_schema", "test_faketensor"] + ["test_aot_dispatch_dynamic"] * (i < 3)
            torch.library.opcheck(func, args, test_utils=utils)


@cpu_only
def test_tied_weights_checkpoints_and_inference_mode():
    ids, labels = torch.randint(0, C, (N,)), torch.randint(0, C, (N,))
    embedding, linear = torch.nn.Embedding(C, H), torch.nn.Linear(H, H)
    with torch.inference_mode():
        frozen = [af.LinearTeacher(torch.randn(N, H_T), torch.randn(C, H_T)), torch.randn(N, C)]

    def loss(function, **options):
        hidden = torch.utils.checkpoint.checkpoint(lambda x: linear(embedding(x)).tanh(), ids, use_reentrant=False)
        return function(hidden, embedding.weight, frozen, None, labels, **options).sum()

    leaves = [*embedding.parameters(), *linear.parameters()]
    for reduction in ("batchmean", "none"):
        want = torch.autograd.grad(loss(af.reference.fused_linear_kd_loss, reduction=reduction), leaves)
        got = torch.autograd.grad(loss(af.fused_linear_kd_loss, reduction=reduction), leaves)
        assert all(relative_error(x, y) <= 1e-5 for x, y in zip(got, want))
        whole = functools.partial(loss, af.fused_linear_kd_loss, reduction=reduction)
        again = torch.autograd.grad(torch.utils.checkpoint.checkpoint(whole, use_reentrant=False), leaves)
        assert all(torch.equal(x, y) for x, y in zip(got, again))


@cpu_only
def test_transforms_run_on_the_reference_or_say_so():
    hidden, weight, teachers, *_ = inputs("linear")
    hidden, weight = hidden.detach(), weight.detach()
    grad = torch.func.grad(lambda h: af.fused_linear_kd_loss(h, weight, teachers))(hidden)
    leaf = hidden.clone().requires_grad_()
    (want,) = torch.autograd.grad(af.fused_linear_kd_loss(leaf, weight, teachers), leaf)
    assert relative_error(grad, want) <= 1e-5
    with run_on(FUSED[0]), pytest.raises(RuntimeError, match=r"fused_linear_kd.*use_backend\(\"reference\"\)"):
        torch.func.grad(lambda h: af.fused_linear_kd_loss(h, weight, teachers))(hidden)


# --- errors


def _changed(**changes):
    hidden, weight, teachers, weights, labels, bias = inputs("linear", "topk", "logits")
    args = dict(student_hidden=hidden, student_weight=weight, teachers=teachers, teacher_weights=weights, labels=labels)
    return {**args, "student_bias": bias, **changes}


def _swap(t, new):
    teachers = [teacher("linear"), teacher("topk"), teacher("logits")]
    teachers[t] = new
    return teachers


LINEAR, TOPK = teacher("linear"), teacher("topk")


@pytest.mark.skipif(CHOSEN != "", reason="the same on every backend")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_hidden": [1.0]}, "student_hidden must be a tensor, got list"),
        ({"student_hidden": randn(3)}, r"student_hidden must be \[N, H\] or \[B, S, H\] with H >= 1, got \[3\]"),
        ({"student_weight": randn(C, H + 1)}, r"student_weight must be \[C, 6\] for hidden .*, got \[13, 7\]"),
        ({"student_weight": randn(0, H)}, r"student_weight must be \[C, 6\] for hidden .*, got \[0, 6\]"),
        ({"student_weight": randn(C, H).to("meta")}, "student_weight must be on cpu like student_hidden, got meta"),
        ({"student_bias": randn(C).to("meta")}, "student_bias must be on cpu like student_hidden, got meta"),
        (
            {"teachers": _swap(0, LINEAR._replace(bias=randn(C).to("meta")))},
            r"teachers\[0\].bias must be on cpu like student_hidden, got meta",
        ),
        (
            {"teachers": _swap(0, af.LinearTeacher(randn(N, 0), randn(C, 0)))},
            r"teachers\[0\].hidden must be \[9, H_t\] like student_hidden, got \[9, 0\]",
        ),
        ({"teachers": _swap(2, randn(C))}, r"teachers\[2\] must be \[9, C\] like student_hidden, got \[13\]"),
        ({"teachers": _swap(2, randn(()))}, r"teachers\[2\] must be \[9, C\] like student_hidden, got \[\]"),
        (
            {"teachers": _swap(1, af.TopKTeacher(TOPK.indices.to("meta"), TOPK.log_probs))},
            r"teachers\[1\].indices must be on cpu like student_hidden, got meta",
        ),
        (
            {"teacher_weights": None, "teacher_index": torch.zeros(N).long().to("meta")},
            "teacher_index must be on cpu like student_hidden, got meta",
        ),
        ({"student_bias": randn(C - 1)}, r"student_bias must be \[13\] like student_weight, got \[12\]"),
        ({"teachers": TOPK}, "teachers must be a list of teachers .*, got TopKTeacher"),
        ({"teachers": randn(1, N, C)}, r"teachers must be a list of teachers .*, got a tensor \[1, 9, 13\]"),
        ({"teachers": []}, "teachers must hold at least one teacher, got none"),
        ({"teachers": _swap(0, (1, 2))}, r"teachers\[0\] must be a LinearTeacher, .*, got tuple"),
        ({"teachers": _swap(0, af.LinearTeacher(None, LINEAR.weight))}, r"teachers\[0\].hidden must be a tensor, got None"),
        (
            {"teachers": _swap(0, af.LinearTeacher(randn(N + 1, H_T), LINEAR.weight))},
            r"teachers\[0\].hidden must be \[9, H_t\] like student_hidden, got \[10, 4\]",
        ),
        (
            {"teachers": _swap(0, af.LinearTeacher(LINEAR.hidden, randn(C + 1, H_T)))},
            r"teachers\[0\].weight must be \[13, 4\] with the classes of student_weight, got \[14, 4\]; fill up",
        ),
        ({"teachers": _swap(2, randn(N, C - 1))}, r"teachers\[2\] must be \[..., 13\] with the classes of .*, got \[9, 12\]"),
        ({"teachers": _swap(2, randn(N, C).requires_grad_())}, r"teachers\[2\] must be detached"),
        (
            {"teachers": _swap(1, af.TopKTeacher(TOPK.indices.float(), TOPK.log_probs))},
            r"teachers\[1\].indices must be an int64 or int32 tensor, got torch.float32",
        ),
        (
            {"teachers": _swap(1, af.TopKTeacher(TOPK.indices + C, TOPK.log_probs))},
            r"teachers\[1\].indices must be in \[0, 13\), got \d+ in row 0",
        ),
        (
            {"teachers": _swap(1, af.TopKTeacher(randn(N, C + 1).long(), randn(N, C + 1)))},
            r"teachers\[1\].indices must have k classes with 1 <= k <= 13, got \[9, 14\]",
        ),
        (
            {"teachers": _swap(1, af.TopKTeacher(TOPK.indices, TOPK.log_probs[:, :2]))},
            r"teachers\[1\].log_probs must be \[9, 3\] like teachers\[1\].indices, got \[9, 2\]",
        ),
        ({"teachers": _swap(2, randn(N, C).to("meta"))}, r"teachers\[2\] must be on cpu like student_hidden, got meta"),
        ({"teacher_index": torch.zeros(N, dtype=torch.int64)}, r"teacher_weights must be None with teacher_index, got \[9, 3\]"),
        ({"teacher_weights": randn(N, 2)}, r"teacher_weights must be \[3\] or \[9, 3\] for 3 teachers, got \[9, 2\]"),
        ({"teacher_weights": -torch.ones(3)}, "teacher_weights must be finite and not negative"),
        (
            {"teacher_weights": None, "teacher_index": torch.full((N,), 3)},
            r"teacher_index must be in \[0, 3\), got 3 in row 0",
        ),
        ({"teacher_weights": None, "teacher_index": torch.zeros(N - 1).long()}, r"teacher_index must be \[9\] like .*, got \[8\]"),
        ({"teacher_weights": None, "teacher_index": torch.zeros(N)}, "teacher_index must be an int64 or int32 tensor"),
        ({"labels": torch.full((N,), C)}, r"labels\[0\] must be in \[0, 13\) or ignore_index -100, got 13"),
        ({"labels": torch.zeros(N + 1).long()}, r"labels must be \[9\] like student_hidden, got \[10\]"),
        ({"chunk_size": 0}, "chunk_size must be an int >= 1 or None, got 0"),
        ({"chunk_size": 2.0}, "chunk_size must be an int >= 1 or None, got 2.0"),
        ({"accumulate": "fp16"}, "accumulate must be one of fp32, bf16, got 'fp16'"),
        ({"softcap": 0}, r"softcap must be a number in \[1e-18, 1e\+18\], got 0"),
        ({"logit_scale": torch.ones(())}, r"logit_scale must be a number in \[1e-18, 1e\+18\], got tensor"),
        ({"divergence": "kl"}, "divergence must be one of forward_kl, .*, got 'kl'"),
        ({"mode": "all"}, "mode must be one of mixture, sum, logits, got 'all'"),
        ({"reduction": "avg"}, "reduction must be one of .*, got 'avg'"),
        ({"beta": 0.5}, "beta must be None with divergence \"forward_kl\", got 0.5"),
        ({"teacher_temperature": [1.0, 2.0]}, "teacher_temperature must be a number or 3 numbers, .*, got 2"),
        ({"alpha": torch.full((N,), 2.0)}, r"alpha must be in \[0, 1\], got 2 in row 0"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be a number in \[0, 1\], got 1.5"),
        ({"alpha": -1}, r"alpha must be a number in \[0, 1\], got -1"),
        ({"temperature": torch.ones(4)}, r"temperature must be a number or \[9\], got \[4\]"),
        ({"num_items_in_batch": 3, "reduction": "sum"}, "num_items_in_batch must be None with a reduction other"),
    ],
)  # fmt: skip
def test_errors_come_before_any_work(changes, message, monkeypatch):
    def work(*_):
        raise AssertionError("something was computed")

    monkeypatch.setattr(_linear_chunks.Call, "run", work)
    with pytest.raises((ValueError, TypeError), match="^fused_linear_kd_loss: " + message):
        af.fused_linear_kd_loss(**_changed(**changes))
