"""topk_kd_loss against probabilities made dense class by class, and what is particular to supports and tails."""

import math
import subprocess
import sys

import pytest
import torch
from backends import CHOSEN, DEVICE, cpu_only, takes

import amtml_fast as af
from amtml_fast.testing import CASES, convert, relative_error, value_and_grads

TAILS = ("renormalize", "ignore", "uniform")
N, C = 4, 12
each_tail = pytest.mark.parametrize("tail", TAILS)


def _dense(index, log_prob, tail):
    """One teacher's probabilities [N, C], written class by class, on the CPU."""
    out = torch.zeros(len(index), C, dtype=torch.float64, device="cpu")
    for i in range(len(index)):
        given = {}
        for c, x in zip(index[i].tolist(), log_prob[i].tolist()):
            given[c] = given.get(c, 0.0) + math.exp(x)
        mass = sum(given.values())
        for c in range(C):
            if c in given:
                out[i, c] = given[c] / mass if tail == "renormalize" else given[c]
            elif tail == "uniform":
                out[i, c] = max(1 - mass, 0.0) / (C - len(given))
    return out


def _wanted(student, indices, log_probs, weights, labels=None, *, tail, temperature=4.0, alpha=0.7):
    """Eq 7-8 in float64, a value a row."""
    z = student.double()
    w = torch.full((N, len(indices)), 1 / len(indices), device="cpu") if weights is None else weights
    probs = torch.stack([_dense(i, p, tail) for i, p in zip(indices, log_probs)], 1)
    p = (w.double()[..., None] * probs).sum(1)
    log_ratio = torch.where(p > 0, p, 1).log() - (z / temperature).log_softmax(-1)
    kl = (p * torch.where(p > 0, log_ratio, 0)).sum(-1) * temperature**2
    if labels is None:
        return kl
    return (1 - alpha) * torch.nn.functional.cross_entropy(z, labels, reduction="none") + alpha * kl


def _supports(kind):
    """Classes of two teachers [N, k], k as it may be."""
    draw = torch.stack([torch.randperm(C) for _ in range(N)]).cpu()
    if kind == "overlapping":
        return [draw[:, :5], draw[:, 3:8]]
    if kind == "the same":
        return [draw[:, :4], draw[:, :4].flip(1)]
    if kind == "apart":
        return [draw[:, :4], draw[:, 6:10]]
    if kind == "of different sizes":
        return [draw[:, :1], draw[:, :9]]
    if kind == "of all classes but one":
        return [draw[:, 1:], draw[:, :-1]]
    if kind == "of all classes":
        return [draw, draw.flip(1)]
    twice = draw[:, :6].clone()  # "with classes named twice"
    twice[:, 2], twice[:, 5] = twice[:, 0], twice[:, 0]
    return [twice, draw[:, [7, 7]]]


KINDS = (
    "overlapping",
    "the same",
    "apart",
    "of different sizes",
    "of all classes but one",
    "of all classes",
    "with classes named twice",
)


def _case(kind, empty=False):
    """Student, indices, log-probabilities (some -inf if ``empty``), weights, labels: float32."""
    indices = _supports(kind)
    log_probs = [torch.rand(i.shape).add(0.05).div(1.2 * i.shape[1]).log() for i in indices]
    if empty:
        for x in log_probs:
            x[:, 0] = -torch.inf
            x[:, -1] = math.log(0.25)
    student = (3 * torch.randn(N, C)).requires_grad_()
    weights = torch.rand(N, 2).add(0.1).requires_grad_()
    return convert((student, indices, log_probs, weights, torch.randint(0, C, (N,))), device=torch.device(DEVICE))


def _agrees(args, **options):
    back = torch.tensor([1.0, -2.0, 0.5, 3.0])
    got, grads = value_and_grads(af.topk_kd_loss, args, back, reduction="none", **options)
    want, want_grads = value_and_grads(_wanted, convert(args, device=torch.device("cpu")), back, **options)
    assert relative_error(got, want) <= 1e-6
    for grad, want_grad in zip(grads, want_grads):
        assert relative_error(grad, want_grad) <= 1e-5


def _calls(args, tail):
    yield args, {"tail": tail}
    yield (*args[:3], None), {"tail": tail, "temperature": 1.0}
    yield (*args[:4], None), {"tail": tail, "temperature": 0.5}


def dense_calls():
    """What the next test calls the loss with, but for values."""
    for kind in KINDS:
        for tail in TAILS:
            yield from _calls(_case(kind), tail)


