"""Rows of a split vocabulary, one part after another in one process: what the kernels of every backend make of the parts is what
the reference makes of the whole."""

from typing import Any, NamedTuple

import pytest
import torch
from backends import takes
from torch import Tensor

from amtml_fast import reference
from amtml_fast.ops import _vocabulary_rows as split
from amtml_fast.ops._vocabulary import Vocabulary
from amtml_fast.ops._vocabulary_kernels import KernelBlock
from amtml_fast.ops._vocabulary_plain import Given
from amtml_fast.ops.divergence import ALL_MODES, DIVERGENCES
from amtml_fast.terms import Divergence, KDOptions, divergence_of, wide_dtype
from amtml_fast.testing import relative_error

N, T, P = 9, 3, 3


class Rows(NamedTuple):
    student: Tensor
    teachers: list[Tensor]
    weights: Tensor | None
    labels: Tensor | None
    alpha: Tensor | None = None
    temperature: Tensor | None = None


def made(given: Rows, options: KDOptions, divergence: Divergence, name: str, stats: bool, same: bool = False) -> tuple:
    """Loss [N], gradients to student, weights and alpha (of the losses times 1, 2, ...), and statistics: of all parts together."""
    student, teachers, weights, labels, alpha, temperature = given
    wide, size = wide_dtype(student, *teachers, weights), student.shape[1] // P
    divergence = divergence._replace(alpha=alpha, temperature=temperature)
    rule = split.rule_of(options, divergence, labels, wide, (True, weights is not None), stats, len(teachers), student)
    assert rule.backend == name
    parts = [
        Given(Vocabulary(None, r, P, size), rule, *_cut(given, slice(r * size, (r + 1) * size)), labels, temperature)
        for r in range(P)
    ]
    blocks = [next(split.blocks(part))[1] for part in parts]
    normal = split.normal_of(parts[0], torch.stack([block.sums() for block in blocks]))
    shares = [block.shares(normal) for block in blocks]
    of_all = {key: torch.stack([share[key].double() for share in shares]) for key in shares[0]}
    rows = split.joined(parts[0], normal, of_all)
    each, ce = rows.each.requires_grad_(), rows.ce.requires_grad_()
    leaves = [each, ce, *(None if x is None else x.clone().requires_grad_() for x in (weights, alpha))]
    divergence = divergence._replace(alpha=leaves[3])
    loss, found = split.finished(
        parts[0].vocabulary, each, ce, rows.stats, leaves[2], labels, options, divergence, stats, None
    )
    incoming = torch.arange(1, N + 1, dtype=loss.dtype, device=loss.device)
    if same:  # as sum() sends it back
        incoming = loss.new_ones(()).expand(N)
    asked = [x for x in leaves if x is not None and x.numel()]
    grads = dict(zip(map(id, asked), torch.autograd.grad(loss, asked, incoming, allow_unused=True)))
    of_each, of_ce, of_weights, of_alpha = (None if x is None else grads.get(id(x)) for x in leaves)
    of_ce = torch.zeros_like(ce) if of_ce is None else of_ce
    grad = torch.cat([split.logit_grads(part, normal, rows.totals, of_each, of_ce) for part in parts], 1)
    if weights is not None and options.mode != "sum":
        of_weights = split.weight_grads(rows.of_weights, of_each)
    return loss, grad, of_weights, of_alpha, found


def run_one_part(given: Rows, name: str, divergence: str, mode: str, taus: list[float] | None = None) -> None:
    """Each raw op once, of the first of two parts."""
    student, teachers, weights, labels, _, temperature = given
    rows = len(student)
    options = KDOptions(2.0, 0.5, mode, "none", True, -100, 0.1)
    of = divergence_of(2.0, 0.5, divergence, None, taus, len(teachers))
    rule = split.rule_of(options, of, labels, torch.float32, (True, True), True, len(teachers), student)._replace(
        backend=name
    )
    vocabulary = Vocabulary(None, 0, 2, student.shape[1])
    block = KernelBlock(Given(vocabulary, rule, student, teachers, weights, labels, temperature))
    normal = block.sums()
    block.shares(normal)
    each = student.new_ones(rows, len(teachers) if mode == "sum" else 1, dtype=torch.float32)
    block.gradient(normal, each, each, each[:, 0])


