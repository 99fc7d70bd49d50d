"""Statistics of topk_kd_loss, of every tail."""

import math

import pytest
import torch
from test_divergence import _kl
from test_topk_bucket import KS, TAILS, C, N, T, _outcomes, _problem

import amtml_fast as af
from amtml_fast.testing import convert

pytestmark = pytest.mark.usefixtures("on")


@pytest.mark.parametrize("tail", TAILS)
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


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_entropy_beside_a_mask_that_temperature_makes_infinite(dtype, tail):
    student = torch.tensor([[1.0, 2.0, 3.0, torch.finfo(dtype).min, 0.5]], dtype=dtype)
    args = student, [torch.tensor([[0, 1]])], [torch.tensor([[0.5, 0.3]]).log()], None
    _, stats = af.topk_kd_loss(*args, temperature=0.5, tail=tail, return_stats=True)
    q = (student.double() / 0.5).softmax(1)
    torch.testing.assert_close(stats.student_entropy.double(), -torch.xlogy(q, q).sum(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("sizes", [KS, (*KS, C)])
@pytest.mark.parametrize("support", ["teacher", "student"])
@pytest.mark.parametrize("tail", TAILS)
def test_statistics_at_the_edges(tail, support, sizes):
    """Of teachers: equal probabilities, a class named twice, mass above 1, none, NaN with and without weight, all classes. Of students: masked
    classes, also all that nobody names, equal logits, one class far above all, NaN, negative logits alone."""
    if support == "student" and tail != "bucket":
        pytest.skip("the other tails take no support")
    torch.manual_seed(8)
    student = torch.randn(12, C)
    tops = [torch.randn(12, C).log_softmax(1).topk(k) for k in sizes]
    indices, log_probs = [top.indices for top in tops], [top.values for top in tops]
    weights = torch.rand(12, len(sizes))
    log_probs[0][0] = log_probs[0][0, :1]
    indices[0][1, 1] = indices[0][1, 0]
    log_probs[1][2] = torch.tensor([0.5, 0.4, 0.3]).log()
    log_probs[1][3] = -math.inf
    log_probs[1][4], weights[4, 1] = math.nan, 0
    weights[5] = 0
    student[6, [1, 4, 5]] = -math.inf
    student[7] = student[7].round()
    student[8, 3] = 3000.0
    indices[0][8], indices[1][8] = torch.arange(4), torch.arange(3, 6)
    indices[0][9], indices[1][9] = torch.arange(4), torch.arange(4, 7)
    indices[0][10], indices[1][10] = torch.arange(4), torch.arange(3)
    student[10, 4:] = -math.inf
    log_probs[1][10] = torch.tensor([0.5, 0.4, 0.3]).log()
    log_probs[1][11, 1] = math.nan
    student[5, 0], student[9] = math.nan, student[9] - 10
    options = dict(tail=tail, temperature=1.5, return_stats=True, reduction="none", support=support)
    args = student, indices, log_probs, weights
    _, stats = af.topk_kd_loss(*args, **options)
    _, want = af.reference.topk_kd_loss(*convert(args, dtype=torch.float64), **options)
    for got, right in zip(stats, want):
        torch.testing.assert_close(got, right.float(), rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("tail", TAILS)
def test_agreement_with_a_target_of_nan_and_with_equal_logits(tail):
    """NaN is the largest probability, and of equal logits the first class is the largest, wherever in a long row."""
    student = torch.zeros(4, 5001)
    student[0, 4] = student[1, 2] = 9
    student[2, [2, 2 + 2048, 2 + 4096]] = 9
    student[3] = -math.inf
    p = torch.tensor([0.5, 0.3, 0.1]).repeat(4, 1)
    p[:2, 1] = math.nan
    index = torch.tensor([[2, 4, 1]]).repeat(4, 1)
    index[3] = torch.tensor([0, 4, 1])
    args = student, [index], [p.log()], None
    _, stats = af.topk_kd_loss(*args, tail=tail, return_stats=True)
    _, want = af.reference.topk_kd_loss(*args, tail=tail, return_stats=True)
    assert want.agreement[2:].tolist() == [1, 1]
    torch.testing.assert_close(stats.agreement, want.agreement)


@pytest.mark.parametrize("tail", TAILS)
def test_of_equal_probabilities_the_first_class_is_the_largest(tail):
    indices = [torch.tensor([[3, 1, 4], [0, 2, 1], [1, 0, 3], [1, 0, 2], [4, 3, 1], [0, 0, 0]])]
    few, more = [0.01, 0.02, 0.02], [0.3, 0.3, 0.2]
    p = torch.tensor([more, few, more, few, more, few])
    for best in range(6):
        student = torch.zeros(6, 6)
        student[:, best] = 2
        args = student, indices, [p.log()], None
        _, stats = af.topk_kd_loss(*args, tail=tail, return_stats=True)
        _, want = af.reference.topk_kd_loss(*args, tail=tail, return_stats=True)
        torch.testing.assert_close(stats, want)