@each_tail
@pytest.mark.parametrize("empty", [False, True], ids=["", "with entries of -inf"])
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_loss_of_the_dense_probabilities(kind, empty, tail, on):
    for args, options in _calls(_case(kind, empty), tail):
        _agrees(args, **options)


@each_tail
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_classes_are_multi_teacher_kd(tail, dtype, on):
    if not takes(on, dtype):
        pytest.skip("float64")
    n, classes = (6, 33) if on in ("cpp", "reference") else (3, 17)  # an interpreter's time
    student, teachers, weights, labels = CASES["multi_teacher_kd"].inputs(n, classes, 3, dtype=dtype)
    tops = [(z / 4).log_softmax(-1).topk(classes) for z in teachers]
    args = student, [t.indices for t in tops], [t.values for t in tops], weights, labels
    for reduction in ("none", "mean", "batchmean", "sum"):
        got, grads = value_and_grads(af.topk_kd_loss, args, tail=tail, reduction=reduction, label_smoothing=0.1)
        want, want_grads = value_and_grads(
            af.multi_teacher_kd_loss, (student, teachers, weights, labels), reduction=reduction, label_smoothing=0.1
        )
        assert relative_error(got, want) <= 1e-6
        assert all(relative_error(g, w) <= 1e-5 for g, w in zip(grads, want_grads))


def test_other_spellings_of_the_same_arguments(on):
    student, indices, log_probs, weights, labels = _case("the same")
    want, want_grads = value_and_grads(
        af.topk_kd_loss, (student, indices, log_probs, weights, labels), torch.ones(N), reduction="none"
    )
    stacked = (torch.stack(indices).int(), torch.stack(log_probs))
    torch.testing.assert_close(af.topk_kd_loss(student, *stacked, weights, labels.int(), reduction="none"), want)
    cube = (
        student.detach().view(2, 2, C).requires_grad_(),
        [i.view(2, 2, -1) for i in indices],
        tuple(x.view(2, 2, -1) for x in log_probs),
        weights.detach().view(2, 2, 2).requires_grad_(),
        labels.view(2, 2),
    )
    got, grads = value_and_grads(af.topk_kd_loss, cube, torch.ones(2, 2), reduction="none")
    torch.testing.assert_close(got, want.view(2, 2))
    for grad, want_grad in zip(grads, want_grads):
        torch.testing.assert_close(grad.view_as(want_grad), want_grad)
    got = af.topk_kd_loss(student, indices, log_probs, weights, labels, num_items_in_batch=10)
    torch.testing.assert_close(got, want.sum() / 10)
    module = af.TopKKDLoss(tail="uniform", temperature=2.0)
    torch.testing.assert_close(
        module(student, indices, log_probs, weights, labels),
        af.topk_kd_loss(student, indices, log_probs, weights, labels, tail="uniform", temperature=2.0),
    )
    assert "tail='uniform'" in repr(module)


@each_tail
def test_16_bit_inputs_and_mixed_ones(tail, on):
    student, indices, log_probs, weights, labels = _case("overlapping")
    given = [log_probs[0].bfloat16(), log_probs[1].half()]
    for dtype in (torch.bfloat16, torch.float32):
        z = student.detach().to(dtype).requires_grad_()
        args = (z, indices, given, weights, labels)
        got, grads = value_and_grads(af.topk_kd_loss, args, tail=tail)
        want, want_grads = value_and_grads(af.reference.topk_kd_loss, convert(args, dtype=torch.float64), tail=tail)
        assert relative_error(got, want) <= 1e-6
        assert grads[0].dtype == dtype and relative_error(grads[0], want_grads[0]) <= (
            2**-8 if dtype == torch.bfloat16 else 1e-5
        )


@each_tail
def test_ignored_rows_are_0_whatever_they_hold(tail, on):
    student, indices, log_probs, weights, labels = _case("overlapping")
    labels[1] = labels[3] = -100
    used = labels != -100
    rows = [student.detach()[used].requires_grad_(), [i[used] for i in indices], [x[used] for x in log_probs]]
    want, want_grads = value_and_grads(
        af.topk_kd_loss, (*rows, weights.detach()[used].requires_grad_(), labels[used]), tail=tail
    )
    z = student.detach().clone()
    z[1], log_probs[0][1], log_probs[1][3] = torch.nan, torch.nan, torch.inf
    indices[0][3], indices[1][1] = -5, 2**40
    for dtype in (torch.float32, torch.bfloat16):  # gradients from forward, and from backward
        args = (z.to(dtype).requires_grad_(), indices, log_probs, weights, labels)
        got, grads = value_and_grads(af.topk_kd_loss, args, tail=tail)
        assert all((g[~used] == 0).all() for g in grads)
        if dtype == torch.float32:
            torch.testing.assert_close(got, want)
            for grad, want_grad in zip(grads, want_grads):
                torch.testing.assert_close(grad[used], want_grad)
        each = af.topk_kd_loss(*args, tail=tail, reduction="none")
        assert (each[~used] == 0).all() and each.isfinite().all()
    got, grads = value_and_grads(af.topk_kd_loss, (*args[:4], torch.full_like(labels, -100)), tail=tail)
    assert got == 0 and all((g == 0).all() for g in grads)