def _cut(given: Rows, at: slice) -> tuple:
    return given.student[:, at], [t[:, at] for t in given.teachers], given.weights


def wanted(given: Rows, options: KDOptions, divergence: Divergence, stats: bool) -> tuple:
    """The same by the reference in float64."""
    double = [None if x is None else x.double().requires_grad_() for x in (given.student, given.weights, given.alpha)]
    student, weights, alpha = double
    divergence = divergence._replace(
        alpha=alpha, temperature=None if given.temperature is None else given.temperature.double()
    )
    loss, found = reference.divergence_loss(
        student, [t.double() for t in given.teachers], weights, given.labels, options, divergence, need_stats=stats
    )
    asked = [x for x in double if x is not None]
    incoming = torch.arange(1, N + 1, dtype=loss.dtype, device=loss.device)
    grads = dict(zip(map(id, asked), torch.autograd.grad(loss, asked, incoming)))
    return loss, *(None if x is None else grads[id(x)] for x in double), found


def compared(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    """Infinite and NaN in the same places; the rest near."""
    for special in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(special(got), special(want)), f"{what}: {special.__name__}"
    finite = want.isfinite()
    assert relative_error(got[finite], want[finite]) < tolerance, what


def check(given: Rows, name: str, tolerance: float | None = None, stats: bool = True, **settings: Any) -> None:
    values = {
        "divergence": "forward_kl",
        "mode": "mixture",
        "teacher_temperature": None,
        "label_smoothing": 0.1,
    } | settings
    alpha, tau = 0.6 if given.labels is not None else 1.0, 2.0
    options = KDOptions(tau, alpha, values["mode"], "none", True, -100, values["label_smoothing"])
    divergence = divergence_of(tau, alpha, values["divergence"], None, values["teacher_temperature"], T)
    got = made(given, options, divergence, name, stats)
    want = wanted(given, options, divergence, stats)
    if tolerance is None:
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[
            given.student.dtype
        ]
    for what, a, b in zip(("loss", "student", "weights", "alpha"), got, want):
        if b is not None:
            compared(a, b, max(tolerance, 1e-5) if what != "student" and tolerance > 1e-12 else tolerance, what)
    if stats:
        for what, a, b in zip(got[4]._fields, got[4], want[4]):
            compared(a, b, 1e-12 if tolerance == 1e-12 else 1e-5, what)


def drawn(dtype: torch.dtype, c: int = 30, rows: bool = False) -> Rows:
    student = 3 * torch.randn(N, c, dtype=dtype)
    teachers = [3 * torch.randn(N, c, dtype=dtype) for _ in range(T)]
    wide = wide_dtype(student)
    labels = torch.tensor([0, c - 1, c // 3, -100, c // 3 - 1, 2 * c // 3, 2 * c // 3 - 1, 5, 0])
    weights = torch.rand(N, T, dtype=wide)
    student[3], teachers[1][3] = torch.nan, torch.nan  # a row that is ignored
    if not rows:
        return Rows(student, teachers, weights, labels)
    return Rows(student, teachers, weights, labels, torch.rand(N, dtype=wide), 1 + torch.rand(N, dtype=wide))


CASES = [(d, m) for d in DIVERGENCES for m in ALL_MODES]
SOME = [(d, ALL_MODES[i % 3]) for i, d in enumerate(DIVERGENCES)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("divergence, mode", CASES)
def test_parts_make_the_whole(fused: str, divergence: str, mode: str, dtype: torch.dtype) -> None:
    if not takes(fused, dtype):
        pytest.skip("no float64")
    check(drawn(dtype), fused, divergence=divergence, mode=mode)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence, mode", SOME[::2])
def test_16_bit_rows(fused: str, divergence: str, mode: str, dtype: torch.dtype) -> None:
    check(drawn(dtype), fused, divergence=divergence, mode=mode)


@pytest.mark.parametrize("divergence, mode", SOME)
def test_numbers_of_rows_and_temperatures_of_teachers(fused: str, divergence: str, mode: str) -> None:
    given = drawn(torch.float32, rows=True)
    check(given, fused, divergence=divergence, mode=mode, teacher_temperature=[1.0, 2.0, 3.0])


@pytest.mark.parametrize("divergence, mode", CASES)
def test_parts_without_a_probability(fused: str, divergence: str, mode: str) -> None:
    """Teachers have nothing in the first part, nobody has anything in the last, a teacher without weight is NaN; and the only one
    with weight has nothing where another has all."""
    given = drawn(torch.float32)
    student, teachers, weights, _ = given[:4]
    teachers[0][1, :10] = -torch.inf
    for x in (student, *teachers):
        x[2, 20:] = -torch.inf
    weights[4, 1], teachers[1][4] = 0, torch.nan
    weights[6] = 0  # no teacher counts
    weights[8, 1:], teachers[0][8, 10:], teachers[1][8, :10] = 0, -torch.inf, -torch.inf
    check(given, fused, divergence=divergence, mode=mode,
          label_smoothing=0.0, stats=False)  # fmt: skip


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_what_one_side_lacks_is_infinite(fused: str, divergence: str, mode: str) -> None:
    given = drawn(torch.float32)
    lacking = [given.student] if divergence == "forward_kl" else given.teachers
    for x in lacking:
        x[7, :10] = -torch.inf
        x[5, 12] = -torch.inf
    check(given, fused, divergence=divergence, mode=mode, label_smoothing=0.0, stats=False)


@pytest.mark.parametrize("mode", ALL_MODES)
def test_nan_stays_nan(fused: str, mode: str) -> None:
    given = drawn(torch.float32)
    given.teachers[2][8, 3] = torch.nan
    given.student[6, 25] = torch.nan
    loss = made(
        given, KDOptions(2.0, 0.6, mode, "none", True, -100, 0.0),
        divergence_of(2.0, 0.6, "jsd", None, None, T), fused, False,
    )[0]  # fmt: skip
    assert loss.isnan().nonzero().flatten().tolist() == [6, 8]


@pytest.mark.parametrize("mode", ALL_MODES)
def test_without_labels_or_weights(fused: str, mode: str) -> None:
    given = drawn(torch.float32)
    given.student[3], given.teachers[1][3] = 1, 2
    check(given._replace(labels=None), fused, divergence="jsd", mode=mode)
    check(given._replace(weights=None), fused, divergence="skew_kl", mode=mode)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("c", [3, 4101, 8208])
def test_short_and_long_parts(fused: str, c: int, divergence: str) -> None:
    """One class each, an odd number of them, and so many that a row is cut in pieces."""
    given = drawn(torch.float32, c)
    if c == 3:
        given.labels[given.labels > 2] = 2
    check(given, fused, divergence=divergence)


@pytest.mark.parametrize("mode", ALL_MODES)
def test_agreement_takes_the_first_of_several_largest(fused: str, mode: str) -> None:
    given = drawn(torch.float32)
    given.student[:3] = 0
    for t in given.teachers:
        t[0] = 0
        t[1, :10] = -1
        t[1, 10:] = 0
    check(given, fused, mode=mode)


@pytest.mark.parametrize("divergence", ["forward_kl", "tvd"])
def test_mixed_logits_of_sure_teachers(fused: str, divergence: str) -> None:
    """They are rounded alike in all passes: within twice what plain float32 misses, and a little."""
    given = drawn(torch.float32)
    given = given._replace(teachers=[30 * t for t in given.teachers], labels=None)
    given.student[3], given.teachers[1][3] = 1, 2
    options = KDOptions(2.0, 1.0, "logits", "none", True, -100, 0.0)
    of = divergence_of(2.0, 1.0, divergence, None, None, T)
    got, want = made(given, options, of, fused, True), wanted(given, options, of, True)
    student, weights = given.student.clone().requires_grad_(), given.weights.clone().requires_grad_()
    loss, _ = reference.divergence_loss(student, given.teachers, weights, None, options, of, need_stats=True)
    steps = torch.arange(1, N + 1, dtype=loss.dtype, device=loss.device)
    plain = loss, *torch.autograd.grad(loss, (student, weights), steps)
    for a, b, c in zip(got, want, plain):
        assert (a.double() - b).norm() <= 2 * (c.double() - b).norm() + 2e-5 * b.norm()
    assert (got[4].target_entropy.double() - want[4].target_entropy).abs().max() < 2e-6


def test_classes_that_a_teacher_without_weight_lacks_in_mixed_logits(fused: str) -> None:
    given = drawn(torch.float32)
    given.weights[:, 1] = 0
    given.teachers[1][:3, 4:9] = -torch.inf
    check(given, fused, mode="logits", divergence="jsd", stats=False)


@pytest.mark.parametrize("mode", ALL_MODES)
def test_labels_that_only_leave_rows_out(fused: str, mode: str) -> None:
    """With all the weight on the teachers there is no cross-entropy."""
    given = drawn(torch.float32)
    options = KDOptions(2.0, 1.0, mode, "none", True, -100, 0.0)
    of = divergence_of(2.0, 1.0, "jsd", None, None, T)
    got, want = made(given, options, of, fused, True, same=True), wanted(given, options, of, True)
    steps = torch.arange(1, N + 1, dtype=torch.float64, device=want[0].device).unsqueeze(1)
    compared(got[0], want[0], 1e-5, "loss")
    compared(got[1] * steps, want[1], 1e-5, "student")
    compared(got[2] * steps, want[2], 1e-5, "weights")
    assert (got[0][3] == 0) and (got[1][3] == 0).all()


def test_statistics_of_a_student_near_its_teachers(fused: str) -> None:
    """What the rounding of log-sums cuts off, up to 3e-7 at this many classes, is as much as the KLs themselves."""
    given = drawn(torch.float32, 3000)
    given.student[3] = 1
    given = given._replace(teachers=[given.student + 1e-3 * torch.randn_like(given.student) for _ in range(T)])
    options = KDOptions(2.0, 0.6, "mixture", "none", True, -100, 0.0)
    of = divergence_of(2.0, 0.6, "forward_kl", None, None, T)
    got, want = made(given, options, of, fused, True)[4], wanted(given, options, of, True)[4]
    assert (got.teacher_kl.double() - want.teacher_kl).abs().max() < 2e-7


@pytest.mark.parametrize("mode", ALL_MODES)
def test_parts_with_nothing_but_the_least_number(fused: str, mode: str) -> None:
    """A finite mask of one part, and of a whole row, where all classes are alike."""
    given = drawn(torch.float32)
    for x in (given.student, *given.teachers):
        x[0, 10:20] = x[1] = torch.finfo(torch.float32).min
    given.labels[:2] = 5
    given = given._replace(weights=None)  # no sums of such numbers
    check(given, fused, mode=mode, divergence="jsd", stats=False, label_smoothing=0.0)


def test_agreement_at_the_end_of_long_rows(fused: str) -> None:
    given = drawn(torch.float32, 8208)
    given.student[:4, 8200] = 30
    for t in given.teachers:
        t[:2, 8200] = 30
        t[2:4, 8203] = 30
    check(given, fused, mode="mixture")
