"""The formulas that amtml_fast.dropin replaces, each written out once, and every drop-in beside its own: ``KINDS``."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from backends import DEVICE

from amtml_fast import dropin

# --- the formulas, as the libraries have them


def gram_distances(e, squared):
    norms = e.pow(2).sum(1)
    d = (norms[:, None] + norms[None, :] - 2 * e @ e.t()).clamp(min=1e-12)
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


def decoupled(student, teacher, target, alpha, beta, T):
    """The KL of (target, the others together) and that of the others alone, summed over rows."""
    log_q, log_p = F.log_softmax(student / T, 1), F.log_softmax(teacher / T, 1)
    one = F.one_hot(target, student.shape[1]).bool()

    def pair(log):
        return torch.stack([log[one], log[~one].view(len(log), -1).logsumexp(1)], 1)

    def others(logits):
        return F.log_softmax(logits[~one].view(len(logits), -1) / T, 1)

    parts = (pair(log_q), pair(log_p)), (others(student), others(teacher))
    tckd, nckd = (F.kl_div(q, p, reduction="sum", log_target=True) for q, p in parts)
    return T**2 * (alpha * tckd + beta * nckd)


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
        of = adapter(kind, theta, W).eval()  # without the regularizer, beside which a wrong gradient would not be seen
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


TARGET = torch.arange(N, device="cpu") % C


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
    "KLDivergence": (dropin.KLDivergence(4, loss_weight=3), lambda s, t: 3 * over_examples(s, t, 4), (S, T)),
    "KLDivergence-pixels": (dropin.KLDivergence(4), lambda s, t: over_examples(s, t, 4), (PIXELS_S, PIXELS_T)),
    "KLDivergence-mean": (
        dropin.KLDivergence(2, "mean"),
        lambda s, t: kl_terms(s, t, 2).sum() / max(s.numel(), 1),
        (TOKENS_S, TOKENS_T),
    ),
    "dkd_loss": (
        lambda s, t, y: dropin.dkd_loss(s, t, y, 1.0, 8.0, 4.0),
        lambda s, t, y: decoupled(s, t, y, 1, 8, 4) / len(s),
        (S, T, TARGET),
    ),
    "dkd_loss-standardized": (
        lambda s, t, y: dropin.dkd_loss(s, t, y, 2, 0.5, 2, True),
        lambda s, t, y: decoupled(standardized(s), standardized(t), y, 2, 0.5, 2) / len(s),
        (S, T, TARGET),
    ),
    "DKDLoss": (
        dropin.DKDLoss(2.0, 0.5, 3.0, "sum", 0.25),
        lambda s, t, y: 0.25 * decoupled(s, t, y, 0.5, 3, 2),
        (S, T, TARGET),
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
