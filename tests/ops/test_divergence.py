"""Divergences, modes, temperatures and numbers by row of multi_teacher_kd_loss, from their formulas; statistics; bad input."""

import itertools
import math

import pytest
import torch
from backends import CHOSEN, cpu_only, takes

import amtml_fast as af
from amtml_fast.ops.divergence import ALL_MODES, DIVERGENCES
from amtml_fast.testing import convert, relative_error

pytestmark = pytest.mark.usefixtures("on")
N, C, T = 6, 9, 3
PAIRS = list(itertools.product(DIVERGENCES, ALL_MODES))
EVERY = pytest.mark.parametrize(("divergence", "mode"), PAIRS)
# An interpreter has time for a third of them, which has every divergence and every mode.
SOME = [
    pytest.mark.parametrize(
        ("divergence", "mode"),
        [pair for i, pair in enumerate(PAIRS) if CHOSEN in ("", "gpu") or (i + i // 3) % 3 == part],
    )
    for part in range(3)
]
BETA = {"jsd": 0.3, "skew_kl": 0.2, "skew_reverse_kl": 0.4}


def _problem(dtype=torch.float32, n=N, c=C):
    g = torch.Generator().manual_seed(3)
    here = torch.get_default_device()
    draw = lambda *size: torch.randn(size, generator=g, device="cpu").to(here)  # noqa: E731
    labels = torch.randint(0, c, (n,), generator=g, device="cpu")
    labels[1] = -100
    student = (2 * draw(n, c)).to(dtype).requires_grad_()
    weights = draw(n, T).softmax(1).requires_grad_()
    alpha = draw(n).sigmoid().requires_grad_()
    return student, [(2 * draw(n, c)).to(dtype) for _ in range(T)], weights, labels.to(here), alpha, draw(n).exp() + 0.5


def _kl(a, b):
    return (a * (a / b).log()).sum()


def _distance(name, beta, p, q):
    """docs/method.md, line by line."""
    if name == "forward_kl":
        return _kl(p, q)
    if name == "reverse_kl":
        return _kl(q, p)
    if name == "jsd":
        m = beta * p + (1 - beta) * q
        return beta * _kl(p, m) + (1 - beta) * _kl(q, m)
    if name == "skew_kl":
        return _kl(p, beta * p + (1 - beta) * q)
    if name == "skew_reverse_kl":
        return _kl(q, (1 - beta) * p + beta * q)
    return (p - q).abs().sum() / 2


def _by_hand(student, teachers, weights, labels, alpha, temperature, divergence, beta, mode, of_teachers):
    """The loss of each row, in float64, one row at a time."""
    rows = []
    for i in range(len(student)):
        if labels[i] == -100:
            rows.append(student.new_zeros(()))
            continue
        tau, w, a = temperature[i], weights[i], alpha[i]
        q = (student[i] / tau).softmax(0)
        scaled = [z[i] / by for z, by in zip(teachers, of_teachers)]
        if mode == "sum":
            distance = sum(w[t] * _distance(divergence, beta, x.softmax(0), q) for t, x in enumerate(scaled))
        else:
            mixed = sum(w[t] * (x.softmax(0) if mode == "mixture" else x) for t, x in enumerate(scaled))
            distance = _distance(divergence, beta, mixed if mode == "mixture" else mixed.softmax(0), q)
        ce = torch.nn.functional.cross_entropy(student[i : i + 1], labels[i : i + 1])
        rows.append((1 - a) * ce + a * tau**2 * distance)
    return torch.stack(rows)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_its_formula(divergence, mode, dtype):
    problem = _problem(dtype)
    options = dict(divergence=divergence, beta=BETA.get(divergence), mode=mode)
    leaves = [problem[i] for i in (0, 2, 4)]
    upstream = torch.linspace(-1, 1, N)

    def gradients(rows, leaves):
        return torch.autograd.grad(rows, leaves, upstream.to(rows))

    exact = convert(problem, dtype=torch.float64)
    want = _by_hand(*exact, divergence, options["beta"], mode, (1.5, 2.0, 0.7))
    student, teachers, weights, labels, alpha, temperature = problem
    got = af.multi_teacher_kd_loss(
        student, teachers, weights, labels, alpha=alpha, temperature=temperature,
        teacher_temperature=(1.5, 2.0, 0.7), reduction="none", **options,
    )  # fmt: skip
    assert relative_error(got, want) <= 1e-6
    step = 2**-8 if dtype == torch.bfloat16 else 0
    for g, w, leaf in zip(gradients(got, leaves), gradients(want, [exact[i] for i in (0, 2, 4)]), leaves):
        assert g.dtype == leaf.dtype
        assert relative_error(g, w.to(g.dtype)) <= 1e-5 + (step if g.dtype == dtype else 0)


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
def test_alpha_by_row_is_reduced_as_the_loss_is(reduction):
    student, teachers, weights, labels, alpha, _ = _problem()
    options = dict(divergence="jsd", temperature=2.0)
    rows = {
        a: af.multi_teacher_kd_loss(student, teachers, weights, labels, alpha=a, reduction="none", **options)
        for a in (0.0, 1.0)
    }
    by = {"sum": 1, "batchmean": N - 1, "mean": N - 1}[reduction]
    ce, kl = rows[0.0] / by, rows[1.0] / (by * (C if reduction == "mean" else 1))
    got = af.multi_teacher_kd_loss(student, teachers, weights, labels, alpha=alpha, reduction=reduction, **options)
    torch.testing.assert_close(got, ((1 - alpha) * ce + alpha * kl).sum())
    torch.testing.assert_close(torch.autograd.grad(got, alpha)[0], (kl - ce).detach())


@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_one_number_for_all_rows_may_be_a_tensor(reduction):
    """A learned or scheduled alpha: its gradient is the sum over rows. Hidden states take it, too."""
    student, teachers, weights, labels, *_ = _problem()
    layer = torch.eye(C, dtype=student.dtype)

    def logits(**options):
        return af.multi_teacher_kd_loss(student, teachers, weights, labels, reduction=reduction, **options)

    def hidden(**options):
        return af.fused_linear_kd_loss(student, layer, teachers, weights, labels, reduction=reduction, **options)

    for loss in (logits, hidden):
        one = torch.tensor(0.3, requires_grad=True)
        each = torch.full((N,), 0.3, requires_grad=True)
        tau = torch.tensor(2.0)
        got, want = loss(alpha=one, temperature=tau), loss(alpha=each, temperature=tau.expand(N))
        assert torch.equal(got, want)
        torch.testing.assert_close(got, loss(alpha=0.3, temperature=2.0), rtol=1e-5, atol=1e-6)
        (slope,), (slopes,) = (torch.autograd.grad(x.sum(), a) for x, a in ((got, one), (want, each)))
        torch.testing.assert_close(slope, slopes.sum())
        assert slope.shape == () and slope != 0


def test_three_dimensions_and_a_count_of_items():
    student, teachers, weights, labels, alpha, temperature = _problem()
    options = dict(divergence="reverse_kl", return_stats=True)
    flat, of_rows = af.multi_teacher_kd_loss(
        student, teachers, weights, labels, alpha=alpha, temperature=temperature, reduction="none", **options
    )
    cube = student.view(2, 3, C), [z.view(2, 3, C) for z in teachers], weights.view(2, 3, T), labels.view(2, 3)
    numbers = dict(alpha=alpha.view(2, 3), temperature=temperature.view(2, 3))
    got, stats = af.multi_teacher_kd_loss(*cube, reduction="none", **numbers, **options)
    torch.testing.assert_close(got, flat.view(2, 3))
    by_row = af.multi_teacher_kd_loss(*cube, alpha=alpha, temperature=temperature, reduction="none", **options)[0]
    torch.testing.assert_close(by_row, got)
    assert stats.teacher_kl.shape == (2, 3, T) and stats.agreement.shape == (2, 3)
    torch.testing.assert_close(stats.teacher_kl.view(N, T), of_rows.teacher_kl)
    counted, _ = af.multi_teacher_kd_loss(*cube, num_items_in_batch=7, **numbers, **options)
    torch.testing.assert_close(counted, flat.sum() / 7)


@pytest.mark.parametrize("mode", ALL_MODES)
def test_statistics(mode):
    student, teachers, weights, labels, _, temperature = _problem()
    of_teachers = (1.5, 2.0, 0.7)
    loss, stats = af.multi_teacher_kd_loss(
        student,
        teachers,
        weights,
        labels,
        mode=mode,
        temperature=temperature,
        teacher_temperature=of_teachers,
        return_stats=True,
    )
    plain = af.multi_teacher_kd_loss(
        student, teachers, weights, labels, mode=mode, temperature=temperature, teacher_temperature=of_teachers
    )
    torch.testing.assert_close(loss, plain)
    z, ts, w, *_, tau = convert(_problem(), dtype=torch.float64)
    q = (z / tau[:, None]).softmax(1)
    ps = [(t / by).softmax(1) for t, by in zip(ts, of_teachers)]
    p = sum(w[:, t, None] * x for t, x in enumerate(ps))
    if mode == "logits":
        p = sum(w[:, t, None] * z / by for (t, z), by in zip(enumerate(ts), of_teachers)).softmax(1)
    entropy = lambda x: -(x * x.log()).sum(1)  # noqa: E731
    kls = torch.stack([(x * (x / q).log()).sum(1) for x in ps], 1)
    want = entropy(q), entropy(p), kls, torch.ones(N), (q.argmax(1) == p.argmax(1)).double()
    for name, got, right in zip(stats._fields, stats, want):
        right = right.detach().to(torch.float32).clone()
        right[1] = 0  # ignored
        assert not got.requires_grad
        torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-6, msg=name)


def test_the_defaults_are_equation_8():
    student, teachers, weights, labels, *_ = _problem()
    args = student, teachers, weights, labels
    rows = torch.full((N,), 0.7), torch.full((N,), 4.0)
    want = torch.autograd.grad(af.multi_teacher_kd_loss(*args), (student, weights))
    for options in (
        dict(alpha=rows[0]),
        dict(temperature=rows[1]),
        dict(teacher_temperature=4.0),
        dict(teacher_temperature=[4.0] * T),
    ):
        loss = af.multi_teacher_kd_loss(*args, **options)
        torch.testing.assert_close(loss, af.multi_teacher_kd_loss(*args))
        torch.testing.assert_close(torch.autograd.grad(loss, (student, weights)), want)


@SOME[1]
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_finite_mask_that_temperature_makes_infinite_masks(dtype, divergence, mode):
    """torch.finfo(dtype).min over a temperature below 1 is -inf in float32."""
    student, teachers, weights, labels, _, _ = _problem(dtype)
    options = dict(divergence=divergence, mode=mode, temperature=0.5, alpha=0.7, return_stats=True)
    found = []
    for mask in (torch.finfo(dtype).min, -math.inf):
        with torch.no_grad():
            for x in (student, *teachers):
                x[:, [0, 5]] = mask
            labels = labels.masked_fill((labels == 0) | (labels == 5), 1)
        loss, stats = af.multi_teacher_kd_loss(student, teachers, weights, labels, **options)
        found.append((loss, *torch.autograd.grad(loss, (student, weights)), *stats))
    assert found[1][0].isfinite()
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@SOME[0]
def test_masked_classes_count_nothing(divergence, mode):
    """A vocabulary padded with -inf on both sides is the smaller vocabulary."""
    student, teachers, weights, labels, *_ = _problem()
    pad = lambda x: torch.nn.functional.pad(x, (0, 4), value=-math.inf)  # noqa: E731
    options = dict(divergence=divergence, mode=mode, reduction="sum")
    want = af.multi_teacher_kd_loss(student, teachers, weights, labels, **options)
    wide = pad(student.detach()).requires_grad_()
    got = af.multi_teacher_kd_loss(wide, [pad(t) for t in teachers], weights, labels, **options)
    torch.testing.assert_close(got, want)
    (of_wide, of_weights), grads = (torch.autograd.grad(x, (y, weights)) for x, y in ((got, wide), (want, student)))
    torch.testing.assert_close((of_wide[:, :C], of_weights), grads)
    assert not of_wide[:, C:].any()


@SOME[1]
def test_classes_that_one_side_alone_has(divergence, mode):
    """A student's or a teacher's -inf: as the formulas say, and never NaN."""
    student, teachers, weights, *_ = _problem()
    student = student.detach().clone()
    student[:, 0] = -math.inf
    teachers[0][:, 0] = -math.inf
    for t in teachers:
        t[:, 1] = -math.inf
    teachers[1][:, 2] = -math.inf
    student[:, 3] = -88.0  # a probability next to 0, which no teacher has
    for t in teachers:
        t[:, 3] = -math.inf
    options = dict(divergence=divergence, mode=mode, reduction="none", temperature=1.0)

    def run(student, teachers, weights):
        leaf = student.requires_grad_()
        rows = af.multi_teacher_kd_loss(leaf, teachers, weights, None, **options)
        return rows.detach(), *torch.autograd.grad(rows, (leaf, weights), torch.ones_like(rows))

    with af.use_backend("reference"):
        want = run(*convert((student, teachers, weights), dtype=torch.float64))
    got = run(student, teachers, weights)
    infinite = divergence == "reverse_kl" or (divergence == "forward_kl" and mode != "logits")
    assert (got[0] == math.inf).all() if infinite else got[0].isfinite().all()
    assert got[1].isfinite().all() and not got[1][:, 0].any()
    if divergence == "reverse_kl":
        assert got[1][:, 1].abs().max() <= 1e-6
    for g, w in zip(got, want):
        torch.testing.assert_close(g.double(), w, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", ["jsd", "skew_kl", "skew_reverse_kl"])
def test_a_mixture_above_1_where_the_student_has_hardly_anything(divergence, dtype, on):
    """q / m is rounded to 0 there, and q is not: such a class adds what the mixture's mass alone makes."""
    if not takes(on, dtype):
        pytest.skip("no float64")
    far = torch.arange(740, 747, 0.25) if dtype == torch.float64 else torch.arange(84, 106, 0.25)
    student = torch.stack([torch.zeros_like(far), -far], 1).to(dtype).requires_grad_()
    teacher, weights = student.detach().flip(1), torch.full((1,), 1000.0, dtype=dtype)
    loss = af.multi_teacher_kd_loss(
        student, [teacher], weights, temperature=1.0, divergence=divergence, reduction="none"
    )
    (grad,) = torch.autograd.grad(loss.sum(), student)
    q, p = torch.tensor([[1.0, 1e-300], [1e-300, 1000.0]], dtype=torch.float64, device="cpu")
    want = _distance(divergence, {"jsd": 0.5}.get(divergence, 0.1), p, q)
    # The tolerance is that of sums of 1000.
    torch.testing.assert_close(loss.detach().cpu().double(), want.expand(len(far)), rtol=1e-5, atol=1e-4)
    assert grad.abs().max() <= 1e-30


def test_reverse_kl_of_teachers_far_below_the_smallest_number():
    """exp(-300) is no float32, but its logarithm is, and the teacher that is nearer gets all of the weight's gradient."""
    student = torch.tensor([[0.0, 1.0, 0.5]], requires_grad=True)
    teachers = [torch.tensor([[0.0, -300.0, 1.0]]), torch.tensor([[0.0, -310.0, -1.0]])]
    weights = torch.tensor([[0.4, 0.6]], requires_grad=True)
    for mode in ALL_MODES:
        options = dict(divergence="reverse_kl", mode=mode, temperature=1.0)
        loss = af.multi_teacher_kd_loss(student, teachers, weights, **options)
        exact = convert((student, teachers, weights), dtype=torch.float64)
        want = af.reference.multi_teacher_kd_loss(*exact, **options)
        assert relative_error(loss, want) <= 1e-6 and want > 100
        for g, w in zip(torch.autograd.grad(loss, (student, weights)), torch.autograd.grad(want, (exact[0], exact[2]))):
            assert relative_error(g, w) <= 1e-5


@pytest.mark.parametrize("apart", [60.0, 100.0, 1000.0])
def test_reverse_kl_beside_a_teacher_without_weight_that_knows_better(apart):
    """What one class makes of its weight's gradient is q p_t / p, e^apart here. Too large for float32, it counts nothing."""
    student = torch.tensor([[0.0, -1.0]], requires_grad=True)
    teachers = [torch.tensor([[-apart, 0.0]]), torch.tensor([[0.0, -1.0]])]
    weights = torch.tensor([[1.0, 0.0]], requires_grad=True)
    loss = af.multi_teacher_kd_loss(student, teachers, weights, divergence="reverse_kl", temperature=1.0)
    with af.use_backend("reference"):
        want = af.multi_teacher_kd_loss(student, teachers, weights, divergence="reverse_kl", temperature=1.0)
    got = torch.autograd.grad(loss, (student, weights))
    for g, w in zip(got, torch.autograd.grad(want, (student, weights)), strict=True):
        assert g.isfinite().all() and relative_error(g, w) <= 1e-5
    assert (got[1][0, 1] < -1e20) == (apart < 88)


@SOME[2]
@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_student_that_equals_its_target_learns_nothing(divergence, mode, temperature):
    z = (3 * torch.randn(4, 50)).requires_grad_()
    loss = af.multi_teacher_kd_loss(z, [z.detach()], None, divergence=divergence, mode=mode, temperature=temperature)
    (grad,) = torch.autograd.grad(loss, z)
    if (divergence, mode) == ("tvd", "logits"):
        return  # has no gradient that is near 0: softmax(z / tau) and softmax(w z / tau) may differ in their last bit
    assert abs(loss.item()) <= 1e-6 * temperature**2 + 1e-9
    assert grad.abs().max() <= 1e-6 * temperature


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_weights_of_mixed_logits_keep_their_digits_at_high_temperatures(divergence, on):
    """Probabilities are close to one another there, and a teacher's largest logit is far from the others."""
    g = torch.Generator("cpu").manual_seed(2)
    student, *teachers = (
        2 * torch.randn(3, 300, generator=g, device="cpu").to(torch.get_default_device()) for _ in range(3)
    )
    for teacher in teachers:
        teacher[:, 3] += 20
    weights = torch.tensor([[0.3, 0.7], [0.5, 0.5], [0.9, 0.1]], requires_grad=True)
    options = {"divergence": divergence, "mode": "logits", "temperature": 100.0}
    (got,) = torch.autograd.grad(af.multi_teacher_kd_loss(student, teachers, weights, **options), weights)
    with af.use_backend("reference"):
        exact = convert((student, teachers, weights), dtype=torch.float64)
        (want,) = torch.autograd.grad(af.multi_teacher_kd_loss(*exact, **options), exact[2])
    assert ((got - want).norm() / want.norm()).item() <= 1e-5


def test_a_row_that_is_ignored_may_hold_anything():
    student, teachers, weights, labels, alpha, temperature = _problem()
    want = af.multi_teacher_kd_loss(
        student, teachers, weights, labels, alpha=alpha, temperature=temperature, divergence="jsd"
    )
    wanted = torch.autograd.grad(want, (student, weights, alpha))
    bad = [x.detach().clone() for x in (student, weights, alpha, temperature)]
    bad[0][1], bad[2][1], bad[3][1] = math.nan, 7.0, -1.0
    for t in teachers:
        t[1] = math.nan
    leaves = [x.requires_grad_() for x in bad[:3]]
    got = af.multi_teacher_kd_loss(
        leaves[0], teachers, leaves[1], labels, alpha=leaves[2], temperature=bad[3], divergence="jsd"
    )
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), wanted)
    assert all(not g[1].any() for g in wanted)


