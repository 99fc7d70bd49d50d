"""amtml_fast.dropin against the plain formulas it replaces, each written out here once, in the dtype of its inputs."""

import ast
import itertools
import math
import pathlib
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from backends import DEVICE, cpu_only

import amtml_fast as af
from amtml_fast import dropin
from amtml_fast.testing import relative_error

# --- the formulas, as the libraries have them


def gram_distances(e, squared=False, eps=1e-12):
    norms = e.pow(2).sum(1)
    d = (norms[:, None] + norms[None, :] - 2 * e @ e.t()).clamp(min=eps)
    d = d if squared else d.sqrt()
    return d * (1 - torch.eye(len(e), dtype=e.dtype, device=e.device))


def plain_distance(student, teacher, squared=False):
    d, t = gram_distances(student, squared), gram_distances(teacher, squared)
    return F.smooth_l1_loss(d / d[d > 0].mean(), t / t[t > 0].mean())


def angles(x):
    e = F.normalize(x[None] - x[:, None], dim=2)
    return torch.bmm(e, e.transpose(1, 2))


def plain_angle(student, teacher):
    return F.smooth_l1_loss(angles(student), angles(teacher))


def kl_terms(student, teacher, T):
    """T^2 p (log p - log q), the classes in dimension 1."""
    log_q, p = F.log_softmax(student / T, 1), F.softmax(teacher / T, 1)
    return F.kl_div(log_q, p, reduction="none") * T**2


def over_examples(student, teacher, T):
    """RepDistiller's reduction: the sum over everything, divided by the length of the batch."""
    return kl_terms(student, teacher, T).sum() / student.shape[0]


def over_positions(student, teacher, T):
    """mdistiller's: the sum over classes, the mean over the rest."""
    return kl_terms(student, teacher, T).sum(1).mean()


def over_teachers(student, teachers, weights, T):
    """MMKD's: weights are whatever broadcasts to [N, T]."""
    return (weights * torch.stack([kl_terms(student, t, T).sum(-1) for t in teachers], 1)).sum(-1).mean()


def plain_fitnet(student, teacher, weight):
    if student.dim() == 2:
        student, teacher = student[..., None, None], teacher[..., None, None]
    return (F.conv2d(F.normalize(student), weight) - F.normalize(teacher)).pow(2).mean()


def standardized(z):
    return (z - z.mean(-1, keepdim=True)) / (1e-7 + z.std(-1, keepdim=True))


def plain_weights(conv_map, theta, W):
    beta = conv_map.flatten(2).max(-1).values
    return torch.stack([(beta * t) @ W for t in theta]).squeeze(2).t().softmax(1)


def plain_mixture(conv_map, theta, W, soft_targets):
    return (plain_weights(conv_map, theta, W).unsqueeze(2) * soft_targets).sum(1)


def mean_kl(log_q, mixed, T, alpha):
    return F.kl_div(log_q, mixed, reduction="sum") / mixed.numel() * (T * T * 2 * alpha)


def plain_loss(y, labels, mixed, T, alpha):
    return mean_kl(F.log_softmax(y / T, 1), mixed, T, alpha) + (1 - alpha) * F.cross_entropy(y, labels)


def plain_learning_loss(y, labels, mixed, T, alpha):
    log_q, constant = F.log_softmax(y / T, 1), mixed.detach()
    kd = mean_kl(log_q, mixed, T, alpha) + (1 - alpha) * F.cross_entropy(log_q, labels)
    return kd + plain_angle(log_q, constant) + plain_distance(log_q, constant)


# --- every drop-in: ours, the formula, and inputs of which the batch is N long


N, C = 12, 9


def draw(*size):
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)), device="cpu")


def leaf(*size):
    return draw(*size).requires_grad_()


def holding(module, **tensors):
    """The module with these tensors in the place of its parameters."""
    for name, tensor in tensors.items():
        delattr(module, name)
        setattr(module, name, tensor)
    return module


def fitnet(student, teacher, weight):
    net = dropin.FitNet(student.shape[1], teacher.shape[1])
    holding(net.transform, weight=weight)
    return net(student, teacher)


def adapter(kind, theta, W):
    return holding(kind([None] * len(theta), [N, theta.shape[1], 1, 1]), theta=theta, W=W)