@each_tail
def test_nan_stays_in_its_row(tail, on):
    student, indices, log_probs, weights, _ = _case("overlapping")
    clean, clean_grads = value_and_grads(
        af.topk_kd_loss, (student, indices, log_probs, weights), tail=tail, reduction="none"
    )
    others = [0, 2, 3]
    for where in (0, 1):
        z, given = student.detach().clone(), [x.clone() for x in log_probs]
        (z if where == 0 else given[1])[1, 2] = torch.nan
        loss, grads = value_and_grads(
            af.topk_kd_loss, (z.requires_grad_(), indices, given, weights), tail=tail, reduction="none"
        )
        assert loss.isnan().tolist() == [False, True, False, False]
        for got, want in zip((loss, *grads), (clean, *clean_grads)):
            torch.testing.assert_close(got[others], want[others])
        assert grads[0][1].isnan().all()


@each_tail
def test_a_teacher_of_weight_0_counts_nothing(tail, on):
    student, indices, log_probs, _, labels = _case("overlapping")
    want = value_and_grads(af.topk_kd_loss, (student, indices[:1], log_probs[:1], None, labels), tail=tail)
    for bad in (torch.nan, -torch.inf):
        given = [log_probs[0], torch.full_like(log_probs[1], bad)]
        got = value_and_grads(af.topk_kd_loss, (student, indices, given, torch.tensor([1.0, 0.0]), labels), tail=tail)
        torch.testing.assert_close(got, want)


@each_tail
def test_no_weight_at_all_is_no_loss(tail, on):
    student, indices, log_probs, weights, _ = _case("overlapping")
    none = torch.zeros_like(weights).requires_grad_()
    loss, grads = value_and_grads(af.topk_kd_loss, (student, indices, log_probs, none), tail=tail)
    assert loss == 0 and (grads[0] == 0).all() and grads[1].abs().max() < 1e-5


@each_tail
def test_all_probabilities_0(tail, on):
    """A teacher that gives none: no softmax to renormalize, nothing, or the uniform distribution."""
    student, indices, log_probs, _, _ = _case("overlapping")
    nothing = [torch.full_like(log_probs[0], -torch.inf)]
    loss, (grad,) = value_and_grads(af.topk_kd_loss, (student, indices[:1], nothing, None), tail=tail)
    if tail == "renormalize":
        assert loss.isnan()
    elif tail == "ignore":
        assert loss == 0 and (grad == 0).all()
    else:
        p = torch.full((N, C), 1 / (C - 5), dtype=torch.float64, device="cpu").scatter(1, indices[0].cpu(), 0)
        want = (p * (-math.log(C - 5) - (student.detach().double().cpu() / 4).log_softmax(1))).sum(1).mean() * 16
        assert relative_error(loss, want) <= 1e-6


def test_masked_classes_of_the_student(on):
    """Probability on a class of -inf makes the loss infinite with finite gradients, whoever gives it; -inf on both is 0."""
    student, indices, log_probs, _, _ = _case("apart")
    z = student.detach().clone()
    z[0, indices[0][0, 1]] = -torch.inf  # named
    z[1, next(c for c in range(C) if c not in indices[0][1].tolist())] = -torch.inf  # not named
    z[2, indices[0][2, 3]] = -torch.inf  # named with probability 0
    log_probs[0][2, 3] = -torch.inf
    z.requires_grad_()
    for tail in TAILS:
        loss, (grad,) = value_and_grads(
            af.topk_kd_loss, (z, indices[:1], log_probs[:1], None), tail=tail, reduction="none"
        )
        assert loss.isposinf().tolist() == [True, tail == "uniform", False, False]
        assert not loss.isnan().any() and grad.isfinite().all() and (grad[z == -torch.inf] == 0).all()
    _agrees((torch.where(z.isinf() & (torch.arange(N) != 2)[:, None], 0.0, z).detach().requires_grad_(), indices[:1], log_probs[:1], None), tail="renormalize")  # fmt: skip