@SOME[0]
def test_nan_stays_in_its_row(divergence, mode):
    student, teachers, weights, *_ = _problem()
    teachers[1][2, 3] = math.nan
    rows = af.multi_teacher_kd_loss(student, teachers, weights, divergence=divergence, mode=mode, reduction="none")
    grads = torch.autograd.grad(rows, (student, weights), torch.ones_like(rows))
    others = torch.arange(N) != 2
    assert rows[2].isnan() and rows[others].isfinite().all() and all(g[others].isfinite().all() for g in grads)
    assert grads[0][2].isnan().all()  # nor is it lost
    without = weights.detach().clone()
    without[:, 1] = 0
    rows = af.multi_teacher_kd_loss(student, teachers, without, divergence=divergence, mode=mode, reduction="none")
    assert rows.isfinite().all()  # a teacher without weight
    teachers[0][2, 3] = -math.inf
    for order in ([0, 1, 2], [1, 0, 2], [2, 1, 0]):
        given = [teachers[t] for t in order], weights[:, order]
        rows = af.multi_teacher_kd_loss(student, *given, divergence=divergence, mode=mode, reduction="none")
        assert rows[2].isnan()  # another teacher's mask does not hide it


@SOME[1]
@pytest.mark.parametrize(
    "long",
    [
        pytest.param(False, marks=pytest.mark.skipif(CHOSEN == "triton", reason="other tests have such rows")),
        pytest.param(True, marks=pytest.mark.skipif(CHOSEN != "triton", reason="Triton reads such in chunks")),
    ],
)
def test_rows_of_several_chunks(long, divergence, mode, on, monkeypatch):
    """One without masks, one with classes that one side alone has, one with a NaN."""
    if long:
        monkeypatch.setattr("amtml_fast.kernels.multi_teacher_kd.HELD_BYTES", 0)
        monkeypatch.setattr("amtml_fast.kernels.multi_teacher_kd.LONG_WARPS", 1)
    student, teachers, weights, labels, *_ = _problem(n=3, c=301)
    with torch.no_grad():
        student[1, 3:100] = -math.inf
    teachers[0][1, 90:200] = -math.inf
    teachers[1][2, 250] = math.nan
    options = dict(divergence=divergence, mode=mode, reduction="none", label_smoothing=0.1, return_stats=True)
    labels = torch.full_like(labels, 290)

    def run(student, weights, teachers):
        rows, stats = af.multi_teacher_kd_loss(student, teachers, weights, labels, **options)
        return rows.detach(), *torch.autograd.grad(rows[:2].sum(), (student, weights)), *stats

    with af.use_backend("reference"):
        want = run(*convert((student, weights, teachers), dtype=torch.float64))
    got = run(student, weights, teachers)
    assert got[0][2].isnan()
    for g, w in zip(got, want):
        torch.testing.assert_close(g[:2].double(), w[:2], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_torch_compile(on):
    if on == "reference" and CHOSEN:
        pytest.skip("traced beside the CPU's kernels")
    torch._dynamo.reset()
    student, teachers, weights, labels, alpha, temperature = _problem()
    compiled = torch.compile(af.multi_teacher_kd_loss, fullgraph=True, backend="aot_eager")
    options = dict(
        alpha=alpha,
        temperature=temperature,
        divergence="skew_kl",
        teacher_temperature=[1.0, 2.0, 3.0],
        return_stats=True,
    )
    got, want = (f(student, teachers, weights, labels, **options) for f in (compiled, af.multi_teacher_kd_loss))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x[0], (student, weights, alpha)) for x in (got, want)))


