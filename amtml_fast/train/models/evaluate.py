"""How many images a network gets right."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.images import ImageData, ImageSet, Loader
from ..files import RunError
from .features import FeatureExtractor

EVAL_BATCH = 512


def accuracy(model: FeatureExtractor, split: ImageSet, data: ImageData, name: str) -> float:
    """Fraction of `split` that the model gets right, in eval mode; the mode is put back. RunError, which calls it by its name,
    where it gives no probabilities: NaN is no answer, and not one that is wrong."""
    right, without = count_correct(model, split, data).tolist()
    if without:
        raise RunError(
            f"{name}: logits must be finite, got NaN or infinity for {without} of {len(split)} images of {data.name}"
        )
    return int(right) / max(1, len(split))


@torch.no_grad()
def count_correct(
    model: FeatureExtractor, split: ImageSet, data: ImageData, *, rank: int = 0, world_size: int = 1
) -> Tensor:
    """Of this process's share of `split` how many images the model gets right, and on how many it is `lost`: [2]."""
    was_training = model.training
    model.eval()
    count = torch.zeros(2, dtype=torch.int64, device=split.labels.device)
    for batch in Loader(split, data, EVAL_BATCH * world_size, rank=rank, world_size=world_size):
        if len(batch.labels):
            # Not model(...): what is compiled is compiled for the training's batches.
            logits = model.forward(batch.images)[0]
            count += torch.stack([logits.argmax(1) == batch.labels, lost(logits)]).sum(1)
    model.train(was_training)
    return count


def lost(logits: Tensor) -> Tensor:
    """[N]: where logits [N, C] have no softmax. With -inf for a class they have one."""
    return ~logits.logsumexp(1).isfinite()