@each_tail
def test_the_mixture_itself_is_the_minimum(tail, on):
    """Where q is p over its mass P, the gradient is 0 and the KL is P log P: 0, but for a tail that is ignored."""
    _, indices, log_probs, _, _ = _case("overlapping")
    p = torch.stack([_dense(i.cpu(), x.cpu(), tail) for i, x in zip(indices, log_probs)]).mean(0)
    student = (2 * (p / p.sum(1, keepdim=True)).log()).float().to(DEVICE).requires_grad_()
    loss, (grad,) = value_and_grads(
        af.topk_kd_loss, (student, indices, log_probs, None), tail=tail, temperature=2.0, reduction="none"
    )
    mass = p.sum(1)
    torch.testing.assert_close(loss.cpu().double(), 4 * mass * mass.log(), rtol=1e-5, atol=1e-5)
    assert (loss < -0.1).all() == (tail == "ignore") and grad.abs().max() <= 1e-5


def test_few_left_outside_beside_large_sums(on):
    """The tail "uniform" of one class, where a sum over all classes less that of the others would lose its digits."""
    wide = 600
    student = torch.randn(2, wide).mul(20)
    student[:, 7] = 1.0
    index = torch.cat([torch.arange(7), torch.arange(8, wide)]).expand(2, -1)
    log_prob = torch.full((2, wide - 1), -100.0)
    log_prob[:, 0] = math.log(0.25)
    want = af.reference.topk_kd_loss(
        student.double().cpu(), [index.cpu()], [log_prob.double().cpu()], None, tail="uniform"
    )
    assert relative_error(af.topk_kd_loss(student, [index], [log_prob], None, tail="uniform"), want) <= 1e-6


def test_16_bit_gradients_do_not_underflow_under_a_loss_scale(fused):
    student = torch.zeros(1, 60000, dtype=torch.half, requires_grad=True)
    index, log_prob = torch.tensor([[5, 59999]]), torch.tensor([[0.5, 0.25]]).log()
    scale = 2.0**22
    loss = af.topk_kd_loss(student, [index], [log_prob], None, tail="ignore", temperature=1.0)
    (grad,) = torch.autograd.grad(scale * loss, student)
    want = scale * torch.tensor(0.75 / 60000).double()
    torch.testing.assert_close(grad[0, 6:100].double(), want.expand(94), rtol=1e-2, atol=0)
    assert grad[0, 5].isinf()  # -2^21 is too much for half