def stage_one(kind):
    """From the student's map and logits to the loss, as the notebooks go: forward, the mixture, ``loss``."""

    def ours(conv_map, theta, W, soft_targets, y, labels):
        of = adapter(kind, theta, W).eval()  # without the regulariser, beside which a wrong gradient would not be seen
        mixed = of(conv_map, soft_targets)
        if mixed.shape[1] == len(theta):  # the weights: their notebook goes on from them
            mixed = (mixed.unsqueeze(2) * soft_targets).sum(1)
        return of.loss(y, labels, mixed, T=5.0)

    def plain(conv_map, theta, W, soft_targets, y, labels):
        loss = plain_learning_loss if kind is dropin.LearningAdapter else plain_loss
        mixed = plain_mixture(conv_map, theta, W, soft_targets)
        return loss(y, labels, mixed, 5.0, 0.7)

    return ours, plain, (*ADAPTED, SOFT, leaf(N, C), torch.arange(N, device="cpu") % C)


S, T = leaf(N, C), draw(N + 1, C)[:N] * 2
MAP_S, MAP_T = leaf(N, 3, 4, 5), draw(N + 1, 3, 4, 5)[:N]
TOKENS_S, TOKENS_T = leaf(N, C, 7), draw(N, C, 8)[..., :7]
PIXELS_S, PIXELS_T = leaf(N, 3, 4, 2), draw(N, 3, 4, 3)[..., :2]
ADAPTED = MAP_S, leaf(4, 3), leaf(3, 1)  # map, theta, W
SOFT = torch.stack([draw(N, C + i)[:, :C].softmax(1) for i in range(4)], 1)  # [N, 4, C]


def relations(distance, angle):
    return lambda s, t: (
        distance * plain_distance(s.flatten(1), t.flatten(1)) + angle * plain_angle(s.flatten(1), t.flatten(1))
    )


KINDS = {
    "RKdAngle": (dropin.RKdAngle(), plain_angle, (S, T)),
    "RkdDistance": (dropin.RkdDistance(), plain_distance, (S, T)),
    "DistillKL": (dropin.DistillKL(4), lambda s, t: over_examples(s, t, 4), (S, T)),
    "DistillKL-is_ca": (
        lambda s, t: dropin.DistillKL(3)(s, t, is_ca=True),
        lambda s, t: kl_terms(s, t, 3).sum(-1),
        (S, T),
    ),
    "DistillKL-unreduce": (
        lambda s, t: dropin.DistillKL(3)(s, t, unreduce=True),
        lambda s, t: kl_terms(s, t, 3).sum(-1),
        (S, T),
    ),
    "DistillKL-tokens": (dropin.DistillKL(4), lambda s, t: over_examples(s, t, 4), (TOKENS_S, TOKENS_T)),
    "DistillKL-pixels": (dropin.DistillKL(4), lambda s, t: over_examples(s, t, 4), (PIXELS_S, PIXELS_T)),
    "RKDLoss": (dropin.RKDLoss(), relations(25, 50), (S, T)),
    "RKDLoss-maps": (dropin.RKDLoss(w_d=2, w_a=3), relations(2, 3), (MAP_S, MAP_T)),
    "HintLoss": (dropin.HintLoss(), F.mse_loss, (MAP_S, MAP_T)),
    "HintLoss-rows": (dropin.HintLoss(), F.mse_loss, (S, T)),
    "kd_loss": (lambda s, t: dropin.kd_loss(s, t, 4), lambda s, t: over_positions(s, t, 4), (S, T)),
    "kd_loss-tokens": (
        lambda s, t: dropin.kd_loss(s, t, 4),
        lambda s, t: over_positions(s, t, 4),
        (TOKENS_S, TOKENS_T),
    ),
    "kd_loss-standardized": (
        lambda s, t: dropin.kd_loss(s, t, 2, True),
        lambda s, t: over_positions(standardized(s), standardized(t), 2),
        (S, T),
    ),
    "kd_loss-standardized-tokens": (
        lambda s, t: dropin.kd_loss(s, t, 2, True),
        lambda s, t: over_positions(standardized(s), standardized(t), 2),
        (TOKENS_S, TOKENS_T),
    ),
    "rkd_loss": (dropin.rkd_loss, relations(25, 50), (S, T)),
    "rkd_loss-squared": (
        lambda s, t: dropin.rkd_loss(s, t, squared=True, angle_weight=5),
        lambda s, t: 25 * plain_distance(s, t, squared=True) + 5 * plain_angle(s, t),
        (S, T),
    ),
    "AngleWiseRKD": (
        dropin.AngleWiseRKD(),
        lambda s, t: 50 * plain_angle(F.normalize(s), F.normalize(t)),
        (S, T.clone().requires_grad_()),
    ),
    "AngleWiseRKD-raw": (
        dropin.AngleWiseRKD(2.0, with_l2_norm=False),
        relations(0, 2),
        (MAP_S, MAP_T.clone().requires_grad_()),
    ),
    "DistanceWiseRKD": (
        dropin.DistanceWiseRKD(),
        lambda s, t: 25 * plain_distance(F.normalize(s), F.normalize(t)),
        (S, T.clone().requires_grad_()),
    ),
    "MatchLogits": (
        dropin.MatchLogits(SimpleNamespace(kd_T=4)),
        lambda s, ts, w: over_teachers(s, ts, w, 4),
        (S, [T, T.flip(0)], draw(N, 2).softmax(1).requires_grad_()),
    ),
    "MatchLogits-scalar": (
        dropin.MatchLogits(4),
        lambda s, ts, w: over_teachers(s, ts, w, 4),
        (S, [T, T.flip(0)], leaf()),
    ),
    "FitNet": (fitnet, plain_fitnet, (MAP_S, draw(N, 7, 4, 5), leaf(7, 3, 1, 1))),
    "FitNet-pixel": (fitnet, plain_fitnet, (MAP_S, draw(N, 7, 1, 1), leaf(7, 3, 1, 1))),
    "FitNet-rows": (fitnet, plain_fitnet, (S, draw(N, 7), leaf(7, C, 1, 1))),
    "Adapter": (lambda m, theta, W: adapter(dropin.Adapter, theta, W)(m), plain_weights, ADAPTED),
    "Adapter-loss": stage_one(dropin.Adapter),
    "MixtureAdapter": (
        lambda m, theta, W, soft: adapter(dropin.MixtureAdapter, theta, W)(m, soft),
        plain_mixture,
        (*ADAPTED, SOFT),
    ),
    "MixtureAdapter-loss": stage_one(dropin.MixtureAdapter),
    "LearningAdapter-loss": stage_one(dropin.LearningAdapter),
}