BAD = {
    r"divergence must be one of forward_kl, .*, tvd, got 'kl'": dict(divergence="kl"),
    "mode must be one of mixture, sum, logits, got": dict(mode="logit"),
    'beta must be None with divergence "forward_kl", got 0.5': dict(beta=0.5),
    'beta must be None with divergence "tvd", got 0.5': dict(divergence="tvd", beta=0.5),
    r'beta must be a number between 0 and 1, both excluded, with divergence "jsd", got 0': dict(divergence="jsd", beta=0),
    r'beta must be a number between 0 and 1, both excluded, with divergence "skew_kl", got nan': dict(divergence="skew_kl", beta=math.nan),
    r'beta must be a number between .*, got True': dict(divergence="jsd", beta=True),
    r"teacher_temperature must be a number in .*, got 0": dict(teacher_temperature=0.0),
    r"teacher_temperature must be a number or 3 numbers, one for each teacher, got 2": dict(teacher_temperature=[1.0, 2.0]),
    r"teacher_temperature\[1\] must be a number in .*, got -2": dict(teacher_temperature=[1.0, -2.0, 1.0]),
    r"alpha must be a number or \[6\], got \[5\]": dict(alpha=torch.ones(5)),
    r"temperature must be a number or \[6\], got \[6, 1\]": dict(temperature=torch.ones(6, 1)),
    r"temperature must be detached \(it gets no gradient\), got one that requires grad": dict(temperature=torch.ones(6, requires_grad=True)),
    r"temperature must be positive and finite, got 0 in row 2": dict(temperature=torch.tensor([1.0, 1, 0, 1, 1, 1])),
    r"temperature must be positive and finite, got inf in row 0": dict(temperature=torch.tensor([math.inf, 1, 0, 1, 1, 1])),
    r"alpha must be in \[0, 1\], got 1.5 in row 3": dict(alpha=torch.tensor([1.0, 9, 0, 1.5, 1, 1])),
    r"alpha must be in \[0, 1\], got nan in row 0": dict(alpha=torch.tensor([math.nan, 9, 0, 1, 1, 1])),
    r"alpha must be float32, bfloat16, float16 or float64, got torch.int64": dict(alpha=torch.ones(6, dtype=torch.int64)),
    r"label_smoothing must be a number in \[0, 1\], got 2": dict(divergence="jsd", label_smoothing=2.0),
    r"alpha must be a number in \[0, 1\], got -1": dict(divergence="jsd", alpha=-1.0),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message, on):
    options = {
        k: v.to(torch.get_default_device()).requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v
        for k, v in BAD[message].items()
    }
    by_value = " in row " in message
    if by_value and torch.get_default_device().type != "cpu":
        pytest.skip("values are not looked at there")
    student, teachers, weights, labels, *_ = _problem()
    with pytest.raises((ValueError, TypeError), match="multi_teacher_kd_loss: " + message):
        af.multi_teacher_kd_loss(student, teachers, weights, labels, **options)


