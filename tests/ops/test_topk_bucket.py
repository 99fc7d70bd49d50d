"""topk_kd_loss with tail="bucket": the classes that a teacher names and one for all others, on both sides."""

import math

import pytest
import torch
from backends import CHOSEN, cpu_only
from test_divergence import BETA, _distance, _kl
from torch.utils._python_dispatch import TorchDispatchMode

import amtml_fast as af
from amtml_fast.ops.divergence import DIVERGENCES
from amtml_fast.testing import convert, relative_error, value_and_grads

N, C, T, KS = 5, 11, 2, (4, 3)
TAILS = ("renormalize", "ignore", "uniform", "bucket")
pytestmark = pytest.mark.usefixtures("on")


def _problem(dtype=torch.float32):
    torch.manual_seed(2)
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


@cpu_only
@pytest.mark.parametrize("support", ["teacher", "student"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(narrow, dtype, support):
    """On the CPU torch stacks no float16 under an autocast to bfloat16, nor the other way round."""
    args = _problem(dtype)[:5]
    want = af.topk_kd_loss(*args, tail="bucket", support=support)
    with torch.autocast("cpu", narrow):
        got = af.topk_kd_loss(*args, tail="bucket", support=support)
    assert torch.equal(got, want)


@pytest.mark.parametrize("support", ["teacher", "student"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stats", [False] if CHOSEN else [False, True])  # on the CPU other kernels than without
def test_is_its_formula(stats, divergence, support, dtype):
    student, indices, log_probs, weights, labels, teachers = _problem(dtype)
    z, w, exact = convert((student, weights, teachers), dtype=torch.float64)
    want = _by_hand(z, indices, w, labels, exact, divergence, support, 2.0)
    got = af.topk_kd_loss(
        student, indices, log_probs, weights, labels, temperature=2.0, tail="bucket", divergence=divergence,
        beta=BETA.get(divergence), support=support, reduction="none", return_stats=stats,
    )  # fmt: skip
    got = got[0] if stats else got
    assert relative_error(got, want) <= 1e-6
    upstream = torch.linspace(-1, 1, N)
    right = torch.autograd.grad(want, (z, w), upstream.double())
    for g, r, leaf in zip(torch.autograd.grad(got, (student, weights), upstream), right, (student, weights)):
        assert g.dtype == leaf.dtype
        assert relative_error(g, r.to(g.dtype)) <= 1e-5 + (2**-8 if g.dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("height", [200.0, 3000.0])  # beside the second, nothing else has a probability in float64
def test_what_is_far_below_a_named_class_keeps_its_shares(height, divergence, on):
    """The first teacher's bucket holds a class that the second names and all that nobody names."""
    if on == "reference":
        pytest.skip("it computes in float32")
    student = torch.tensor([[height, 3.0, 2.0, -1.0, 0.5, 2.5]], requires_grad=True)
    indices = [torch.tensor([[0]]), torch.tensor([[0, 1]])]
    log_probs = [torch.tensor([[0.6]]).log(), torch.tensor([[0.5, 0.2]]).log()]
    weights = torch.tensor([[0.25, 0.75]], requires_grad=True)
    args = student, indices, log_probs, weights
    options = dict(tail="bucket", divergence=divergence, temperature=1.0)
    loss, grads = value_and_grads(lambda *a: af.topk_kd_loss(*a, **options), args)
    want, want_grads = value_and_grads(
        lambda *a: af.reference.topk_kd_loss(*a, **options), convert(args, dtype=torch.float64)
    )
    assert relative_error(loss, want) <= 1e-6
    for got, right in zip(grads, want_grads):
        torch.testing.assert_close(got.cpu().double(), right.cpu(), rtol=2e-6, atol=1e-30)


def test_all_classes_given_leave_an_empty_bucket():
    student, _, _, weights, labels, teachers = _problem()
    tops = [t.log_softmax(-1).topk(C) for t in teachers]
    indices, log_probs = [t.indices for t in tops], [t.values for t in tops]
    for divergence in ("forward_kl", "jsd", "tvd"):
        options = dict(temperature=1.0, divergence=divergence)
        got = af.topk_kd_loss(student, indices, log_probs, weights, labels, tail="bucket", **options)
        want = af.multi_teacher_kd_loss(student, teachers, weights, labels, mode="sum", **options)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("far", [40.0, 200.0])
def test_a_share_of_the_student_that_1_minus_the_sum_would_lose(far):
    """The student gives 1e-15 to all that the teacher does not name, or 1e-86: in float32 1 - sum q is 0, or a multiple of
    6e-8, and no exponential beside that of the maximum is left."""
    student = torch.tensor([[far, far - 1, 1.0, 2.0, 3.0]], requires_grad=True)
    given = torch.tensor([[0.6, 0.3]]).log(), torch.tensor([[0, 1]])
    options = dict(temperature=1.0, tail="bucket")
    for divergence in ("forward_kl", "reverse_kl", "skew_kl"):
        got = af.topk_kd_loss(student, [given[1]], [given[0]], None, divergence=divergence, **options)
        q, p = _outcomes(student.double()[0].softmax(0), [0, 1]), torch.tensor([0.6, 0.3, 0.1]).double()
        want = _distance(divergence, 0.1, p, q)
        assert relative_error(got, want) <= 1e-6
        (grad,), (right,) = (torch.autograd.grad(x, student, retain_graph=True) for x in (got, want))
        assert relative_error(grad, right) <= 1e-5 and torch.equal(grad != 0, right.float() != 0)


@pytest.mark.parametrize(("offset", "masked"), [(0.0, True), (1e6, False)])
def test_label_smoothing_of_masked_and_of_large_logits(offset, masked):
    """The mean of a row keeps the digits that its sum, of 3e9, has lost; with a masked class it is -inf and not NaN."""
    torch.manual_seed(4)
    student, teacher, labels = 2 * torch.randn(4, 3000) + offset, torch.randn(4, 3000), torch.randint(1, 3000, (4,))
    if masked:
        student[:, 0] = -math.inf
    top, student = teacher.log_softmax(1).topk(8), student.requires_grad_()
    options = dict(alpha=0.0, label_smoothing=0.1, tail="bucket", reduction="none")
    got = af.topk_kd_loss(student, [top.indices], [top.values], None, labels, **options)
    want = torch.nn.functional.cross_entropy(student.double(), labels, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(got, want.float(), rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(got.sum(), student)
    assert grad.isfinite().all() and torch.equal(grad == 0, student == -math.inf)


def test_a_label_that_nobody_names_may_be_anywhere():
    torch.manual_seed(5)
    labels = torch.tensor([0, 1023, 1024, 2047, 2499])  # where kernels begin and end a piece of a row
    student, log_probs = torch.randn(5, 2500, requires_grad=True), torch.randn(5, 4).log_softmax(1)
    args = student, [torch.tensor([[7, 8, 100, 2048]]).expand(5, -1)], [log_probs], None, labels
    got, (grad,) = value_and_grads(af.topk_kd_loss, args, tail="bucket")
    want, (right,) = value_and_grads(af.reference.topk_kd_loss, convert(args, dtype=torch.float64), tail="bucket")
    assert relative_error(got, want) <= 1e-6 and relative_error(grad, right) <= 1e-5


@cpu_only
@pytest.mark.parametrize("options", [{}, {"support": "student"}, {"return_stats": True}])
@pytest.mark.parametrize("bad", [-1, C, 2**32 + 1, -(2**62)])  # the last is what kernels take for no class
def test_a_class_that_is_none_is_named(bad, options):
    student, indices, log_probs, weights, labels, _ = _problem()
    indices[1][2, 0] = bad
    with pytest.raises(ValueError, match=rf"teacher_indices\[1\] must be in \[0, {C}\), got {bad} in row 2"):
        af.topk_kd_loss(student, indices, log_probs, weights, labels, tail="bucket", **options)


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
        for index, log_prob, bad in zip(indices, log_probs, (-5, 2**40)):
            index[1], log_prob[1] = bad, math.nan
    got, stats = af.topk_kd_loss(student, indices, log_probs, weights, labels, **options)
    torch.testing.assert_close(got, want)
    assert torch.autograd.grad(got, student)[0].isfinite().all() and not any(x[1].any() for x in stats)


@cpu_only
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


def _as_reference(args, gradient=1e-5, **options):
    """As float64 plain PyTorch: value, gradients and statistics."""
    wide = convert(args, dtype=torch.float64, device=torch.device("cpu"))
    want, want_grads = value_and_grads(af.reference.topk_kd_loss, wide, **options)
    got, grads = value_and_grads(af.topk_kd_loss, args, **options)
    assert relative_error(got, want) <= 1e-6
    for grad, want_grad in zip(grads, want_grads):
        assert relative_error(grad, want_grad) <= gradient
    _, stats = af.topk_kd_loss(*args, return_stats=True, **options)
    _, want_stats = af.reference.topk_kd_loss(*wide, return_stats=True, **options)
    for name, x, y in zip(stats._fields, stats, want_stats):
        assert relative_error(x, y) <= 2e-6, name


class _Operators(TorchDispatchMode):
    """Counts them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"divergence": "jsd", "temperature": 1.0}])
def test_takes_few_operators(options, on):
    """Each of them is a launch on a GPU, or several; in plain PyTorch it takes 240."""
    if on == "reference":
        pytest.skip("about the kernels")
    student, indices, log_probs, weights, labels, _ = _problem()
    with _Operators() as operators:
        value_and_grads(
            lambda *args: af.topk_kd_loss(*args, tail="bucket", **options),
            (student, indices, log_probs, weights, labels),
        )
    assert operators.count <= 60


@pytest.mark.parametrize(("teachers", "k"), [(33, 2), (2, 4097)])
def test_more_than_the_gpus_kernel_of_entries_takes(teachers, k):
    """They go on in plain PyTorch behind the sweep."""
    torch.manual_seed(6)
    classes = 9 if k < 9 else k + 3
    student = torch.randn(2, classes, requires_grad=True)
    tops = [torch.randn(2, classes).log_softmax(1).topk(k) for _ in range(teachers)]
    weights = torch.rand(2, teachers, requires_grad=True)
    args = student, [top.indices for top in tops], [top.values for top in tops], weights
    got, grads = value_and_grads(af.topk_kd_loss, args, tail="bucket", divergence="jsd")
    want, right = value_and_grads(
        af.reference.topk_kd_loss, convert(args, dtype=torch.float64), tail="bucket", divergence="jsd"
    )
    assert relative_error(got, want) <= 1e-6
    assert all(relative_error(g, r) <= 1e-5 for g, r in zip(grads, right))


@pytest.mark.parametrize("k", [1, 33, 300, 4096])
def test_any_number_of_entries(k, on):
    """One thread has several of them, one teacher or two name a class, some in any order."""
    if on == "reference":
        pytest.skip("it computes in float32")
    if on == "triton" and CHOSEN != "gpu":
        k = min(k, 1100)  # each entry is compared with each other: two minutes in the interpreter
    torch.manual_seed(7)
    student = torch.randn(3, 5000, requires_grad=True)
    tops = [torch.randn(3, 5000).log_softmax(1).topk(k) for _ in range(2)]
    shuffled = torch.randperm(k)
    indices = [tops[0].indices, tops[1].indices[:, shuffled]]
    log_probs = [tops[0].values, tops[1].values[:, shuffled]]
    log_probs[0][2, k // 2 :: 7] = -math.inf  # makes the reverse KL infinite, and gets no gradient
    weights = torch.rand(3, 2, requires_grad=True)
    args = student, indices, log_probs, weights, torch.tensor([4, -100, 4999])
    for options in ({"divergence": "reverse_kl"}, {"support": "student"}):
        options |= {"tail": "bucket", "temperature": 3.3, "reduction": "none"}
        got, grads = value_and_grads(af.topk_kd_loss, args, **options)
        want, right = value_and_grads(af.reference.topk_kd_loss, convert(args, dtype=torch.float64), **options)
        torch.testing.assert_close(got, want.float(), rtol=1e-6, atol=0)
        assert relative_error(grads[0], right[0]) <= 1e-5
        torch.testing.assert_close(grads[1], right[1].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_long_rows_with_odd_numbers_of_classes(tail, on):
    """Longer than what a GPU keeps the bits or the logits of at a time; with ties, a class that is named again and again, and
    teachers that agree on classes."""
    classes = 2**17 + 41 if on == "cuda" else 5001
    student = torch.randn(2, classes).round(decimals=1) + 3
    student[1, 7] = 0.0 if tail == "uniform" else -math.inf  # there it would make the loss infinite
    student.requires_grad_()
    top = student.detach().topk(9).indices
    some = torch.tensor([[classes - 1, 5, classes - 2, 0, 5, 5], [classes - 40, 1, 2, 1, 3, 4]])
    indices = [torch.cat([top[:, :5], some], 1), torch.cat([some[:, 1:3], top[:, 3:9]], 1), top[:, :1]]
    log_probs = [torch.randn(2, index.shape[1]).log_softmax(1) - 0.2 for index in indices]
    args = student, indices, log_probs, torch.rand(2, 3).requires_grad_(), torch.tensor([5, classes - 3])
    options = dict(divergence="jsd", support="student") if tail == "bucket" else {}
    _as_reference(args, tail=tail, temperature=1.5, alpha=0.6, reduction="none", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_logits_the_first_are_the_largest(dtype):
    """support="student" where many logits are those of the k-th."""
    student = torch.randint(0, 3, (6, 40)).to(dtype)
    student[0], student[1, ::3] = 1, -50
    student.requires_grad_()
    indices = [torch.rand(6, 40).argsort(1)[:, :k] for k in (12, 30)]
    log_probs = [torch.randn(6, index.shape[1]).log_softmax(1) for index in indices]
    args = student, indices, log_probs, None
    step = 2**-8 if dtype == torch.bfloat16 else 0
    _as_reference(args, 1e-5 + step, tail="bucket", support="student", divergence="skew_kl", temperature=2.0)


def test_a_teacher_without_weight_counts_nothing_and_nan_stays_in_its_row():
    student, indices, log_probs, _, labels, _ = _problem()
    labels[1] = 0
    want = value_and_grads(
        af.topk_kd_loss,
        (student, indices[:1], log_probs[:1], torch.ones(N, 1), labels),
        tail="bucket",
        divergence="jsd",
    )
    for bad in (math.nan, -math.inf, math.inf):
        given = [log_probs[0], torch.full_like(log_probs[1], bad)]
        weights = torch.tensor([1.0, 0.0])
        got = value_and_grads(
            af.topk_kd_loss, (student, indices, given, weights, labels), tail="bucket", divergence="jsd"
        )
        torch.testing.assert_close(got, want)
    options = dict(tail="bucket", reduction="none")
    clean, (clean_grad,) = value_and_grads(af.topk_kd_loss, (student, indices, log_probs, None), **options)
    others = [0, 2, 3, 4]
    for column in (int(indices[0][1, 0]), next(c for c in range(C) if not any((i[1] == c).any() for i in indices))):
        z = student.detach().clone()
        z[1, column] = math.nan
        loss, (grad,) = value_and_grads(af.topk_kd_loss, (z.requires_grad_(), indices, log_probs, None), **options)
        assert loss.isnan().tolist() == [False, True, False, False, False] and grad[1].isnan().all()
        torch.testing.assert_close((loss[others], grad[others]), (clean[others], clean_grad[others]))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_where_the_loss_is_the_cross_entropy_alone_teachers_may_hold_nan(divergence):
    student, indices, log_probs, weights, labels, _ = _problem()
    log_probs[0][0] = math.nan
    log_probs[1][2, 1] = math.nan
    args = student, indices, log_probs, weights, labels
    got = af.topk_kd_loss(*args, tail="bucket", alpha=0.0, divergence=divergence)
    grads = torch.autograd.grad(got, (student, weights), allow_unused=True)
    want = torch.nn.functional.cross_entropy(student, labels)
    (right,) = torch.autograd.grad(want, student)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(grads[0], right, rtol=1e-5, atol=1e-7)
    assert grads[1] is None or not grads[1].any()


@pytest.mark.parametrize("divergence", ["jsd", "reverse_kl"])
@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_the_weight_of_a_broken_teacher_has_the_gradient_of_a_teacher_that_names_nothing(bad, divergence):
    """Where it is 0; and none where that teacher would make the reverse KL infinite."""
    student, indices, log_probs, weights, labels, _ = _problem()
    log_probs[1][3:] = bad
    weights = weights.detach().clone()
    weights[2:, 1] = 0
    args = student, indices, log_probs, weights.requires_grad_(), labels
    options = dict(tail="bucket", divergence=divergence, reduction="none")
    want, want_grads = value_and_grads(af.reference.topk_kd_loss, convert(args, dtype=torch.float64), **options)
    loss, grads = value_and_grads(af.topk_kd_loss, args, **options)
    torch.testing.assert_close(loss, want.float(), rtol=1e-5, atol=1e-6)
    for got, right in zip(grads, want_grads):
        torch.testing.assert_close(got, right.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("support", ["teacher", "student"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_masked_classes_of_the_student(divergence, support):
    """Named by one teacher, by nobody, all that nobody names, and all there are."""
    student, indices, log_probs, _, _, _ = _problem()
    z = student.detach().clone()
    named = [set(indices[0][i].tolist()) | set(indices[1][i].tolist()) for i in range(N)]
    z[0, indices[0][0, 1]] = -math.inf
    z[1, [next(c for c in range(C) if c not in named[1])]] = -math.inf
    z[2, [c for c in range(C) if c not in named[2]]] = -math.inf
    z[3] = -math.inf
    z[4] = -math.inf
    indices[0][4], indices[1][4] = torch.arange(4) + 4, torch.arange(3) + 4  # none of the first that are as large
    args = z.requires_grad_(), indices, log_probs, None
    options = dict(tail="bucket", divergence=divergence, support=support, reduction="none")
    want, (want_grad,) = value_and_grads(af.reference.topk_kd_loss, convert(args, dtype=torch.float64), **options)
    loss, (grad,) = value_and_grads(af.topk_kd_loss, args, **options)
    torch.testing.assert_close(loss, want.float(), rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(grad, want_grad.float(), rtol=1e-5, atol=1e-6, equal_nan=True)
    assert loss[3:].isnan().all() and (divergence != "forward_kl" or support == "student" or loss[0].isposinf())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_where_a_side_has_nothing(divergence):
    """A student without any class, or without one for the bucket; teachers that give their class, or nothing, or it nothing."""
    z = torch.zeros(4, 3)
    z[0, 1:] = z[1] = z[2, 1] = -math.inf
    for log_p in ([0.0, 0.0], [0.0, -math.inf], [-math.inf, -math.inf], [-0.5, -0.7]):
        for index, logits in ((torch.zeros(4, 1, dtype=torch.int64), z[:, :1]), (torch.tensor([[0]] * 3 + [[2]]), z)):
            weights = torch.tensor([0.4, 0.5]).expand(4, 2).clone().requires_grad_()
            given = [torch.full((4, 1), x) for x in log_p]
            args = logits.clone().requires_grad_(), [index] * 2, given, weights
            options = dict(tail="bucket", divergence=divergence, reduction="none")
            want, want_grads = value_and_grads(af.reference.topk_kd_loss, convert(args, dtype=torch.float64), **options)
            loss, grads = value_and_grads(af.topk_kd_loss, args, **options)
            torch.testing.assert_close(loss, want.float(), rtol=1e-5, atol=1e-6, equal_nan=True)
            for got, right in zip(grads, want_grads):
                torch.testing.assert_close(got, right.float(), rtol=1e-5, atol=1e-6, equal_nan=True)


def test_reverse_kl_of_classes_that_a_teacher_gives_nothing():
    """By name or in its bucket, while another teacher gives them something: infinite, and no gradient goes through them."""
    student, indices, log_probs, weights, _, _ = _problem()
    log_probs[0][0, 1] = -math.inf
    shared = [set(indices[0][i].tolist()) & set(indices[1][i].tolist()) for i in range(N)]
    row = next(i for i in range(1, N) if shared[i])
    log_probs[1][row, (indices[1][row] == min(shared[row])).nonzero()[0]] = -math.inf
    log_probs[0][4] = torch.tensor([0.5, 0.25, 0.125, 0.25]).log()  # more than 1: nothing is left
    args = student, indices, log_probs, weights
    options = dict(tail="bucket", divergence="reverse_kl", reduction="none")
    want, want_grads = value_and_grads(af.reference.topk_kd_loss, convert(args, dtype=torch.float64), **options)
    loss, grads = value_and_grads(af.topk_kd_loss, args, **options)
    assert torch.equal(loss.isinf(), want.isinf()) and loss.isinf().sum() >= 3
    torch.testing.assert_close(grads[0], want_grads[0].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lost", [1e-12, 1e-14, 1e-17])
def test_what_a_sure_teacher_leaves_keeps_its_digits(lost, on):
    """1 - exp(-1e-17) is 0 in float64."""
    if on == "reference":
        pytest.skip("it computes in float32")
    student = torch.tensor([[1.0, 2.0, 3.0, 0.0]], requires_grad=True)
    args = student, [torch.tensor([[1]])], [torch.tensor([[-lost]])], None
    options = dict(tail="bucket", temperature=1.0, divergence="reverse_kl")
    got, grads = value_and_grads(af.topk_kd_loss, args, **options)
    want, right = value_and_grads(af.reference.topk_kd_loss, convert(args, dtype=torch.float64), **options)
    assert relative_error(got, want) <= 1e-6 and relative_error(grads[0], right[0]) <= 1e-5
    _, stats = af.topk_kd_loss(*args, **options, return_stats=True)
    _, wanted = af.reference.topk_kd_loss(*convert(args, dtype=torch.float64), **options, return_stats=True)
    torch.testing.assert_close(stats.teacher_kl, wanted.teacher_kl.float(), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("score", [100.0, 800.0, math.inf])
def test_scores_that_are_no_log_probabilities_of_a_teacher_without_weight(score, tail, on):
    if on == "reference":
        pytest.skip("it computes in float32")
    student, indices, log_probs, weights, labels, _ = _problem()
    log_probs[1][3:] += score
    weights = weights.detach().clone()
    weights[3:, 1] = 0
    args = student, indices, log_probs, weights.requires_grad_(), labels
    options = dict(tail=tail, reduction="none", return_stats=True)
    loss, stats = af.topk_kd_loss(*args, **options)
    want, want_stats = af.reference.topk_kd_loss(*convert(args, dtype=torch.float64), **options)
    torch.testing.assert_close(loss, want.float(), rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert grad.isfinite().all()
    torch.testing.assert_close(stats.teacher_kl, want_stats.teacher_kl.float(), rtol=1e-5, atol=1e-6, equal_nan=True)


def test_label_smoothing_beside_a_finite_mask():
    student = torch.zeros(1, 2000)
    student[0, 0] = torch.finfo(torch.float32).min
    args = student, [torch.tensor([[1, 2]])], [torch.tensor([[0.5, 0.3]]).log()], None, torch.tensor([1])
    got = af.topk_kd_loss(*args, temperature=1.0, alpha=0.5, label_smoothing=0.1, tail="bucket")
    want = 0.5 * 0.1 / 2000 * -student[0, 0].double()
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("classes", "temperature"), [(11, 1.0), (5000, 2.0)])
def test_a_finite_mask_of_all_that_nobody_names(classes, temperature):
    """The student has nothing there, as with a mask of -inf."""
    torch.manual_seed(0)
    student, named = torch.full((4, classes), -torch.inf), torch.arange(6).expand(4, 6).contiguous()
    student[:, :6] = torch.randn(4, 6)
    log_probs = torch.randn(4, 6).log_softmax(1) + math.log(0.9)

    def made(mask):
        z = student.masked_fill(student == -torch.inf, mask).requires_grad_()
        options = dict(temperature=temperature, tail="bucket", divergence="jsd", reduction="none", return_stats=True)
        loss, stats = af.topk_kd_loss(z, [named], [log_probs], None, torch.tensor([0, 5, 2, 3]), **options)
        return loss, *torch.autograd.grad(loss.sum(), z), stats.student_entropy

    for got, want in zip(made(torch.finfo(torch.float32).min), made(-torch.inf)):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@cpu_only
def test_compiled_code_still_refuses_wrong_values(on):
    if on == "reference":
        pytest.skip("about the kernel")
    torch._dynamo.reset()
    student, indices, log_probs, weights, labels, _ = (convert(x) if isinstance(x, list) else x for x in _problem())
    given = student.detach(), indices[0], log_probs[0], weights.detach()[:, :1], labels
    options = dict(tail="bucket", divergence="reverse_kl", support="student")
    compiled = torch.compile(
        lambda z, i, p, w, y: af.topk_kd_loss(z, [i], [p], w, y, **options), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(
        compiled(*given), af.topk_kd_loss(given[0], [given[1]], [given[2]], *given[3:], **options)
    )
    for wrong, message in (
        ((given[0], given[1] + C, *given[2:]), r"teacher_indices must be in \[0, 11\), got"),
        ((*given[:3], -given[3], given[4]), "teacher_weights must be finite and not negative"),
        ((*given[:4], given[4] + C), r"labels\[0\] must be in \[0, 11\)"),
    ):
        with pytest.raises(RuntimeError, match="topk_kd_loss: " + message):
            compiled(*wrong)


def test_gradients_are_rounded_once_under_a_loss_scale():
    student, indices, log_probs, weights, labels, _ = _problem(torch.half)
    args = student, indices, log_probs, weights, labels
    exact = convert(args, dtype=torch.float64, device=torch.device("cpu"))
    for scale in (2.0**-20, 1.0, 3.0e4):
        loss = af.topk_kd_loss(*args, tail="bucket", divergence="skew_kl") * scale
        (grad,) = torch.autograd.grad(loss, student)
        want = torch.autograd.grad(
            af.reference.topk_kd_loss(*exact, tail="bucket", divergence="skew_kl") * scale, exact[0]
        )
        torch.testing.assert_close(grad.cpu().double(), want[0].half().double(), rtol=2**-10, atol=2**-24)


@pytest.mark.parametrize("divergence", ["jsd", "skew_kl", "skew_reverse_kl"])
def test_probabilities_above_1_where_the_student_has_hardly_anything(divergence):
    """q / m is rounded to 0 there, and q is not."""
    far = torch.arange(735, 747, 0.25)  # what is named is float64
    student = torch.stack([torch.zeros_like(far), -far], 1).requires_grad_()
    named, log_probs = torch.ones_like(far[:, None], dtype=torch.int64), torch.full_like(far[:, None], math.log(1000.0))
    options = dict(tail="bucket", divergence=divergence, temperature=1.0, reduction="none")
    loss = af.topk_kd_loss(student, [named], [log_probs], None, **options)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    q, p = torch.tensor([[1.0, 1e-300], [1e-300, 1000.0]], dtype=torch.float64, device="cpu")
    want = _distance(divergence, {"jsd": 0.5}.get(divergence, 0.1), p, q)
    # The tolerance is that of sums of 1000.
    torch.testing.assert_close(loss.detach().cpu().double(), want.expand(len(far)), rtol=1e-5, atol=1e-4)
    assert grad.abs().max() <= 1e-30
