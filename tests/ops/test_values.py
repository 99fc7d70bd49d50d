"""Numbers that bite, in the KD losses: masks, NaN and infinities, ignored rows, extremes, and the last digits."""

import pytest
import torch
from backends import CHOSEN

import amtml_fast as af
from amtml_fast import reference
from amtml_fast.ops.multi_teacher_kd import multi_teacher_kd
from amtml_fast.terms import KDOptions
from amtml_fast.testing import CASES, convert, relative_error, value_and_grads


def _kd(*args, **options):
    return value_and_grads(af.multi_teacher_kd_loss, args, **options)


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


@pytest.mark.parametrize("classes", [44, 128, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_logits_far_from_0_beside_probabilities_that_nobody_uses(classes, dtype, fused):
    """Forward gives probabilities away, and backward gets nothing for them: on GPUs it may be another kernel, of the same statistics."""
    case, options = CASES["multi_teacher_kd"], KDOptions(1.0, 0.7, "mixture", "batchmean", True, -100, 0.0)
    student, teachers, weights, labels = case.inputs(9, classes, 2)
    student, *teachers = ((x.detach() + shift).to(dtype) for x, shift in zip((student, *teachers), (1000, -700, 300)))
    args = student.requires_grad_(), teachers, weights, labels
    exact = convert(args, dtype=torch.float64)
    _, grads = value_and_grads(lambda *a: multi_teacher_kd(*a, options).loss, args)
    _, wanted = value_and_grads(reference.multi_teacher_kd_loss, exact, temperature=1.0)
    for got, want in zip(grads, wanted, strict=True):
        assert relative_error(got, want) <= (2e-6 if got.dtype == torch.float32 else 1e-3)


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


@pytest.mark.parametrize("depth", [-80.0, -88.0, -95.0, -102.0])
def test_the_smallest_probabilities_of_many_classes(on, depth):
    """Far from the row's maximum in memory, beside classes as small as it: no part of a row is rounded to 0 as a whole."""
    teacher = torch.full((1, 1500), depth - 2)
    teacher[0, 0], teacher[0, -1] = 0, depth
    masked = torch.zeros(1, 1500)
    masked[0, -1] = -torch.inf
    for mode in ("mixture", "sum"):
        loss = af.multi_teacher_kd_loss(masked, [teacher], None, temperature=1.0, mode=mode)
        assert loss == torch.inf


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
        for side in ("student", "teacher"):
            z, given = student.detach().clone(), [t.clone() for t in teachers]
            (z if side == "student" else given[1])[2] = bad
            loss, grads = _kd(z.requires_grad_(), given, weights, reduction="none")
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


@pytest.mark.parametrize("op", ["multi_teacher_kd", "divergence", "topk_kd", "topk_bucket"])
@pytest.mark.parametrize("classes", [21, 248, 249])
def test_rounding_of_the_temperature_does_not_add_up(classes, op, on):
    """Exponentials and logarithms of another rounding of 1 / temperature have all rows' KL off on the same side, by more than a mean
    over rows takes away: by a tenth of this one."""
    rows, temperature = 64, 5.0  # whose inverse is rounded
    student = 5 * torch.randn(rows, classes)
    teachers = [student + 0.01 * torch.randn(rows, classes) for _ in range(2)]
    args = student, teachers, torch.full((rows, 2), 0.5)
    options = {"temperature": temperature, "reduction": "none"}
    if op == "divergence":
        options["teacher_temperature"] = temperature
    if op.startswith("topk"):
        named = [(t / temperature).log_softmax(1).topk(classes // 3) for t in teachers]
        args = student, [n.indices for n in named], [n.values for n in named], args[2]
        options["tail"] = "bucket" if op == "topk_bucket" else "uniform"
    case = CASES[op]
    with torch.no_grad():
        exact = case.reference(*convert(args, dtype=torch.float64), **options)
        off = case.function(*args, **options).double() - exact
    assert off.mean().abs() <= max(3e-8 * temperature**2, 2e-7 * exact.mean(), 4 * off.std() / rows**0.5)


@pytest.mark.parametrize("classes", [16, 125, 128])
def test_very_large_weights_of_a_class_that_the_student_does_not_expect(classes, on):
    """The mixture over the student's probability is beyond 2^128."""
    student, teacher = torch.randn(3, classes), torch.randn(3, classes)
    student[:, 5], teacher[:, 5] = -50.0, 3.0
    weights = torch.full((3, 1), 1e17)
    options = {"temperature": 1.0, "reduction": "none"}
    args = student.requires_grad_(), [teacher], weights.requires_grad_(), None
    got = _kd(*args, **options)
    want = value_and_grads(reference.multi_teacher_kd_loss, convert(args, dtype=torch.float64), **options)
    assert relative_error(got[0], want[0]) <= 1e-6
    assert all(relative_error(g, w) <= 1e-5 for g, w in zip(got[1], want[1]))


@pytest.mark.parametrize("least", [-1e36, -torch.inf])
def test_scores_of_teachers_beyond_the_least_number(least, on):
    """They are minus infinity, as plain PyTorch has them, and weigh nothing."""
    features, v = torch.tensor([[1e3, 1.0], [2e3, 2.0]]), torch.ones(2)
    theta = torch.tensor([[least, 1.0], [0.5, 0.2], [0.1, -1.0]])
    torch.testing.assert_close(af.teacher_weights(features, theta, v), torch.tensor([[0.0, 1.0, 0.0]] * 2))


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