def test_modules_take_the_same_keywords():
    student, teachers, weights, labels, alpha, temperature = _problem()
    options = dict(divergence="skew_kl", beta=0.2, mode="logits", teacher_temperature=2.0, return_stats=True)
    module = af.MultiTeacherKDLoss(**options)
    by_row = dict(alpha=alpha, temperature=temperature)
    got = module(student, teachers, weights, labels, **by_row)
    want = af.multi_teacher_kd_loss(student, teachers, weights, labels, **options, **by_row)
    torch.testing.assert_close(got, want)
    assert not torch.equal(got[0], module(student, teachers, weights, labels)[0])


@cpu_only
def test_numbers_of_rows_on_another_device_are_named():
    student, teachers, weights, labels, alpha, temperature = _problem()
    for name, value in (("alpha", alpha), ("temperature", temperature)):
        with pytest.raises(ValueError, match=f"{name} must be on cpu like student_logits, got meta"):
            af.multi_teacher_kd_loss(student, teachers, weights, labels, **{name: value.to("meta")})


def test_a_temperature_that_requires_grad_is_taken_where_nobody_asks_for_one():
    student, teachers, weights, labels, _, temperature = _problem()
    want = af.multi_teacher_kd_loss(student, teachers, weights, labels, temperature=temperature)
    with torch.no_grad():
        asked = temperature.clone().requires_grad_()
        assert af.multi_teacher_kd_loss(student, teachers, weights, labels, temperature=asked) == want


