"""Few classes, of which the CPU computes 16 rows at once, and CUDA up to 32 in a warp: each row is what it is alone, whatever stands
beside it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from backends import CHOSEN, DEVICE, cpu_only, run_on
from parallel import on_threads

import amtml_fast as af
from amtml_fast.ops.divergence import ALL_MODES, DIVERGENCES
from amtml_fast.ops.multi_teacher_kd import multi_teacher_kd
from amtml_fast.terms import KDOptions
from amtml_fast.testing import CASES, convert, relative_error, value_and_grads

ROWS = 37  # two groups, and five more
INFINITY = torch.inf


def _inputs(classes: int, teachers: int, dtype: torch.dtype, layout: str):
    g = torch.Generator().manual_seed(0)
    student, *others = (2 * torch.randn(ROWS, classes, generator=g) for _ in range(1 + teachers))
    weights = torch.rand(ROWS, teachers, generator=g)
    labels = torch.randint(0, classes, (ROWS,), generator=g)
    student[1] = -INFINITY  # no class has a probability
    student[2, 0], others[0][3, 0], student[4, -1] = torch.nan, torch.nan, INFINITY
    student[5, 1:], others[0][6, :-1] = -INFINITY, -INFINITY
    weights[7] = 0
    others[-1][8], weights[8, -1] = torch.nan, 0
    student[9], others[0][9] = 1e4, -1e4
    labels[10:12] = -100
    others[0][12, 0], others[-1][12, 0] = -500, -500  # with two teachers at most, too little for a float
    for x in others:
        x[13, 0] = -INFINITY  # an infinite reverse KL
    others[-1][14, 0], weights[14, -1] = -INFINITY, 0
    student[11] = torch.nan
    labels[16:32:3] = -100
    student, *others = (x.to(DEVICE, dtype) for x in (student, *others))
    if layout == "transposed":
        student, *others = (x.T.contiguous().T for x in (student, *others))
    if layout == "sliced":
        student, *others = (torch.cat([x, x], 1)[:, :classes] for x in (student, *others))
    return student, others, weights.to(DEVICE), labels.to(DEVICE)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("classes", "teachers", "mode"), [(1, 2, "sum"), (2, 1, "mixture"), (3, 3, "mixture"), (5, 2, "sum"), (21, 3, "mixture"), (63, 1, "mixture"), (64, 2, "sum")])  # fmt: skip
def test_a_row_is_what_it_is_alone(fused, classes, teachers, mode, dtype, layout):
    if fused == "triton":
        pytest.skip("a row's tile depends on the number of rows")
    student, others, weights, labels = _inputs(classes, teachers, dtype, layout)
    options = KDOptions(
        temperature=4.0 if teachers > 1 else 3.0, alpha=0.7, mode=mode, reduction="none", t2_scale=True, ignore_index=-100,
        label_smoothing=0.1,
    )  # fmt: skip
    g = torch.Generator().manual_seed(1)
    back = [torch.randn(size, generator=g).to(DEVICE) for size in ((ROWS,), (ROWS, classes), (ROWS, classes))]

    def of(rows: slice, probabilities: bool):
        z, w = student[rows].requires_grad_(), weights[rows].detach().requires_grad_()
        terms = multi_teacher_kd(z, [x[rows] for x in others], w, labels[rows], options)
        out = [terms.loss, terms.student_probs, terms.soft_targets][: 3 if probabilities else 1]
        grads = torch.autograd.grad(out, (z, w), [b[rows].to(x.dtype) for b, x in zip(back, out, strict=False)])
        return [x.detach() for x in (*terms, *grads)]

    for probabilities in (False, True):
        together = of(slice(None), probabilities)
        for i in range(ROWS):
            for one, all_of_them in zip(of(slice(i, i + 1), probabilities), together, strict=True):
                torch.testing.assert_close(all_of_them[i : i + 1], one, rtol=0, atol=0, equal_nan=True)


def test_rows_may_be_pixels():
    g = torch.Generator("cpu").manual_seed(0)
    student, teacher = (torch.randn(2, 5, 3, 7, generator=g, device="cpu").to(DEVICE) for _ in range(2))
    labels = torch.randint(0, 5, (2, 3, 7), generator=g, device="cpu").to(DEVICE)
    labels[0, 0] = -100
    student.requires_grad_()
    rows = [maps.movedim(1, -1).flatten(0, 2) for maps in (student, teacher)]
    loss = af.multi_teacher_kd_loss(rows[0], rows[1:], None, labels.flatten())
    pixels = F.kl_div((student / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="none").sum(1)
    plain = 0.3 * F.cross_entropy(student, labels) + 0.7 * 16 * pixels[labels >= 0].mean()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, plain)))


@cpu_only
@pytest.mark.parametrize("mode", ["mixture", "sum"])
@pytest.mark.parametrize("classes", [2, 10, 21, 63])
def test_a_student_like_its_teacher_has_no_kl(classes, mode):
    """Their logarithms are rounded alike, and what was cut off is added back to both."""
    x = torch.randn(ROWS, classes, generator=torch.Generator().manual_seed(0))
    x[0] = 0
    loss = af.multi_teacher_kd_loss(x, [x], None, mode=mode, reduction="none")
    assert loss.abs().max() < 1e-14


@pytest.mark.skipif(CHOSEN not in ("emulated", "gpu"), reason="the other kernels add up log-ratios before they divide")
@pytest.mark.parametrize("classes", [5, 21, 63])
def test_slopes_of_weights_beside_the_least_number(classes):
    """A mean of log-ratios near the largest float32 is a number, where their sum is not."""
    student, teachers, weights, _ = CASES["multi_teacher_kd"].inputs(6, classes, 2)
    with torch.no_grad():
        student[:, : classes - 2] = torch.finfo(torch.float32).min
        for teacher in teachers:
            teacher.zero_()
    args, options = (
        (student, teachers, weights.detach().requires_grad_(), None),
        {"temperature": 1.5, "t2_scale": False},
    )
    with run_on("cuda"):
        _, (_, got) = value_and_grads(af.multi_teacher_kd_loss, args, **options)
    _, (_, want) = value_and_grads(af.reference.multi_teacher_kd_loss, convert(args, dtype=torch.float64), **options)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("op", ["multi_teacher_kd", "divergence", "topk_kd", "topk_bucket"])
def test_many_rows(op, reduction):
    """Of more rows than one block of a GPU counts and adds up."""
    case, named = CASES[op], (3,) if op.startswith("topk") else ()
    rows = {"gpu": 9001, "triton": 33}.get(CHOSEN, 301)
    inputs = case.inputs(rows, 6, *named, 2)
    inputs[-1][::3] = -100
    exact, exact_grads = value_and_grads(case.reference, convert(inputs, dtype=torch.float64), reduction=reduction)
    got, grads = value_and_grads(case.function, inputs, reduction=reduction)
    for value, want in zip([got, *grads], [exact, *exact_grads], strict=True):
        assert relative_error(value, want) <= 2e-6


EVERY = pytest.mark.parametrize(("divergence", "mode"), list(itertools.product(DIVERGENCES, ALL_MODES)))


def _options(divergence: str, mode: str, teachers: int) -> dict:
    """None that the weighted KL's operator would take."""
    taus = [4.0, 0.5, 3.0][:teachers]
    return dict(divergence=divergence, mode=mode, teacher_temperature=taus, reduction="none", label_smoothing=0.1)


