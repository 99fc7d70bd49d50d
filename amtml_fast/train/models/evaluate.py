"""How many images a network gets right."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.images import ImageData, ImageSet, Loader
from .features import FeatureExtractor

EVAL_BATCH = 512


def accuracy(model: FeatureExtractor, split: ImageSet, data: ImageData) -> float:
    """Fraction of `split` that the model gets right, in eval mode; the mode is put back."""
    return count_correct(model, split, data).item() / max(1, len(split))


@torch.no_grad()
def count_correct(
    model: FeatureExtractor, split: ImageSet, data: ImageData, *, rank: int = 0, world_size: int = 1
) -> Tensor:
    """How many images of this process's share of `split` the model gets right, a 0-d tensor."""
    was_training = model.training
    model.eval()
    count = torch.zeros((), dtype=torch.int64, device=split.labels.device)
    for batch in Loader(split, data, EVAL_BATCH * world_size, rank=rank, world_size=world_size):
        if len(batch.labels):
            # Not model(...): what is compiled is compiled for the training's batches.
            count += (model.forward(batch.images)[0].argmax(1) == batch.labels).sum()
    model.train(was_training)
    return count