def test_every_drop_in_is_compared():
    assert {name.split("-")[0] for name in KINDS} == set(dropin.__all__)


def converted(args, change):
    """Fresh leaves of the same tensors."""

    def one(a):
        if isinstance(a, list):
            return [one(x) for x in a]
        return change(a).detach().clone().requires_grad_(a.requires_grad) if a.is_floating_point() else change(a)

    return tuple(one(a) for a in args)


def exactly(args):
    return converted(args, lambda a: a.double() if a.is_floating_point() else a)


def gradients(function, args, autocast=False):
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        out = function(*args)
    upstream = torch.arange(out.numel(), dtype=out.dtype, device=out.device).cos().view(out.shape)
    return out.detach(), torch.autograd.grad(out, leaves, upstream)


@pytest.mark.parametrize("name", KINDS)
def test_values_and_gradients_are_those_of_the_formula(name, on):
    ours, plain, args = KINDS[name]
    want, want_grads = gradients(plain, exactly(args))
    got, grads = gradients(ours, converted(args, lambda a: a.to(DEVICE)))
    assert got.dtype == torch.float32 and got.shape == want.shape and (want > 0).all()
    assert relative_error(got, want) < 1e-6
    for grad, want_grad in zip(grads, want_grads, strict=True):
        assert want_grad.norm() > 0 and relative_error(grad, want_grad) < 1e-5


@pytest.mark.parametrize(
    "dtype, autocast",
    [(torch.bfloat16, False), (torch.float16, False), (torch.bfloat16, True)],
    ids=["bf16", "fp16", "bf16-autocast"],
)
@pytest.mark.parametrize("name", KINDS)
def test_16_bit_inputs_are_computed_in_float32(name, dtype, autocast, on):
    """The value of the rounded inputs to float32's rounding; of the gradient, only the last step is 16-bit."""
    ours, plain, args = KINDS[name]
    narrow = converted(args, lambda a: a.to(DEVICE, dtype) if a.is_floating_point() else a.to(DEVICE))
    want, want_grads = gradients(
        plain, converted(narrow, lambda a: a.cpu().double() if a.is_floating_point() else a.cpu())
    )
    got, grads = gradients(ours, narrow, autocast)
    assert got.dtype == torch.float32 and relative_error(got, want) < 1e-6
    for grad, want_grad in zip(grads, want_grads, strict=True):
        assert grad.dtype == dtype and relative_error(grad, want_grad) < torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("name", KINDS)
