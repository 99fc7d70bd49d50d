"""What trained networks say about the images of a split: soft targets of the teachers, weights and logits of a student,
and which images tell something. Everything comes back on the CPU, in the order of the split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.images import ImageData, ImageSet, Loader
from ..methods.base import mixture
from ..methods.registry import METHODS
from ..models.evaluate import EVAL_BATCH
from ..models.networks import load_weights
from ..run.distiller import make_distiller, teachers_of
from ..run.folder import Run
from ..run.job import FEATURES, Job
from ..teachers.frozen import Teachers

GALLERY = 6  # images in the picture of the paper's Figure 4
LITTLE, MUCH = 0.5, 1.5  # times the equal weight: what counts as little and as much


def learns_weights(run: Run) -> bool:
    """Whether the finished run has learned weights for its teachers: by an adapter, or fitted before the training."""
    recipe = run.read_record()["recipe"]
    method = METHODS.get(recipe["method"])
    return recipe["loss"].get("adapter") == "learned" or (method is not None and method.fits)


@torch.no_grad()
def teacher_logits(teachers: Teachers, split: ImageSet, data: ImageData) -> Tensor:
    """[N, T, C]"""
    batches = Loader(split, data, EVAL_BATCH)
    return torch.cat([torch.stack(teachers.live(batch.images).logits, 1).cpu() for batch in batches])


def soft_targets(logits: Tensor, temperature: float) -> Tensor:
    return (logits / temperature).softmax(-1)


@torch.no_grad()
def weights_and_logits(job: Job, teachers: Teachers, split: ImageSet, data: ImageData) -> tuple[Tensor, Tensor]:
    """The weights [N, T] without a look at labels, and the student's logits [N, C], of a finished run that has learned some."""
    own = teachers_of(job, teachers)
    distiller = make_distiller(job, data, own)
    load_weights(distiller.student.model, job.folder / job.file)
    load_weights(distiller.objective, job.folder / "objective.safetensors")
    distiller.to(split.images.device).eval()
    weights, logits = [], []
    for batch in Loader(split, data, EVAL_BATCH):
        out, maps = distiller.student(batch.images)
        said = own.rounded(own.live(batch.images)).logits if own is not None and job.method.fits else []
        weights.append(distiller.objective.weigh(maps.get(FEATURES), said).float().cpu())
        logits.append(out.float().cpu())
    return torch.cat(weights), torch.cat(logits)


def most_disputed(probs: Tensor, labels: Tensor) -> list[int]:
    """The image of each class on which the teachers disagree most, the most disputed class first.

    probs [N, T, C]. Disagreement: entropy of the equal mixture less the teachers' mean entropy. The choice does not look
    at the weights, so the pictures flatter no adapter.
    """
    disagreement = torch.special.entr(probs.mean(1)).sum(-1) - torch.special.entr(probs).sum(-1).mean(-1)
    chosen: dict[int, int] = {}
    for i in disagreement.argsort(descending=True, stable=True).tolist():
        chosen.setdefault(int(labels[i]), i)
    return list(chosen.values())


@dataclass(frozen=True)
class Choice:
    """An image of a split and why it was chosen; `count` images of the split fit the reason (None: it is a ranking)."""

    index: int | None  # None: none fits
    why: str
    count: int | None


def choose_images(probs: Tensor, weights: Tensor, student: Tensor, labels: Tensor) -> list[Choice]:
    """One image for each thing that weights can do well or badly, and before them the most disputed one.

    probs [N, T, C] and student [N, C] tempered, weights [N, T]. Of the images that fit a reason the clearest is taken:
    the wrong network that is surest of itself, or the largest change of the true class's probability; no image twice.
    """
    labels = labels.cpu()
    equal, mixed, fair = probs.mean(1), mixture(probs, weights), 1 / probs.shape[1]
    sure, said = probs.max(-1)
    wrong = said != labels[:, None]
    misled = wrong & (~wrong).any(1, keepdim=True)  # wrong, while another teacher is right
    gain = (mixed - equal).gather(1, labels[:, None])[:, 0]
    right, was_right = mixed.argmax(1) == labels, equal.argmax(1) == labels
    lost = right & (student.argmax(1) != labels)

    def surest(fits: Tensor) -> Tensor:
        return torch.where(fits, sure, -1).amax(1)

    found = [Choice(i, "The teachers disagree most", None) for i in most_disputed(probs, labels)[:1]]
    reasons = {
        "A teacher is wrong and gets little weight": surest(misled & (weights < LITTLE * fair)),
        "A teacher is wrong and gets much weight": surest(misled & (weights > MUCH * fair)),
        "The weights put the mixture right": torch.where(right & ~was_right, gain, -1),
        "The weights put the mixture wrong": torch.where(was_right & ~right, -gain, -1),
        "The mixture is right, the student is wrong": torch.where(lost, student.amax(1), -1),
    }
    for why, score in reasons.items():
        best = score.argsort(descending=True, stable=True).tolist()
        taken = {choice.index for choice in found}
        index = next((i for i in best if score[i] > 0 and i not in taken), None)
        found.append(Choice(index, why, int((score > 0).sum())))
    return found


def by_class(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The mean of values [N, T] over each class's images, [classes, T]; NaN for a class without images."""
    sums = torch.zeros(classes, values.shape[1], dtype=torch.float32, device="cpu").index_add_(
        0, labels.cpu(), values.float()
    )
    return sums / torch.bincount(labels.cpu(), minlength=classes)[:, None]
