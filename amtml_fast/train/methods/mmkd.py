"""MMKD (Zhang, Chen, Wang 2023): a network weighs the teachers, and learns which weights would make the student better.

w = softmax(W_2 relu(W_1 [z_1, ..., z_T, z] + b_1) + b_2), z the student's logits; Eq 8 in mode sum does not train it

Beside it stand images with a label, those the student gets wrong above all. For some of them a copy of the student takes steps
on sum_t w_t KL_t and one on the cross-entropy, and how its cross-entropy then depends on w is what trains the network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ...gate import log_probabilities
from ..data.parts import IGNORED
from .base import KD, Context, KDLoss, Method, Objective, Step, StepLoss, divergences

# As in the authors' code: how many images are kept, the copy's steps on the KL, and its learning rate.
KEPT, LOOKAHEAD, RATE = 256, 2, 0.05
SAMPLE = 16  # of the kept images, at each step; theirs takes 64 at every fifth step, about as many in all
# On the network's loss, whose gradient has a scale of its own: a step changes parameters about as much as theirs, of Adam at 0.001.
# With 0.02 all examples soon get the same teacher.
SLOWER = 0.001

Parameters = dict[str, Tensor]


class MetaWeightedKD(Objective):
    images: Tensor
    labels: Tensor
    said: Tensor
    count: Tensor

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.temperature = context.loss.temperature
        teachers, classes = len(context.teacher_names), context.classes
        wide = classes * (teachers + 1)
        self.network = nn.Sequential(nn.Linear(wide, wide // 2), nn.ReLU(), nn.Linear(wide // 2, teachers))
        self.kd = KDLoss(context.loss, mode="sum")
        # One place more, for what is not kept: every step writes as many rows as it has.
        sizes = {"images": (KEPT + 1, *context.image_shape), "said": (KEPT + 1, teachers, classes)}
        for name, size in sizes.items():
            self.register_buffer(name, torch.zeros(size, dtype=torch.float32, device="cpu"))
        self.register_buffer("labels", torch.zeros(KEPT + 1, dtype=torch.int64, device="cpu"))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device="cpu"))

    def forward(self, step: Step) -> StepLoss:
        if step.student is None:
            raise ValueError("mmkd: step.student must be the network that made the logits, got none")
        with torch.no_grad():
            weights = self.weights(step.teacher_logits, step.logits)
            weights = weights.nan_to_num(1 / weights.shape[1])  # a student that diverges says so by its loss
            self.keep(step)
        kd, meta = self.kd(step, weights), self.meta_loss(step.student)
        return StepLoss(kd + meta, {"kd": kd.detach(), "meta": meta.detach()}, weights)

    def weights(self, teacher_logits: list[Tensor], logits: Tensor) -> Tensor:
        """[N, T]."""
        seen = log_probabilities([*teacher_logits, logits.float()]).flatten(1)  # of a student in float64, too
        return cast(Tensor, self.network(seen).float().softmax(1))

    def meta_loss(self, student: nn.Module) -> Tensor:
        """-mean_i sum_t w_it worth_it over some of the kept images; 0 while there is none."""
        draw = torch.rand(SAMPLE, dtype=torch.float32, device=self.images.device)
        index = (draw * self.count).long()
        labels, said = self.labels[index], list(self.said[index].unbind(1))
        start, logits = copy_of(student, self.images[index])
        weights = self.weights(said, logits(start).detach())
        value = worth(start, logits, labels, said, weights.detach(), self.temperature)
        return torch.where(self.count > 0, -SLOWER * (weights * value).sum(1).mean(), 0)

    def keep(self, step: Step) -> None:
        """The first images that have a label, and later those the student gets wrong, each in the place of a random one.

        Which they are is decided on the device, without a sync."""
        known, full = step.labels != IGNORED, self.count >= KEPT
        chosen = known & ((step.logits.argmax(1) != step.labels) | ~full)
        rank = chosen.cumsum(0) - 1
        random = torch.rand(KEPT, dtype=torch.float32, device=rank.device).argsort()
        place = torch.where(full, random[rank.clamp(0, KEPT - 1)], self.count + rank)
        chosen &= (rank < KEPT) & (place < KEPT)
        place = place.where(chosen, KEPT)
        said = torch.stack([z.float() for z in step.teacher_logits], 1)
        for kept, rows in ((self.images, step.images), (self.said, said), (self.labels, step.labels)):
            mask = chosen.view(-1, *[1] * (rows.dim() - 1))
            kept.index_copy_(0, place, rows.where(mask, 0).to(kept.dtype))
        self.count += torch.where(full, 0, chosen.sum())


def copy_of(student: nn.Module, images: Tensor) -> tuple[Parameters, Callable[[Parameters], Tensor]]:
    """The student's parameters, apart from it, and its logits of the images as a function of parameters."""
    start = {name: p.detach().requires_grad_() for name, p in student.named_parameters()}
    buffers = {name: x.clone() for name, x in student.named_buffers()}
    return start, lambda at: functional_call(student, (at, buffers), (images,))


def worth(
    start: Parameters,
    logits: Callable[[Parameters], Tensor],
    labels: Tensor,
    said: list[Tensor],
    weights: Tensor,
    temperature: float,
) -> Tensor:
    """[n, T]: by how much the cross-entropy falls, after the copy's steps, with each weight [n, T]; relative to the other
    teachers of the image, and with a mean square of 1."""
    leaf, at, out = weights.clone().requires_grad_(), start, logits(start)
    for _ in range(LOOKAHEAD):
        at = stepped(at, (leaf * divergences(out, said, temperature)).sum(1).mean())
        out = logits(at)
    at = stepped(at, F.cross_entropy(out, labels))
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits(at), labels), leaf)
    value = gradient.mean(1, keepdim=True) - gradient
    return value / value.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)


def stepped(at: Parameters, loss: Tensor) -> Parameters:
    """The parameters after a step of gradient descent, as a function of all that the loss depends on."""
    gradients = torch.autograd.grad(
        loss, list(at.values()), create_graph=True, allow_unused=True, materialize_grads=True
    )
    return {name: x - RATE * gradient for (name, x), gradient in zip(at.items(), gradients)}


METHOD = Method(name="mmkd", label="MMKD", build=MetaWeightedKD, reads=KD, labels=lambda loss: True)