def test_autocast_narrows_nothing(name, on):
    ours, _, args = KINDS[name]
    args = converted(args, lambda a: a.to(DEVICE))
    want, want_grads = gradients(ours, args)
    got, grads = gradients(ours, args, autocast=True)
    torch.testing.assert_close([got, *grads], [want, *want_grads], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("name", KINDS)
def test_a_batch_of_none_or_one(name, length, on):
    """0 where theirs are NaN, and finite gradients."""
    ours, plain, args = KINDS[name]
    short = converted(args, lambda a: a[:length] if a.shape[:1] == (N,) else a)
    got, grads = gradients(ours, converted(short, lambda a: a.to(DEVICE)))
    assert all(g.isfinite().all() for g in (got, *grads))
    if length == 0:
        assert got.sum() == 0
    elif name != "LearningAdapter-loss":  # the sum of what is and what is not NaN in the formula
        want, _ = gradients(plain, exactly(short))
        assert relative_error(got, want.nan_to_num()) < 1e-5  # of one row, where no rounding averages out


# --- where the logits are not [N, C]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: dropin.DistillKL(4)(TOKENS_S, TOKENS_T, is_ca=True), r"DistillKL: y_s must be \[N, C\] with is_ca"),
        (lambda: dropin.DistillKL(4)(TOKENS_S, TOKENS_T, unreduce=True), r"DistillKL: y_s must be \[N, C\] with is_ca"),
        (lambda: dropin.DistillKL(4)(S[0], T[0]), r"DistillKL: y_s must be \[N, C\] or \[N, C, ...\], .* got \[9\]"),
        (lambda: dropin.DistillKL(4)(S, T[:1]), r"DistillKL: y_t must be \[12, 9\] like y_s, got \[1, 9\]"),
        (
            lambda: dropin.kd_loss(TOKENS_S, TOKENS_T.mT, 4),
            r"kd_loss: logits_teacher must be \[12, 9, 7\] like logits_student, got \[12, 7, 9\]",
        ),
        (
            lambda: dropin.MatchLogits(4)(TOKENS_S, [TOKENS_T], torch.ones(N, 1)),
            r"MatchLogits: logit_s must be \[N, C\], got \[12, 9, 7\]",
        ),
        (
            lambda: dropin.Adapter([None], MAP_S.shape).loss(TOKENS_S, torch.zeros(N).long(), TOKENS_T),
            r"Adapter.loss: y must be \[N, C\], got \[12, 9, 7\]",
        ),
        (
            lambda: dropin.LearningAdapter([None], MAP_S.shape).loss(S, torch.zeros(N).long(), SOFT),
            r"LearningAdapter.loss: weighted_logits must be \[12, 9\] or broadcast to it, got \[12, 4, 9\]",
        ),
        (
            lambda: dropin.MixtureAdapter([None] * 3, MAP_S.shape)(MAP_S, SOFT),
            r"MixtureAdapter: te_logits_list must be \[12, 3, C\], got \[12, 4, 9\]",
        ),
        (
            lambda: dropin.FitNet(3, 7)(MAP_S, draw(N, 7, 2, 2)),
            r"FitNet: teacher must have the height and width of student",
        ),
        (lambda: dropin.HintLoss()(S, T[:, :1]), r"HintLoss: f_t must be \[12, 9\] like f_s, got \[12, 1\]"),
    ],
)
def test_what_would_differ_from_theirs_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("size", [(N, 2), (2,), (1, 2), (N, 1), (1, 1), ()], ids=str)
def test_match_logits_broadcasts_its_weights(size, on):
    args = S, [T, T.flip(0)], draw(N, 3).abs()[: size[0] if len(size) > 1 else 1, : size[-1] if size else 1]
    weights = args[2].reshape(size).requires_grad_()
    want, want_grads = gradients(lambda s, ts, w: over_teachers(s, ts, w, 4), exactly((*args[:2], weights)))
    got, grads = gradients(dropin.MatchLogits(4), converted((*args[:2], weights), lambda a: a.to(DEVICE)))
    assert relative_error(got, want) < 1e-6
    assert all(relative_error(g, w) < 1e-5 for g, w in zip(grads, want_grads, strict=True))