def test_alpha_by_row_needs_labels():
    student, teachers, weights, _, alpha, _ = _problem()
    with pytest.raises(ValueError, match=r"alpha must be a number without labels .*, got a tensor"):
        af.multi_teacher_kd_loss(student, teachers, weights, alpha=alpha)


@cpu_only  # GPU kernels take no float64
def test_float64():
    student, teachers, weights, labels, *_ = convert(_problem(), dtype=torch.float64)
    for divergence, mode in itertools.product(DIVERGENCES, ALL_MODES):
        torch.autograd.gradcheck(
            lambda z, w, d=divergence, m=mode: af.multi_teacher_kd_loss(z, teachers, w, labels, divergence=d, mode=m),
            (student, weights),
        )


@EVERY
def test_a_teacher_without_weight_counts_nothing(divergence, mode):
    """Whatever it holds, and the gradient of its weight is as the reference has it."""
    student, teachers, weights, labels, *_ = _problem()
    teachers[0][0] = math.nan
    teachers[0][2, 1:4] = -math.inf
    weights = weights.detach().clone()
    weights[:3, 0] = 0
    args = student, teachers, weights.requires_grad_(), labels
    options = dict(divergence=divergence, mode=mode, reduction="none", return_stats=True)

    def run(args):
        rows, stats = af.multi_teacher_kd_loss(*args, **options)
        return rows.detach(), *stats, *torch.autograd.grad(rows, (args[0], args[2]), torch.ones_like(rows))

    got = run(args)
    with af.use_backend("reference"):
        want = run(convert(args, dtype=torch.float64))
    for g, w in zip(got, want):
        torch.testing.assert_close(g.double(), w, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("divergence", "beta"),
    [
        ("jsd", 0.999),
        ("jsd", 1 - 1e-6),
        ("jsd", 1e-6),
        ("skew_kl", 1 - 1e-6),
        ("skew_reverse_kl", 1e-4),
        ("skew_reverse_kl", 1e-8),
    ],
)
def test_a_beta_near_its_ends_keeps_its_digits(on, divergence, beta):
    """1 - beta is not made in float32."""
    if on == "reference":
        pytest.skip("plain PyTorch loses digits of a small JSD")
    student, teachers, *_ = _problem()
    teachers[0][:, 2:5] = -math.inf  # there q stands alone, and m is what beta leaves of it
    options = {"divergence": divergence, "beta": beta, "temperature": 1.0}
    with af.use_backend("reference"):
        leaf = student.detach().double().requires_grad_()
        want = af.multi_teacher_kd_loss(leaf, [teachers[0].double()], None, **options)
        (want_grad,) = torch.autograd.grad(want, leaf)
    got = af.multi_teacher_kd_loss(student, teachers[:1], None, **options)
    (grad,) = torch.autograd.grad(got, student)
    assert relative_error(got, want) < 2e-6 and relative_error(grad, want_grad) < 1e-5


