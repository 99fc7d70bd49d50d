"""AEKD (Du et al. 2020): weights of one batch, under which the teachers' gradients disagree least.

w = argmin over the simplex of |sum_t w_t g_t|^2, g_t = q - p_t: the gradient of teacher t's KL to the student's logits,
over the whole batch (the min-norm point of their convex hull)
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor, nn

from .base import KD, Context, Method, Step, StepLoss, multi_teacher_kd


def min_norm_weights(gram: Tensor) -> Tensor:
    """The point of the simplex with the least w' G w, for a Gram matrix [T, T] of at most a dozen vectors -> [T].

    On the face of the simplex where it lies, G w is constant: every subset of the vectors is solved for, and the best
    of those with no negative weight is taken. Exact, and without a decision on the host, that is without a sync.
    """
    count = gram.shape[0]
    on = faces(count, gram.device)  # [2^T - 1, T]
    g = gram.double()
    g = g / g.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    # Equal teachers make G singular; this much of a diagonal shares their weight equally and changes no digit that counts.
    g = g + 1e-9 * torch.eye(count, dtype=g.dtype, device=g.device)
    system = on[:, :, None] * g * on[:, None, :] + torch.diag_embed(1 - on)
    w = torch.linalg.solve_ex(system, on[:, :, None]).result[..., 0]  # solve would wait to see if it went well
    w = w / w.sum(1, keepdim=True)
    value = torch.einsum("ft,ts,fs->f", w, g, w)
    best = value.masked_fill((w < 0).any(1), torch.inf).argmin()
    w = w.gather(0, best.expand(1, count))[0].float()
    return torch.where(gram.isfinite().all(), w, 1 / count)  # a run that diverges says so by its loss


@functools.cache
def faces(count: int, device: torch.device) -> Tensor:
    """Which vectors make each face of the simplex, [2^T - 1, T]."""
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=count))[1:], dtype=torch.float64, device=device)


class AgreementKD(nn.Module):
    def __init__(self, context: Context) -> None:
        super().__init__()
        self.temperature = context.loss.temperature
        self.kd = multi_teacher_kd(context.loss, mode="sum")

    def forward(self, step: Step) -> StepLoss:
        weights = min_norm_weights(self.gram(step))
        loss = self.kd(step.logits, step.teacher_logits, weights, step.labels)
        return StepLoss(loss, {"kd": loss.detach()}, weights.expand(len(step.labels), -1))

    def gram(self, step: Step) -> Tensor:
        """[T, T] inner products of the teachers' gradients."""
        q = (step.logits.detach().float() / self.temperature).softmax(-1)
        gradients = [q - (z.float() / self.temperature).softmax(-1) for z in step.teacher_logits]
        rows = torch.stack(gradients).flatten(1)  # [T, N * C]
        return rows @ rows.T


METHOD = Method(name="aekd", label="AEKD", build=AgreementKD, reads=KD)