def test_the_gradient_of_a_weight_that_all_rows_share_is_summed_in_float32(on):
    """Of a single row it is below half's smallest number."""
    teacher = draw(4096, 3)
    student = teacher + 0.02 * draw(4096, 4)[:, :3]
    weight = torch.tensor(1.0, dtype=torch.half, device="cpu")
    args = student.half(), [teacher.half()], weight.requires_grad_()
    _, (want,) = gradients(lambda s, ts, w: over_teachers(s, ts, w, 4), exactly(args))
    assert want / len(student) < torch.finfo(torch.half).smallest_normal / 1024
    _, (got,) = gradients(dropin.MatchLogits(4), converted(args, lambda a: a.to(DEVICE)))
    assert relative_error(got, want) < torch.finfo(torch.half).eps / 2


@pytest.mark.parametrize("size", [(3,), (2, 1), (N, 3), (1, N, 2)], ids=str)
def test_match_logits_refuses_other_weights(size):
    with pytest.raises(ValueError, match=r"MatchLogits: logits_weight must be \[12, 2\] or broadcast to it, got \["):
        dropin.MatchLogits(4)(S, [T, T.flip(0)], torch.ones(size))


# --- where the originals are NaN


def without(z, c):
    return torch.cat([z[:, :c], z[:, c + 1 :]], 1)


@pytest.mark.parametrize(
    "name", ["DistillKL", "DistillKL-is_ca", "DistillKL-tokens", "kd_loss", "kd_loss-tokens", "kd_loss-standardized"]
)
def test_a_masked_class_counts_nothing(name, on):
    """-inf on both sides is as if the class were not there; on the teacher's alone, as if it had probability 0."""
    ours, plain, (student, teacher) = KINDS[name]
    masked = [z.detach().clone() for z in (student, teacher)]
    for z in masked:
        z[:, 4] = -math.inf
    want, (want_grad,) = gradients(plain, exactly((without(student, 4).detach().requires_grad_(), without(teacher, 4))))
    got, (grad,) = gradients(ours, (masked[0].to(DEVICE).requires_grad_(), masked[1].to(DEVICE)))
    assert relative_error(got, want) < 1e-6 and (grad[:, 4] == 0).all()
    assert relative_error(without(grad, 4), want_grad) < 1e-5

    got, (grad,) = gradients(ours, (student.detach().to(DEVICE).requires_grad_(), masked[1].to(DEVICE)))
    assert got.isfinite().all() and grad.isfinite().all() and (grad[:, 4] != 0).all()
    if "standardized" not in name:  # theirs is finite, too
        want, (want_grad,) = gradients(plain, exactly((student, masked[1])))
        assert relative_error(got, want) < 1e-6 and relative_error(grad, want_grad) < 1e-5


def test_constant_rows_are_standardized_to_0(on):
    student = torch.full((3, 5), 2.0, device=DEVICE, requires_grad=True)
    got, (grad,) = gradients(lambda s, t: dropin.kd_loss(s, t, 4, True), (student, torch.ones(3, 5, device=DEVICE)))
    assert abs(got) < 1e-6 and (grad.abs() < 1e-6).all()


@pytest.mark.parametrize("kind", [dropin.Adapter, dropin.MixtureAdapter, dropin.LearningAdapter])
def test_a_class_without_mass_counts_nothing_in_the_adapters_loss(kind, on):
    """All teachers -inf at a class, or so far below the others that float32 has 0: the weights' gradients stay right."""
    ours, plain, (*adapted, _, _, labels) = KINDS[f"{kind.__name__}-loss"]
    for masked in (-math.inf, -600.0):  # the softmax at T = 5 of the latter is 0 in float32, not in float64
        logits = torch.stack([draw(N, C + i)[:, :C] for i in range(4)], 1)
        logits[..., 4] = masked
        args = (*adapted, (logits / 5).softmax(-1), leaf(N, C), labels)
        assert (args[3][..., 4] == 0).all()
        sure = args[3].double().clamp(min=1e-60)  # which float64 can take the logarithm of
        want, want_grads = gradients(plain, (*exactly(args)[:3], sure, *exactly(args)[4:]))
        got, grads = gradients(ours, converted(args, lambda a: a.to(DEVICE)))
        assert relative_error(got, want) < 1e-6
        assert all(relative_error(g, w) < 1e-5 for g, w in zip(grads, want_grads, strict=True))