def _with_gradients(student, teachers, weights, labels, back, temperature, alpha, options):
    leaves = [x.detach().requires_grad_() for x in (student, weights, alpha)]
    loss = af.multi_teacher_kd_loss(
        leaves[0], teachers, leaves[1], labels, temperature=temperature, alpha=leaves[2], **options
    )
    return loss.detach(), *torch.autograd.grad(loss, leaves, back.to(loss.dtype))


def _numbers(by_row: bool):
    """What comes back to the loss, temperature and alpha."""
    g = torch.Generator().manual_seed(1)
    alpha = torch.rand(ROWS, generator=g)
    alpha[::9], alpha[4::9] = 0, 1
    temperature = torch.rand(ROWS, generator=g) + 0.5
    temperature[::4] = 4  # of which a power is taken where all rows have it
    return torch.randn(ROWS, generator=g), temperature if by_row else 2.0, alpha


@cpu_only
@pytest.mark.parametrize(("classes", "teachers", "dtype", "layout", "by_row"), [(1, 2, torch.float32, "contiguous", False), (2, 1, torch.bfloat16, "sliced", True), (3, 3, torch.float32, "transposed", True), (10, 2, torch.float16, "contiguous", False), (63, 3, torch.float32, "sliced", False)])  # fmt: skip
@EVERY
def test_a_row_of_any_divergence_is_what_it_is_alone(divergence, mode, classes, teachers, dtype, layout, by_row):
    student, others, weights, labels = _inputs(classes, teachers, dtype, layout)
    options = _options(divergence, mode, teachers)
    back, temperature, alpha = _numbers(by_row)

    def of(rows: slice):
        tau = temperature[rows] if by_row else temperature
        given = student[rows], [x[rows] for x in others], weights[rows], labels[rows], back[rows], tau, alpha[rows]
        return _with_gradients(*given, options)

    together = of(slice(None))
    for i in range(ROWS):
        for one, all_of_them in zip(of(slice(i, i + 1)), together, strict=True):
            torch.testing.assert_close(all_of_them[i : i + 1], one, rtol=0, atol=0, equal_nan=True)


