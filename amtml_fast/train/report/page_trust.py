"""The page's section on trust: whether the teachers that get the weight are right, and whether the mixture is as sure as it may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..methods.base import mixture
from . import svg

BINS = 10  # of the mixture's confidence
FEWEST = 20  # images in a bin that is shown


def section(runs: dict[str, list[Tensor]], logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """runs: a method's weights [N, T], one tensor a run. logits [N, T, C] of the teachers, labels [N]."""
    probs, labels = logits.softmax(-1), labels.cpu()
    right = probs.argmax(-1) == labels[:, None]  # [N, T]
    disputed = right.any(1) & ~right.all(1)  # where weights can do good or harm
    equal = mixture(probs, torch.full(right.shape, 1 / right.shape[1], dtype=torch.float32, device="cpu"))
    methods = [one(name, weights, probs, equal, right, disputed, labels) for name, weights in runs.items()]
    return {
        "disputed": int(disputed.sum()),
        "total": len(labels),
        "fair": f"{right[disputed].float().mean():.2f}" if disputed.any() else None,
        "equal": f"{100 * accuracy(equal, labels):.1f}",
        "equal_error": f"{100 * calibration_error(equal, labels):.1f}",
        "methods": methods,
    }


def one(
    name: str, weights: Sequence[Tensor], probs: Tensor, equal: Tensor, right: Tensor, disputed: Tensor, labels: Tensor
) -> dict[str, Any]:
    """A method's numbers, means over its runs, and its picture."""
    mixed = [mixture(probs, w) for w in weights]
    on_right = [(w * right)[disputed].sum(1).mean().item() for w in weights]
    curves = [svg.Line("equal weights", reliability(equal, labels)[None], "c0")]
    curves.append(svg.Line("weighted", np.stack([reliability(each, labels) for each in mixed]), "c1"))
    hit, error = np.mean([accuracy(m, labels) for m in mixed]), np.mean([calibration_error(m, labels) for m in mixed])
    words = f"{name}: how often the teachers' mixture is right, by how sure it is, with equal weights and with its own"
    return {
        "name": name,
        "runs": len(weights),
        "on_right": f"{np.mean(on_right):.2f}" if disputed.any() else None,
        "accuracy": f"{100 * hit:.1f}",
        "error": f"{100 * error:.1f}",
        "chart": svg.reliability(curves, words),
    }


def accuracy(mixed: Tensor, labels: Tensor) -> float:
    return (mixed.argmax(1) == labels).float().mean().item()


def bins(mixed: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each bin of the largest probability: how many images, their mean probability, and how many of them are right."""
    sure, said = mixed.double().max(1)
    place = (sure * BINS).long().clamp_max(BINS - 1)
    count = torch.bincount(place, minlength=BINS)
    mean = torch.bincount(place, weights=sure, minlength=BINS) / count
    hits = torch.bincount(place, weights=(said == labels).double(), minlength=BINS) / count
    return count, mean, hits


def reliability(mixed: Tensor, labels: Tensor) -> svg.Array:
    """[BINS] the share that is right, NaN where there are few images."""
    count, _, hits = bins(mixed, labels)
    return torch.where(count >= FEWEST, hits, torch.nan).numpy()


def calibration_error(mixed: Tensor, labels: Tensor) -> float:
    """The mean distance between how sure the mixture is and how often it is right, over the images of each bin."""
    count, mean, hits = bins(mixed, labels)
    return ((count * (mean - hits).abs().nan_to_num()).sum() / len(labels)).item()