def test_the_adapters_loss_where_most_of_a_softmax_underflows(on):
    """In float64 nothing does: its gradients are the right ones."""
    ours, plain, (*adapted, _, y, labels) = KINDS["Adapter-loss"]
    logits = torch.stack([draw(N, C + i)[:, :C] - 200 * (draw(N, C) > 0.5) for i in range(4)], 1)
    assert (logits.softmax(-1).sum(1) == 0).any() and (logits.double().softmax(-1) > 0).all()
    want, want_grads = gradients(plain, exactly((*adapted, logits.double().softmax(-1), y, labels)))
    args = (*adapted, logits.softmax(-1), y, labels)
    got, grads = gradients(ours, converted(args, lambda a: a.to(DEVICE)))
    assert relative_error(got, want) < 1e-6
    assert all(relative_error(g, w) < 1e-5 for g, w in zip(grads, want_grads, strict=True))


@pytest.mark.parametrize("kind", [dropin.Adapter, dropin.LearningAdapter])
def test_the_adapters_loss_of_a_student_with_masked_classes(kind, on):
    *_, y, labels = KINDS["Adapter-loss"][2]
    labels, mixed = labels.clamp(max=3), draw(N, C - 1).softmax(1)

    def plain(y):
        log_q = F.log_softmax(y / 5, 1)
        kl = mean_kl(log_q, mixed.double(), 5, 0.7) * (C - 1) / C  # the masked class counts in the mean
        if kind is dropin.Adapter:
            return kl + 0.3 * F.cross_entropy(y, labels)
        relations = plain_angle(log_q, mixed.double()) + plain_distance(log_q, mixed.double())
        return kl + 0.3 * F.cross_entropy(log_q, labels) + relations

    want, (want_grad,) = gradients(plain, exactly((without(y, 4).detach().requires_grad_(),)))
    student = y.detach().clone()
    student[:, 4] = -math.inf
    targets = torch.cat([mixed[:, :4], 0 * mixed[:, :1], mixed[:, 4:]], 1).to(DEVICE)
    of = kind([None] * 4, MAP_S.shape).eval()
    got, (grad,) = gradients(
        lambda y: of.loss(y, labels.to(DEVICE), targets, 5.0), (student.to(DEVICE).requires_grad_(),)
    )
    assert relative_error(got, want) < 1e-6 and (grad[:, 4] == 0).all()
    assert relative_error(without(grad, 4), want_grad) < 1e-5


def test_nan_stays_nan(on):
    """Nothing takes it for a masked class or for equal rows."""
    student = S.detach().clone()
    student[2, 3] = math.nan
    student, teacher = student.to(DEVICE), T.to(DEVICE)
    for loss in (
        dropin.DistillKL(4),
        dropin.rkd_loss,
        lambda s, t: dropin.kd_loss(s, t, 4, True),
        lambda s, t: dropin.Adapter([None], MAP_S.shape).eval().loss(s, t.argmax(1), t.softmax(1)),
    ):
        assert loss(student, teacher).isnan()


def test_squared_distances_of_large_half_features(on):
    student, teacher = (300 * draw(8, width)[:, :2048].half().to(DEVICE) for width in (2048, 2049))
    got = dropin.rkd_loss(student, teacher, squared=True, angle_weight=0)
    want = 25 * plain_distance(student.cpu().double(), teacher.cpu().double(), squared=True)
    assert relative_error(got, want) < 1e-6


def test_equal_rows_have_finite_gradients_where_the_plain_formulas_blow_up():
    student = torch.cat([S.detach()[:6]] * 2).requires_grad_()
    for loss in (dropin.RKdAngle(), dropin.RkdDistance(), dropin.rkd_loss, partial(dropin.rkd_loss, squared=True)):
        (grad,) = torch.autograd.grad(loss(student, T), student)
        assert grad.isfinite().all() and 0 < grad.abs().max() < 100