@cpu_only
@pytest.mark.parametrize(("classes", "teachers"), [(1, 1), (2, 3), (10, 2), (63, 1)])
@EVERY
def test_any_divergence_is_that_of_the_reference(divergence, mode, classes, teachers):
    student, others, weights, labels = _inputs(classes, teachers, torch.float32, "contiguous")
    given = student, others, weights, labels, *_numbers(True)
    got = _with_gradients(*given, _options(divergence, mode, teachers))
    with af.use_backend("reference"):
        want = _with_gradients(*convert(given, dtype=torch.float64), _options(divergence, mode, teachers))
    finite = want[0].isfinite()  # others have no gradient to agree on
    torch.testing.assert_close(got[0].double(), want[0], rtol=2e-5, atol=2e-5, equal_nan=True)
    for g, w in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(g[finite].double(), w[finite], rtol=2e-5, atol=2e-5)


@cpu_only
def test_any_number_of_threads_gives_the_same_bits():
    g = torch.Generator().manual_seed(0)
    student, *others = (torch.randn(2999, 10, generator=g) for _ in range(3))
    weights, labels = torch.rand(2999, 2, generator=g), torch.randint(0, 10, (2999,), generator=g)

    def run():
        leaves = student.detach().requires_grad_(), weights.detach().requires_grad_()
        loss = af.multi_teacher_kd_loss(leaves[0], others, leaves[1], labels, divergence="jsd")
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    first, *more = on_threads((1, 2, 3), run)
    for other in more:
        assert all(map(torch.equal, first, other))


@cpu_only
@pytest.mark.parametrize("classes", [2, 10, 21, 63])
@EVERY
def test_a_student_like_its_teacher_has_no_divergence(divergence, mode, classes):
    x = torch.randn(ROWS, classes, generator=torch.Generator().manual_seed(0))
    x[0] = 0
    options = dict(divergence=divergence, mode=mode, teacher_temperature=4.0, reduction="none")
    loss = af.multi_teacher_kd_loss(x.requires_grad_(), [x.detach()], None, **options)
    of_rounded = mode == "mixture" and divergence in ("forward_kl", "reverse_kl")  # which take the logarithm of p
    assert loss.abs().max() < (1e-5 if of_rounded else 1e-14)
    assert torch.autograd.grad(loss.sum(), x)[0].abs().max() < 1e-6


@cpu_only
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])  # two kernels
@pytest.mark.parametrize("classes", [1, 2, 3, 21, 63])
def test_logarithms_of_sums_are_those_of_a_library(classes, divergence):
    """The cross-entropy is such a logarithm, plus what the label's logit is below the largest."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(999, classes, generator=g) * torch.logspace(-3, 1, 999).unsqueeze(1)
    labels = torch.randint(0, classes, (999,), generator=g)
    got = af.multi_teacher_kd_loss(x, [x], None, labels, alpha=0.0, reduction="none", divergence=divergence)
    torch.testing.assert_close(
        got.double(), F.cross_entropy(x.double(), labels, reduction="none"), rtol=2e-7, atol=2e-7
    )
