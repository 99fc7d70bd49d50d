"""Samples of other people's data sets, as uint8 images and whole labels: what is not understood raises an error that names it.

Images decoded by Pillow are read as torchvision's ImageFolder reads them: as they are stored (an EXIF orientation turns
nothing), the first frame of an animation, without their transparency. Of 16 bits a channel the upper 8 are kept.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

MOST_CHANNELS = 4  # an axis is taken for that of the channels by mistake where another one is as short as this


def read_dataset(dataset: Any, what: str) -> tuple[np.ndarray, np.ndarray]:
    """A Dataset of (image, label) pairs as images [N, C, H, W] uint8 and labels [N] int64; `images.from_datasets` says what a pair
    may be. `what` opens the error message ("train")."""
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"{what} must be a Dataset with a length and an index (no stream), got {type(dataset).__name__}"
        )
    images: list[np.ndarray] = []
    labels: list[int] = []
    for i in range(len(dataset)):
        sample = dataset[i]
        if not isinstance(sample, (tuple, list)) or len(sample) != 2:
            raise TypeError(f"{what}[{i}] must be a pair (image, label), got {_kind(sample)}")
        image = _to_uint8(sample[0], f"{what}[{i}]")
        if images and image.shape != images[0].shape:
            wanted, got = list(images[0].shape), list(image.shape)
            raise ValueError(f"{what}[{i}]: images must be of one size, {wanted} like {what}[0], got {got}")
        images.append(image)
        labels.append(_to_label(sample[1], f"{what}[{i}]"))
    if not images:
        raise ValueError(f"{what} must have at least one sample, got none")
    return np.stack(images), np.array(labels, dtype=np.int64)


def _kind(value: Any) -> str:
    size = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
    return f"{type(value).__name__}{size}"


def _to_label(label: Any, what: str) -> int:
    """A number, or an array or a tensor of one: of whatever type, but a whole one, and not below 0."""
    try:
        number = label.item() if hasattr(label, "item") else label
    except (ValueError, RuntimeError):
        shape = list(label.shape)
        raise TypeError(f"{what}: the label must be one whole number, got {_kind(label)} of shape {shape}") from None
    if not isinstance(number, (int, float)):
        raise TypeError(f"{what}: the label must be a whole number, got {_kind(number)}")
    if not (math.isfinite(number) and number == int(number)):
        raise ValueError(f"{what}: the label must be a whole number, got {number}")
    if number < 0:
        raise ValueError(f"{what}: the label must be 0 or more, got {int(number)}")
    return int(number)


def _to_uint8(image: Any, what: str) -> np.ndarray:
    channels_first = hasattr(image, "dim")  # a tensor; arrays and PIL images have their channels last
    if channels_first:
        image = image.detach().cpu()
        array = (image.float() if image.is_floating_point() else image).numpy()  # numpy has no bfloat16
    elif hasattr(image, "getbands"):
        try:
            array = np.asarray(eight_bits(image))
        except MemoryError:
            raise
        except Exception as error:  # of PIL, which reads the file here
            raise ValueError(f"{what}: not a readable image ({error})") from error
    else:
        array = np.asarray(image)
    if array.ndim not in (2, 3):
        raise ValueError(f"{what}: an image must have 2 or 3 dimensions, got {list(array.shape)}")
    if array.ndim == 2:
        array = array[None]
    else:
        channels, other = (array.shape[0], array.shape[2])[:: 1 if channels_first else -1]
        if min(channels, array.shape[1]) > MOST_CHANNELS >= other:
            kind, place = ("a tensor", "first") if channels_first else ("an array", "last")
            raise ValueError(f"{what}: {kind} must have its channels {place}, got {list(array.shape)}")
        array = array if channels_first else array.transpose(2, 0, 1)
    if array.dtype == np.uint8:
        return array
    if not (channels_first and np.issubdtype(array.dtype, np.floating)):
        raise TypeError(f"{what}: an image must be uint8, or a float tensor in [0, 1], got {array.dtype}")
    if not (array.min() >= 0 and array.max() <= 1):
        got = f"[{array.min():.3g}, {array.max():.3g}]"
        raise ValueError(f"{what}: a float image must be in [0, 1] (leave the normalizing to the Loader), got {got}")
    return np.rint(array * 255).astype(np.uint8)


def eight_bits(image: Any) -> Any:
    """A PIL image of any mode in 8 bits a channel: gray (L), or RGB with palette looked up. Its transparency is left out.

    Of 16 bits the upper 8 count, as Pillow has them for colors, so that 8 bits stored in 16 come back, whether they were
    shifted or repeated. ValueError for 32 bits, which have no range of their own.
    """
    from PIL import Image

    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if sixteen:  # Pillow's own conversion clips at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"must have 8 or 16 bits a channel, got 32 (mode {image.mode}), whose black and white are not known"
        )
    if image.mode == "P":
        image = image.convert("RGBA")  # what a palette has transparent, in bytes, is only understood here
    return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