# --- the modules


def test_fitnet_is_the_authors():
    net = dropin.FitNet(3, 7)
    assert net.transform.weight.abs().max() <= 0.005 and net.transform.bias is None
    assert list(net.state_dict()) == ["transform.weight"]


@pytest.mark.parametrize("kind", [dropin.Adapter, dropin.MixtureAdapter, dropin.LearningAdapter])
def test_adapter_is_the_authors(kind):
    ours = kind([None] * 4, MAP_S.shape)
    torch.manual_seed(1)
    assert torch.equal(ours.theta, torch.randn(4, 3)) and torch.equal(ours.W, torch.randn(3, 1))
    mixed, labels = SOFT[:, 0], torch.arange(N) % C
    decay = 0.1 * (ours.W.square().sum() + ours.theta.square().sum())
    training = ours.loss(S, labels, mixed)
    evaluated = ours.eval().loss(S, labels, mixed)
    torch.testing.assert_close(training, evaluated + decay)
    plain = plain_learning_loss if kind is dropin.LearningAdapter else plain_loss
    torch.testing.assert_close(evaluated, plain(S, labels, mixed, 10, 0.7))
    assert ours.train().val is False
    for one_term in (0.0, 1.0):
        torch.testing.assert_close(
            ours.eval().loss(S, labels, mixed, 5, one_term), plain(S, labels, mixed, 5, one_term)
        )


def test_adapter_is_made_on_the_default_device():
    with torch.device("meta"):
        assert dropin.Adapter([None] * 4, MAP_S.shape).theta.device.type == "meta"


def test_the_adapters_loss_broadcasts_one_soft_target():
    ours, labels = dropin.Adapter([None], MAP_S.shape).eval(), torch.arange(N) % C
    torch.testing.assert_close(ours.loss(S, labels, SOFT[0, 0]), ours.loss(S, labels, SOFT[0, 0].expand(N, C)))


def test_teachers_that_require_grad_are_refused_or_constant():
    teacher = T.clone().requires_grad_()
    for loss in (dropin.DistillKL(4), lambda s, t: dropin.kd_loss(s, t, 4), lambda s, t: dropin.kd_loss(s, t, 4, True)):
        with pytest.raises(ValueError, match="requires grad, but teachers are frozen"):
            loss(S, teacher)
    for loss in (dropin.RKdAngle(), dropin.RkdDistance(), dropin.RKDLoss(), partial(dropin.rkd_loss, squared=True)):
        assert torch.autograd.grad(loss(S, teacher), [S, teacher], allow_unused=True)[1] is None


@cpu_only
@pytest.mark.parametrize("name", [n for n in KINDS if not n.startswith(("FitNet", "Adapter", "Mixture", "Learning"))])
def test_compiles_in_one_piece(name):
    ours, _, args = KINDS[name]
    want, want_grads = gradients(ours, args)
    got, grads = gradients(torch.compile(ours, fullgraph=True, backend="aot_eager"), args)
    torch.testing.assert_close([got, *grads], [want, *want_grads])


@cpu_only
@pytest.mark.parametrize("kind", [dropin.Adapter, dropin.MixtureAdapter, dropin.LearningAdapter])
def test_adapter_compiles_in_one_piece(kind):
    of = kind([None] * 4, MAP_S.shape)
    net = dropin.FitNet(3, 7)

    def step(conv_map, soft, y, labels):
        mixed = of(conv_map, soft)
        mixed = mixed if mixed.shape[1] == C else (mixed.unsqueeze(2) * soft).sum(1)
        return of.loss(y, labels, mixed) + net(conv_map, draw_map)

    draw_map = draw(N, 7, 4, 5)
    args = MAP_S, SOFT, S, torch.arange(N) % C
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(*args), step(*args))


SCRIPT = """
import torch
{imports}

torch.manual_seed(0)
student = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5))
teacher = torch.nn.Linear(6, 5).eval()
optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
criterion_div, criterion_rkd = DistillKL(4), RKDLoss(1, 2)
losses = []
for step in range(8):
    images = torch.randn(16, 6)
    logit_s = student(images)
    with torch.no_grad():
        logit_t = teacher(images)
    loss = criterion_div(logit_s, logit_t) + criterion_rkd(logit_s, logit_t)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
"""


