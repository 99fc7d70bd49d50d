"""What a network says about a few images: that it takes them, and what its maps are."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config.schema import ConfigError
from ..data.images import ImageData, Loader
from .features import FeatureExtractor

ANY, MAP = "[N, c] or [N, c, h, w]", "[N, c, h, w]"
DIMS = {ANY: (2, 4), MAP: (4,)}


def check_map(key: str, path: str, caught: Tensor, wanted: str) -> None:
    if caught.ndim not in DIMS[wanted]:
        raise ConfigError(
            f"config: {key} must name a module whose output is {wanted}, got {path!r}, whose output is {[*caught.shape]}"
        )


def maps(
    model: FeatureExtractor, what: str, data: ImageData, modes: tuple[bool, ...], count: int = 2
) -> dict[str, Tensor]:
    """What the model catches of `count` images, run in the modes (training or not) that it will run in. ValueError where it does
    not take them, or does not answer with logits."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    images = next(iter(Loader(data.val, data, 2))).images.to(device)
    images = images.repeat(count, 1, 1, 1)[:count]  # two: a BatchNorm may not train on one
    if True in modes and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{what}: the network must have parameters that train, got none")
    before, wanted = images.clone(), [len(images), data.num_classes]
    with torch.random.fork_rng(devices=[]):
        for training in modes:
            try:
                logits, caught = model.probe(images, training=training)
            except Exception as error:
                reason = (str(error).splitlines() or [""])[0]
                raise ValueError(
                    f"{what}: the network must take images {[*images.shape]} of {data.name}, "
                    f"got {type(error).__name__}: {reason}"
                ) from error
            got = [*logits.shape] if isinstance(logits, Tensor) else type(logits).__name__
            if got != wanted:
                raise ValueError(
                    f"{what}: the network must return logits {wanted}, for {len(images)} images and {wanted[1]} classes of "
                    f"{data.name}, got {got}"
                )
            if training and not logits.requires_grad:
                raise ValueError(f"{what}: the network must return logits with a gradient, got detached ones")
            if not torch.equal(images, before):  # the other networks of a step are shown the same ones
                raise ValueError(
                    f"{what}: the network must leave its images as they are, got one that writes into them"
                )
    return caught
