"""topk_kd_loss with tail="bucket": the classes that a teacher names and one for all others, on both sides; statistics."""

import math

import pytest
import torch
from backends import cpu_only
from test_divergence import BETA, _distance, _kl

import amtml_fast as af
from amtml_fast.ops.divergence import DIVERGENCES
from amtml_fast.testing import convert, relative_error

N, C, T, KS = 5, 11, 2, (4, 3)
pytestmark = [cpu_only, pytest.mark.usefixtures("reference_too")]


@pytest.fixture(params=["auto", "reference"])
def reference_too(request):
    with af.use_backend(request.param), torch.random.fork_rng():
        torch.manual_seed(2)
        yield


def _problem(dtype=torch.float32):
    student = (2 * torch.randn(N, C)).to(dtype).requires_grad_()
    teachers = [2 * torch.randn(N, C) for _ in range(T)]
    tops = [t.double().log_softmax(-1).topk(k) for t, k in zip(teachers, KS)]
    labels = torch.randint(0, C, (N,))
    labels[1] = -100
    weights = torch.rand(N, T).requires_grad_()
    return student, [t.indices for t in tops], [t.values.float() for t in tops], weights, labels, teachers


def _outcomes(row, named):
    """Probabilities of the named classes, and of all others together."""
    return torch.cat([row[named], row[[c for c in range(len(row)) if c not in named]].sum()[None]])


def _by_hand(student, indices, weights, labels, teachers, divergence, support, temperature):
    rows = []
    for i in range(N):
        q, distance = (student[i] / temperature).softmax(0), 0
        for t, index in enumerate(indices):
            named = set(index[i].tolist())
            if support == "student":
                named &= set(student[i].topk(KS[t]).indices.tolist())
            named = sorted(named)
            p = _outcomes(teachers[t][i].softmax(0), named)
            distance = distance + weights[i, t] * _distance(divergence, BETA.get(divergence), p, _outcomes(q, named))
        ce = torch.nn.functional.cross_entropy(student[i : i + 1], labels[i : i + 1].clamp(min=0))
        rows.append((labels[i] >= 0) * (0.3 * ce + 0.7 * temperature**2 * distance))
    return torch.stack(rows)