class DistillKL(torch.nn.Module):
    def __init__(self, T):
        super().__init__()
        self.T = T

    def forward(self, y_s, y_t):
        return over_examples(y_s, y_t, self.T)


class RKDLoss(torch.nn.Module):
    def __init__(self, w_d, w_a):
        super().__init__()
        self.w_d, self.w_a = w_d, w_a

    def forward(self, f_s, f_t):
        return self.w_d * plain_distance(f_s, f_t) + self.w_a * plain_angle(f_s, f_t)


def test_a_training_script_switches_by_its_import_line():
    """The same script with the plain losses and with ours follows the same path."""
    runs = []
    for imports in ("from test_dropin import DistillKL, RKDLoss", "from amtml_fast.dropin import DistillKL, RKDLoss"):
        scope = {}
        exec(SCRIPT.format(imports=imports), scope)
        runs.append(scope["losses"])
    assert runs[0][-1] < runs[0][0]
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


# --- docs/dropin.md


TEXT = (pathlib.Path(__file__).parents[1] / "docs" / "dropin.md").read_text()
EXAMPLE = {
    name: torch.tensor(ast.literal_eval(re.search(rf"^    {name} = (.+)$", TEXT, re.M)[1]), device="cpu").double()
    for name in "zt"
}
SCOPE = {**vars(af), **vars(dropin), **EXAMPLE, "T": 2.0, "F": F, "torch": torch, "kd": af.multi_teacher_kd_loss}


def table(columns, heading):
    """The rows of the table that begins with this heading."""
    lines = TEXT[TEXT.index(heading) :].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in itertools.takewhile(lambda x: x, lines)]
    assert rows and all(len(row) == columns for row in rows)
    return rows


def value_of(cell):
    return f"{float(eval(cell.strip('`'), SCOPE)):.4f}"


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
def test_the_docs_say_how_the_libraries_define_kl():
    """Of every row: its columns say what makes the value, and so does what stands under ``here``."""
    log_q, p = F.log_softmax(EXAMPLE["z"] / 2, 1), F.softmax(EXAMPLE["t"] / 2, 1)
    kl = (p * (p.log() - log_q)).sum().item()
    factor = {"yes": 4, "no": 1, "twice": 8}
    divisor = {"rows": 2, "valid tokens": 2, "rows x classes": 6, "nothing": 1}
    rows = table(6, "| whose | call | T^2 |")
    for whose, call, squared, divided_by, here, value in rows:
        assert f"{factor[squared] * kl / divisor[divided_by]:.4f}" == value, whose
        assert value_of(call if here == "the same" else here) == value, whose
        if whose.startswith("torch,"):
            assert value_of(call) == value, whose
    assert {"RepDistiller", "mdistiller", "optax"} <= {row[0] for row in rows}


def test_the_docs_say_what_is_no_kl():
    for whose, _, _, formula, value in table(5, "| whose | call | what it is |"):
        assert value_of(formula) == value, whose


def test_the_docs_say_what_becomes_of_the_tail():
    torch.manual_seed(0)
    z, t = torch.randn(4, 9, device="cpu"), 2 * torch.randn(4, 9, device="cpu")
    top, log_q = t.log_softmax(-1).topk(3), z.log_softmax(-1)
    log_p, log_q_top = top.values, log_q.gather(1, top.indices)
    rest = (torch.log1p(-x.exp().sum(1, keepdim=True)) for x in (log_p, log_q_top))
    with_rest = [torch.cat([x, r], 1) for x, r in zip((log_p, log_q_top), rest)]

    def kl(log_p, log_q):
        return (log_p.exp() * (log_p - log_q)).sum(1).mean()

    got = [
        *(
            af.topk_kd_loss(z, [top.indices], [log_p], None, temperature=1.0, tail=tail)
            for tail in ("renormalize", "ignore", "uniform")
        ),
        kl(*with_rest),
        kl(log_p.log_softmax(1), log_q_top.log_softmax(1)),
        af.multi_teacher_kd_loss(z, [t], None, temperature=1.0),
    ]
    formulas = [kl(log_p.log_softmax(1), log_q_top), kl(log_p, log_q_top)]
    values = [row[-1] for row in table(3, "| the classes beyond the k |")]
    assert [f"{x:.4f}" for x in got] == values and [f"{x:.4f}" for x in formulas] == values[:2]