def test_alpha_of_another_dtype_is_that_of_the_loss():
    """On a GPU, too, whose kernels compute in float32."""
    student, teachers, weights, labels, alpha, tau = _problem()
    wide = alpha.detach().double().requires_grad_()
    want = af.multi_teacher_kd_loss(student, teachers, weights, labels, alpha=alpha, temperature=tau)
    got = af.multi_teacher_kd_loss(student, teachers, weights, labels, alpha=wide, temperature=tau.double())
    assert got.dtype == torch.float32 and torch.equal(got, want)
    assert torch.autograd.grad(got, wide)[0].dtype == torch.float64


@pytest.mark.parametrize("mode", ALL_MODES)
def test_alpha_has_no_gradient_from_an_infinite_term_without_weight(mode):
    student, teachers, weights, *_ = _problem()
    labels = torch.zeros(N, dtype=torch.int64)
    masked = student.detach().clone()
    masked[0, 1] = masked[1, 0] = -math.inf  # D of row 0 is infinite, and D and the cross-entropy of row 1
    alpha = torch.tensor([0.0, 0.5, 1.0] + [0.5] * (N - 3), requires_grad=True)
    taught = [t.clone() for t in teachers]
    for t in taught:
        t[2, :] = masked[2]
    masked[2, 0] = -math.inf  # the cross-entropy of row 2
    for t in taught:
        t[2, 0] = -math.inf
    loss = af.multi_teacher_kd_loss(
        masked, taught, weights, labels, alpha=alpha, mode=mode, divergence="forward_kl", reduction="none"
    )
    (grad,) = torch.autograd.grad(loss.sum(), alpha)
    assert grad[[0, 2, 3, 4, 5]].isfinite().all()
