"""AEKD (Du et al. 2020): weights of one batch, under which the teachers' gradients disagree least.

w = argmin |sum_t w_t g_t|^2 over the simplex with no w_t above aekd_bound, g_t = mean over the batch of q - p_t: the
gradient of teacher t's KL to the student's logits (the min-norm point of a part of their convex hull)

With aekd_gradients: rows, g_t is the gradient of the whole batch, [N * C]: teachers agree where they do on each example.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from .base import KD, Context, KDLoss, Method, Objective, Step, StepLoss, average


def min_norm_weights(gram: Tensor, bound: float = 1.0) -> Tensor:
    """The w with the least w' G w, 0 <= w <= bound and sum 1, for a Gram matrix [T, T] of at most a dozen vectors -> [T].

    Each weight is 0, at the bound, or free; G w is constant over the free ones. Every such face is solved, and the best
    of those that keep the bounds is taken. Exact, and without a decision on the host, that is without a sync. A bound
    below 1 / T is 1 / T.
    """
    count = gram.shape[0]
    bound = max(bound, 1 / count)
    free, fixed = faces(count, bound, gram.device)  # [F, T] each
    g = gram.double()
    g = g / g.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    # Equal teachers make G singular; this much of a diagonal shares their weight equally and changes no digit that counts.
    g = g + 1e-9 * torch.eye(count, dtype=g.dtype, device=g.device)
    system = free[:, :, None] * g * free[:, None, :] + torch.diag_embed(1 - free)
    right = torch.stack([free, free * (fixed @ g)], -1)
    # solve would wait to see if it went well
    along, shift = torch.linalg.solve_ex(system, right).result.unbind(-1)
    level = 1 - fixed.sum(1, keepdim=True) + shift.sum(1, keepdim=True)
    w = level * along / along.sum(1, keepdim=True) - shift + fixed
    value = torch.einsum("ft,ts,fs->f", w, g, w)
    outside = (w < 0) | (w > bound + 1e-9)  # what rounding adds to a weight that is at the bound
    best = value.masked_fill(outside.any(1), torch.inf).argmin()
    w = w.gather(0, best.expand(1, count))[0].float()
    return torch.where(gram.isfinite().all(), w, 1 / count)  # a run that diverges says so by its loss


@functools.cache
def faces(count: int, bound: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where weights may lie: which are free, as 0 and 1, and those that are not; [F, T] each."""
    states = [
        face
        for face in itertools.product((0, 1, 2), repeat=count)  # 0, free, at the bound
        if 1 in face and face.count(2) * bound < 1
    ]
    table = torch.tensor(states, dtype=torch.int64, device=device)
    return (table == 1).double(), bound * (table == 2).double()


class AgreementKD(Objective):
    def __init__(self, context: Context) -> None:
        super().__init__()
        self.settings, self.processes = context.loss, context.processes
        self.kd = KDLoss(context.loss, mode="sum")

    def forward(self, step: Step) -> StepLoss:
        weights = min_norm_weights(self.gram(step), self.settings.aekd_bound)
        loss = self.kd(step, weights)
        return StepLoss(loss, {"kd": loss.detach()}, weights.expand(len(step.labels), -1))

    def gram(self, step: Step) -> Tensor:
        """[T, T] inner products of the teachers' gradients of the global batch, up to a factor."""
        tau = self.settings.temperature
        q = (step.logits.detach().float() / tau).softmax(-1)
        gradients = torch.stack([q - (z.float() / tau).softmax(-1) for z in step.teacher_logits])  # [T, N, C]
        if self.settings.aekd_gradients == "mean":
            rows = average(gradients.mean(1), self.processes)
            return rows @ rows.T
        rows = gradients.flatten(1)
        return average(rows @ rows.T, self.processes)


METHOD = Method(name="aekd", label="AEKD", build=AgreementKD, reads=(*KD, "aekd_gradients", "aekd_bound"))