@pytest.mark.parametrize("support", ["teacher", "student"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_its_formula(divergence, support, dtype):
    student, indices, log_probs, weights, labels, teachers = _problem(dtype)
    z, w, exact = convert((student, weights, teachers), dtype=torch.float64)
    want = _by_hand(z, indices, w, labels, exact, divergence, support, 2.0)
    got = af.topk_kd_loss(
        student, indices, log_probs, weights, labels, temperature=2.0, tail="bucket", divergence=divergence,
        beta=BETA.get(divergence), support=support, reduction="none",
    )  # fmt: skip
    assert relative_error(got, want) <= 1e-6
    upstream = torch.linspace(-1, 1, N)
    right = torch.autograd.grad(want, (z, w), upstream.double())
    for g, r, leaf in zip(torch.autograd.grad(got, (student, weights), upstream), right, (student, weights)):
        assert g.dtype == leaf.dtype
        assert relative_error(g, r.to(g.dtype)) <= 1e-5 + (2**-8 if g.dtype == torch.bfloat16 else 0)


def test_all_classes_given_leave_an_empty_bucket():
    student, _, _, weights, labels, teachers = _problem()
    tops = [t.log_softmax(-1).topk(C) for t in teachers]
    indices, log_probs = [t.indices for t in tops], [t.values for t in tops]
    for divergence in ("forward_kl", "jsd", "tvd"):
        options = dict(temperature=1.0, divergence=divergence)
        got = af.topk_kd_loss(student, indices, log_probs, weights, labels, tail="bucket", **options)
        want = af.multi_teacher_kd_loss(student, teachers, weights, labels, mode="sum", **options)
        torch.testing.assert_close(got, want)


def test_a_share_of_the_student_that_1_minus_the_sum_would_lose():
    """The student gives 1e-15 to all that the teacher does not name: in float32 1 - sum q is 0, or a multiple of 6e-8."""
    student = torch.tensor([[40.0, 39.0, 1.0, 2.0, 3.0]], requires_grad=True)
    given = torch.tensor([[0.6, 0.3]]).log(), torch.tensor([[0, 1]])
    options = dict(temperature=1.0, tail="bucket")
    for divergence in ("forward_kl", "reverse_kl", "skew_kl"):
        got = af.topk_kd_loss(student, [given[1]], [given[0]], None, divergence=divergence, **options)
        q, p = _outcomes(student.double()[0].softmax(0), [0, 1]), torch.tensor([0.6, 0.3, 0.1]).double()
        want = _distance(divergence, 0.1, p, q)
        assert relative_error(got, want) <= 1e-6
        (grad,), (right,) = (torch.autograd.grad(x, student, retain_graph=True) for x in (got, want))
        assert relative_error(grad, right) <= 1e-5 and grad[0, 2:].ne(0).all()


def test_classes_named_twice_and_masked_ones():
    student = torch.randn(1, 6)
    student[0, 5] = -math.inf
    index, p = torch.tensor([[1, 3, 1]]), torch.tensor([[0.2, 0.3, 0.1]])
    got = af.topk_kd_loss(student, [index], [p.log()], None, temperature=1.0, tail="bucket")
    q = student.double()[0].softmax(0)
    want = _kl(torch.tensor([0.3, 0.3, 0.4]).double(), _outcomes(q, [1, 3]))
    assert relative_error(got, want) <= 1e-6


def test_reverse_kl_where_the_teacher_keeps_nothing_for_the_others():
    """1 - sum is not above 0: infinite, with no gradient to the classes of the bucket and finite ones elsewhere."""
    student = torch.randn(1, 6, requires_grad=True)
    index, p = torch.tensor([[1, 3]]), torch.tensor([[0.6, 0.5]])
    loss = af.topk_kd_loss(student, [index], [p.log()], None, temperature=1.0, tail="bucket", divergence="reverse_kl")
    (grad,) = torch.autograd.grad(loss, student)
    assert loss == math.inf and grad.isfinite().all()
    assert not grad[0, [0, 2, 4, 5]].any() and grad[0, [1, 3]].all()


def test_a_row_that_is_ignored_may_hold_anything():
    student, indices, log_probs, weights, labels, _ = _problem()
    options = dict(tail="bucket", divergence="jsd", return_stats=True)
    want, _ = af.topk_kd_loss(student, indices, log_probs, weights, labels, **options)
    with torch.no_grad():
        student[1] = math.nan
        for index, log_prob in zip(indices, log_probs):
            index[1], log_prob[1] = 99, math.nan
    got, stats = af.topk_kd_loss(student, indices, log_probs, weights, labels, **options)
    torch.testing.assert_close(got, want)
    assert torch.autograd.grad(got, student)[0].isfinite().all() and not any(x[1].any() for x in stats)


@pytest.mark.parametrize("tail", ["renormalize", "ignore", "uniform", "bucket"])
def test_statistics(tail):
    student, indices, log_probs, weights, labels, teachers = _problem()
    given = student, indices, log_probs, weights, labels
    loss, stats = af.topk_kd_loss(*given, temperature=1.0, tail=tail, return_stats=True)
    torch.testing.assert_close(loss, af.topk_kd_loss(*given, temperature=1.0, tail=tail))
    q = student.detach().double().softmax(1)
    mass = [p.double().exp().sum(1) for p in log_probs]
    w = weights.detach().double()
    used = labels != -100
    kept = sum(w[:, t] * m for t, m in enumerate(mass)) / w.sum(1)
    torch.testing.assert_close(stats.retained_mass.double(), kept * used, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats.student_entropy.double(), -(q * q.log()).sum(1) * used, rtol=1e-6, atol=1e-6)
    assert stats.teacher_kl.shape == (N, T) and not any(x.requires_grad for x in stats)
    if tail == "bucket":
        rows = [
            [_kl(*(_outcomes(x[i], index[i].tolist()) for x in (teachers[t].double().softmax(1), q))) for i in range(N)]
            for t, index in enumerate(indices)
        ]
        want = torch.tensor(rows, dtype=torch.float64).T * used[:, None]
        torch.testing.assert_close(stats.teacher_kl.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tail="rest"), "tail must be one of renormalize, ignore, uniform, bucket, got 'rest'"),
        (dict(divergence="jsd"), r'divergence must be "forward_kl" with tail "renormalize" .*, got "jsd"'),
        (dict(tail="ignore", support="student"), r'support must be "teacher" with tail "ignore" .*, got "student"'),
        (dict(tail="bucket", support="both"), "support must be one of teacher, student, got 'both'"),
        (dict(tail="bucket", beta=0.5), 'beta must be None with divergence "forward_kl", got 0.5'),
        (
            dict(tail="bucket", divergence="jsd", beta=1),
            "beta must be a number between 0 and 1, both excluded, .*, got 1",
        ),
    ],
)
def test_bad_input_is_named(options, message):
    student, indices, log_probs, weights, labels, _ = _problem()
    with pytest.raises(ValueError, match="topk_kd_loss: " + message):
        af.topk_kd_loss(student, indices, log_probs, weights, labels, **options)


def test_the_module_takes_the_same_keywords():
    student, indices, log_probs, weights, labels, _ = _problem()
    options = dict(tail="bucket", divergence="jsd", beta=0.3, support="student", return_stats=True)
    got = af.TopKKDLoss(**options)(student, indices, log_probs, weights, labels)
    torch.testing.assert_close(got, af.topk_kd_loss(student, indices, log_probs, weights, labels, **options))


def test_a_backend_chosen_by_name_says_that_it_has_no_kernel():
    student, indices, log_probs, weights, labels, _ = _problem()
    with af.use_backend("cpp"), pytest.raises(RuntimeError, match="this version has no cpp kernel for topk_bucket"):
        af.topk_kd_loss(student, indices, log_probs, weights, labels, tail="bucket")