@cpu_only
def test_no_teacher_is_made_dense():
    """Peak memory of a child process: the student's gradient, and little beside it. Eight dense teachers would be 400 MB."""
    code = """
import resource, torch, amtml_fast as af
n, c, k, t = 64, 200_000, 32, 8
s = torch.randn(n, c, requires_grad=True)
i = [torch.randint(0, c, (n, k)) for _ in range(t)]
both = dict(tail="uniform"), dict(tail="bucket", support="student", return_stats=True)
p = [torch.full((n, k), -5.0) for _ in range(t)]
w = torch.full((n, t), 1 / t, requires_grad=True)
for options in both:
    af.topk_kd_loss(s[:1], [x[:1] for x in i], [x[:1] for x in p], w[:1], **options)
s.grad = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for options in both:
    out = af.topk_kd_loss(s, i, p, w, **options)
    (out[0] if "return_stats" in options else out).backward()
    out = s.grad = None
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10, 4 * n * c / 2**20)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    taken, gradient = map(float, run.stdout.split())
    assert taken < gradient + 30, (taken, gradient)


Z, W = torch.zeros(4, 5), torch.full((4, 2), 0.5)
I2, P2 = [torch.zeros(4, 3, dtype=torch.long)] * 2, [torch.zeros(4, 3)] * 2
Y = torch.zeros(4, dtype=torch.long)
# fmt: off
BAD = [  # one call a line
    (lambda: af.topk_kd_loss(Z, I2, [P2[0], P2[1][:, :2]], W), r"teacher_log_probs\[1\] must be \[4, 3\] like teacher_indices\[1\], got \[4, 2\]"),
    (lambda: af.topk_kd_loss(Z, [I2[0], I2[1][:3]], P2, W), r"teacher_indices\[1\] must be \[4, k\] with 1 <= k <= 5, got \[3, 3\]"),
    (lambda: af.topk_kd_loss(Z, [I2[0][:, :0]], [P2[0][:, :0]], None), r"teacher_indices\[0\] must be \[4, k\] with 1 <= k <= 5, got \[4, 0\]"),
    (lambda: af.topk_kd_loss(Z[:, :2], I2, P2, W), r"with 1 <= k <= 2, got \[4, 3\]"),
    (lambda: af.topk_kd_loss(Z.view(2, 2, 5), I2, P2, W), r"teacher_indices\[0\] must be \[2, 2, k\]"),
    (lambda: af.topk_kd_loss(Z, I2, P2[:1], W), "teacher_log_probs must hold 2 teachers like teacher_indices, got 1"),
    (lambda: af.topk_kd_loss(Z, [], [], W), "teacher_indices must hold at least one teacher"),
    (lambda: af.topk_kd_loss(Z, I2[0], P2, W), r"teacher_indices must be a list of tensors or one \[T, N, k\] tensor"),
    (lambda: af.topk_kd_loss(Z, 3, P2, W), "teacher_indices must be a list of tensors or one .*tensor, got int"),
    (lambda: af.topk_kd_loss(Z, P2, P2, W), r"teacher_indices\[0\] must be an int64 or int32 tensor, got torch.float32"),
    (lambda: af.topk_kd_loss(Z, I2, I2, W), r"teacher_log_probs\[0\] must be float32"),
    (lambda: af.topk_kd_loss(Z, I2, [P2[0].clone().requires_grad_(), P2[1]], W), r"teacher_log_probs\[0\] must be detached"),
    (lambda: af.topk_kd_loss(Z, [I2[0], I2[1] + 5], P2, W), r"teacher_indices\[1\] must be in \[0, 5\), got 5 in row 0"),
    (lambda: af.topk_kd_loss(Z, [I2[0] - 1, I2[1]], P2, W), r"teacher_indices\[0\] must be in \[0, 5\), got -1 in row 0"),
    (lambda: af.topk_kd_loss(Z, [I2[0] + 2**32, I2[1]], P2, W), r"teacher_indices\[0\] must be in \[0, 5\), got 4294967296"),
    (lambda: af.topk_kd_loss(Z, I2, P2, W[:, :1]), r"teacher_weights must be \[2\] or \[4, 2\] for 2 teachers, got \[4, 1\]"),
    (lambda: af.topk_kd_loss(Z, I2, P2, -W), "teacher_weights must be finite and not negative"),
    (lambda: af.topk_kd_loss(Z, I2, P2, W, Y + 5), r"labels\[0\] must be in \[0, 5\) or ignore_index -100, got 5"),
    (lambda: af.topk_kd_loss(Z, I2, P2, W, Y[:3]), r"labels must be \[4\] like student_logits, got \[3\]"),
    (lambda: af.topk_kd_loss(Z, I2, P2, W, tail="zero"), "tail must be one of renormalize, ignore, uniform, bucket, got 'zero'"),
    (lambda: af.topk_kd_loss(Z, I2, P2, W, reduction="avg"), "reduction must be one of none"),
    (lambda: af.topk_kd_loss(Z, I2, P2, W, temperature=0.0), "temperature must be a number"),
    (lambda: af.topk_kd_loss(Z, I2, P2, W, alpha=2.0), "alpha must be a number"),
    (lambda: af.topk_kd_loss(Z, I2, P2, W, label_smoothing=1.5), "label_smoothing must be a number"),
    (lambda: af.topk_kd_loss(Z, I2, P2, W, reduction="sum", num_items_in_batch=3), "num_items_in_batch must be None"),
    (lambda: af.topk_kd_loss(Z[0], I2, P2, W), r"student_logits must be \[N, C\]"),
]
# fmt: on


@pytest.mark.skipif(CHOSEN == "gpu", reason="the same checks, on tensors of the CPU")
@pytest.mark.parametrize(("call", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(on, call, message):
    with pytest.raises((ValueError, TypeError), match="topk_kd_loss: .*" + message.removeprefix("topk_kd_loss: ")):
        call()


@cpu_only
def test_compiled_code_still_refuses_wrong_values():
    """Checks of values cannot be traced, so the kernel itself looks before it reads."""
    torch._dynamo.reset()
    compiled = torch.compile(af.topk_kd_loss, fullgraph=True, backend="aot_eager")
    indices = [i.clone() for i in I2]
    compiled(Z, indices, P2, W, Y)
    with torch.compiler.set_stance("fail_on_recompile"):  # it is the same code that refuses
        with pytest.raises(RuntimeError, match=r"topk_kd_loss: teacher_indices must be in \[0, 5\), got 7 in row 0"):
            compiled(Z, [indices[0] + 7, indices[1]], P2, W, Y)
        with pytest.raises(RuntimeError, match=r"topk_kd_loss: labels\[0\] must be in \[0, 5\)"):
            compiled(Z, indices, P2, W, Y + 5)
        with pytest.raises(RuntimeError, match="topk_kd_loss: teacher_weights must be finite and not negative"):
            compiled(Z, indices, P2, -W, Y)
