"""Image data held as uint8 tensors on one device, and batches of it: shuffled, augmented and normalized there.

`load` reads a data set and splits a validation set from its training set; `Loader` makes the batches. Nothing here is a
worker process or a queue: at these sizes one gather per batch is faster than any hand-over.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..names import import_factory, near_names
from .readers import DATASETS, DOWNLOADS, Arrays, stratified
from .samples import read_dataset

VIEWS = 1  # tells the draws of fixed views from those of an epoch with the same two numbers


@dataclass(frozen=True, eq=False)
class ImageSet:
    """One split, on one device: images [N, C, H, W] uint8, labels [N] int64; ~label where it is hidden (parts.py)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the images' shape, the images and the labels, in the split's order."""
        digest = hashlib.sha256(str([*self.images.shape]).encode())
        for part in (self.images, self.labels):
            digest.update(part.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> ImageSet:
        return ImageSet(self.images.to(device), self.labels.to(device))

    def at(self, places: Tensor) -> ImageSet:
        """The images at these places, or those where a mask is set."""
        return ImageSet(self.images[places], self.labels[places])


@dataclass(frozen=True, eq=False)
class ImageData:
    """The three splits of a data set; mean and std are per channel, for images in [0, 1]. `train` is what students train on;
    `teaching` what teachers do, where that is something else (parts.py)."""

    name: str
    train: ImageSet
    val: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    teaching: ImageSet | None = None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def fingerprint(self, *, of_teachers: bool) -> str:
        """SHA-256 of the classes' names and of all splits, as students or teachers have them."""
        train = self.teaching if of_teachers and self.teaching is not None else self.train
        parts = [*self.classes, *(split.digest for split in (train, self.val, self.test))]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @property
    def in_channels(self) -> int:
        return self.train.images.shape[1]

    def to(self, device: torch.device | str) -> ImageData:
        teaching = None if self.teaching is None else self.teaching.to(device)
        train, val, test = (split.to(device) for split in (self.train, self.val, self.test))
        return replace(self, train=train, val=val, test=test, teaching=teaching)


def load(
    name: str,
    root: str | Path | None = None,
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    download: bool = False,
) -> ImageData:
    """Read the data set `name` and split `val_fraction` of each class off its training set, drawn from `seed`.

    name: one of DATASETS (digits, fashion_mnist, cifar10, cifar100, tiny_imagenet, image_folder), or "package.module:factory", a
        function that returns (train Dataset, test Dataset), see `from_datasets`; it gets `root` as its one argument if
        that is given.
    root: the folder of the files; None is where the data set's package installs them, else ./data.
    download: fetch CIFAR through torchvision where its files are missing.
    The test set never depends on `seed` or `val_fraction`.
    Raises FileNotFoundError: what was looked for, where, and where to get it; ValueError: an unknown name, a broken
    file.
    """
    folder = None if root is None else Path(root).expanduser()
    if download and name not in DOWNLOADS:
        raise ValueError(f"data.name must be one of {', '.join(DOWNLOADS)} with data.download, got {name!r}")
    if name in DATASETS:
        read = DOWNLOADS[name] if download else DATASETS[name]
        return _split(name, read(folder), val_fraction, seed)
    if ":" not in name:
        raise ValueError(
            f"data.name: no data set {name!r}; near names: {near_names(name, DATASETS)}; "
            "or give 'package.module:factory'"
        )
    factory = import_factory(name, "data.name")
    made = factory() if folder is None else factory(folder)
    if not isinstance(made, tuple) or len(made) != 2:
        raise TypeError(f"data.name: {name} must return (train Dataset, test Dataset), got {type(made).__name__}")
    return from_datasets(*made, name=name, val_fraction=val_fraction, seed=seed)


def from_datasets(
    train: Dataset[Any],
    test: Dataset[Any],
    *,
    name: str = "custom",
    classes: Sequence[str] | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
) -> ImageData:
    """ImageData from two map-style Datasets of (image, label) pairs, read once, in full.

    An image is a uint8 tensor [C, H, W] or [H, W], a float tensor of that shape in [0, 1], a PIL image (gray ones have
    one channel, all others three), or a uint8 array [H, W, C] or [H, W]; a label is a whole number. No random transform
    belongs into the Datasets: augmentation is the Loader's.
    classes: the names; None takes `train.classes`, and the numbers if it has none: then each has to have a training image.
    """
    train_images, train_labels = read_dataset(train, "train")
    test_images, test_labels = read_dataset(test, "test")
    if train_images.shape[1:] != test_images.shape[1:]:
        wanted, got = list(train_images.shape[1:]), list(test_images.shape[1:])
        raise ValueError(f"test: images must be {wanted} like those of train, got {got}")
    count = int(max(train_labels.max(), test_labels.max())) + 1
    given = classes if classes is not None else getattr(train, "classes", None)
    if given is None:  # labels from 1 on, or numbers of something else, would make classes that nothing is in
        seen = np.unique(train_labels)
        if len(seen) != count:
            lacking = next((i for i, label in enumerate(seen) if i != label), len(seen))
            raise ValueError(
                f"train: each class up to the largest label of train and test, {count - 1}, must have an image, got none of class "
                f"{lacking}; if that is intended, name all classes in train.classes"
            )
        given = range(count)
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"classes: must be the classes' names in the order of the labels, got {type(given).__name__}")
    names = tuple(map(str, given))
    if len(names) < count:
        raise ValueError(
            f"classes: must name at least {count} classes (the largest label is {count - 1}), got {len(names)}"
        )
    arrays = Arrays(train_images, train_labels, test_images, test_labels, names)
    return _split(name, arrays, val_fraction, seed)


def _split(name: str, arrays: Arrays, val_fraction: float, seed: int) -> ImageData:
    if not 0 < val_fraction < 1:
        raise ValueError(f"data.val_fraction must be between 0 and 1, got {val_fraction}")
    if len(arrays.train_labels) == 0 or len(arrays.test_labels) == 0:
        counts = f"{len(arrays.train_labels)} and {len(arrays.test_labels)}"
        raise ValueError(f"data: {name} must have images for training and for testing, got {counts}")
    val, train = stratified(arrays.train_labels, val_fraction, seed)
    if len(val) == 0:
        raise ValueError(f"data: {name} must have a class with two training images, to split off validation, got none")
    train_set = _image_set(arrays.train_images[train], arrays.train_labels[train])
    mean, std = (arrays.mean, arrays.std) if arrays.mean and arrays.std else channel_statistics(train_set.images)
    return ImageData(
        name=name,
        train=train_set,
        val=_image_set(arrays.train_images[val], arrays.train_labels[val]),
        test=_image_set(arrays.test_images, arrays.test_labels),
        classes=arrays.classes,
        mean=mean,
        std=std,
    )


def _image_set(images: np.ndarray, labels: np.ndarray) -> ImageSet:
    return ImageSet(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(np.ascontiguousarray(labels)))


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images [N, C, H, W], in [0, 1] units, exact by counting."""
    levels = torch.arange(256, dtype=torch.float64, device="cpu") / 255
    means, stds = [], []
    for c in range(images.shape[1]):
        weights = torch.bincount(images[:, c].reshape(-1), minlength=256).double()
        weights /= weights.sum()
        mean = (weights * levels).sum()
        std = (weights * (levels - mean).square()).sum().sqrt()
        means.append(mean.item())
        stds.append(std.item() or 1.0)  # a constant channel is normalized to 0, not to NaN
    return tuple(means), tuple(stds)


class Draws(NamedTuple):
    """What an epoch draws for one batch of n images: places [n] int64, where they are in the split; flips [n] bool and
    offsets [n, 2] int64 for `flip_and_crop`; on_host [n]: the places on the CPU, for what is looked up there."""

    places: Tensor
    flips: Tensor
    offsets: Tensor
    on_host: Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """index [n] int64: positions in the split; labels [n] int64; images [n, C, H, W] float32, normalized and, where asked
    for, augmented; view: which fixed version of the images it is, 0 as they are, from 1 augmented, None drawn anew. What
    was computed before for (view, index) holds for this batch too."""

    index: Tensor
    images: Tensor
    labels: Tensor
    view: int | None = None


class Loader:
    """Iterates one epoch of `split` in Batches, on the split's device.

    batch_size: the global batch. With world_size > 1 every process makes the same order and the same augmentation draws
        and takes its own slice of each batch, so that ranks 0, 1, ... concatenated are the batch of a single process.
        The slices are equal, but for those of a last, smaller batch (drop_last=False), where they may differ by one or
        be empty.
    augment: horizontal flip and a random crop of the image zero-padded by size // 8 (4 at 32x32), before normalizing.
    views: None draws them anew for each epoch. K gives every image K fixed versions, of which epoch e shows number
        1 + (e - 1) % K: a pure function of (augment_seed, number, index in the split), whatever the order of the epoch.
    Order and draws are a pure function of (seed, epoch, batch number): call `set_epoch`, and there is nothing to
    checkpoint.
    Raises ValueError: batch_size not divisible by world_size, an empty split, or drop_last that would drop every batch.
    """

    def __init__(
        self,
        split: ImageSet,
        data: ImageData,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: bool = False,
        views: int | None = None,
        augment_seed: int = 0,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1 or world_size < 1 or batch_size % world_size:
            raise ValueError(
                f"Loader: the global batch_size must be a multiple of world_size, "
                f"got {batch_size} over {world_size} processes"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"Loader: rank must be in [0, {world_size}), got {rank}")
        if len(split) == 0 or (drop_last and len(split) < batch_size):
            raise ValueError(
                f"Loader: {len(split)} images make no batch of {batch_size}" + (" with drop_last" if drop_last else "")
            )
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.shuffle, self.augment, self.drop_last = shuffle, augment, drop_last
        self.views, self.augment_seed = views, augment_seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        device = split.images.device
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device="cpu").view(-1, 1, 1) for values in (data.mean, data.std)
        )
        self._scale = (1 / (255 * std)).to(device)
        self._shift = (-mean / std).to(device)

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order and draws the next iteration makes."""
        self.epoch = epoch

    def __len__(self) -> int:
        n = len(self.split)
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    @property
    def view(self) -> int | None:
        """Batch.view of this epoch."""
        if not self.augment:
            return 0
        return None if self.views is None else 1 + (self.epoch - 1) % self.views

    def __iter__(self) -> Iterator[Batch]:
        return (self.batch(draws.places, draws.flips, draws.offsets) for draws in self.draws())

    def draws(self, first: int = 0) -> Iterator[Draws]:
        """What the batches from number `first` on are made of: views of tensors that were drawn for the whole epoch."""
        drawn = self._draws()
        for number in range(first, len(self)):
            rows = self._rows(number)
            yield Draws(*(each[rows] for each in drawn))

    def batch(self, index: Tensor, flips: Tensor, offsets: Tensor) -> Batch:
        """Augmented, normalized: operators on the device alone, the same for every batch."""
        images = self.split.images[index]
        if self.augment:
            images = flip_and_crop(images, flips, offsets)
        images = images.to(torch.float32).mul_(self._scale).add_(self._shift)
        return Batch(index, images, self.split.labels[index], self.view)

    def _rows(self, number: int) -> slice:
        """The part of the epoch's order that is this rank's share of batch `number`."""
        start = number * self.batch_size
        size = min(self.batch_size, len(self.split) - start)
        return slice(start + size * self.rank // self.world_size, start + size * (self.rank + 1) // self.world_size)

    def _draws(self) -> Draws:
        """The whole epoch's, in its order; drawn on the CPU: the same on every device."""
        n, (height, width) = len(self.split), self.split.images.shape[2:]
        generator = random_stream(self.seed, self.epoch)
        if self.shuffle:
            order = torch.randperm(n, generator=generator, dtype=torch.int64, device="cpu")
        else:
            order = torch.arange(n, dtype=torch.int64, device="cpu")
        if self.augment and self.view is not None:
            generator = random_stream(self.augment_seed, self.view, VIEWS)
        flips = torch.rand(n, generator=generator, dtype=torch.float32, device="cpu") < 0.5
        rows, columns = (
            torch.randint(2 * (side // 8) + 1, (n,), generator=generator, dtype=torch.int64, device="cpu")
            for side in (height, width)
        )
        offsets = torch.stack([rows, columns], dim=1)
        if self.views is not None:  # drawn by image, not by place in the epoch
            flips, offsets = flips[order], offsets[order]
        device = self.split.images.device
        return Draws(order.to(device), flips.to(device), offsets.to(device), order)


def drawn_seed(*numbers: int) -> int:
    """One seed from several numbers, as good as unrelated to that of others. Zeros at the end do not count: (s, e) is (s, e, 0, 0)."""
    entropy = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return int(entropy) >> 1  # 63 bits: a seed is a signed integer


def random_stream(*seeds: int) -> torch.Generator:
    return torch.Generator().manual_seed(drawn_seed(*seeds))


def flip_and_crop(images: Tensor, flips: Tensor, offsets: Tensor) -> Tensor:
    """Mirror the images where `flips` [n] is set, pad them with zeros by size // 8 on each side, and cut the window of
    the old size whose top left corner is `offsets` [n, 2] (row, column) in the padded image: [n, C, H, W] -> the
    same."""
    height, width = images.shape[2:]
    pad_y, pad_x = height // 8, width // 8
    mirrored = torch.where(flips.view(-1, 1, 1, 1), images.flip(-1), images)
    padded = F.pad(mirrored, (pad_x, pad_x, pad_y, pad_y))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [n, C, 2 pad_y + 1, 2 pad_x + 1, H, W], a view
    each = torch.arange(len(images), dtype=torch.int64, device=images.device)
    return windows[each, :, offsets[:, 0], offsets[:, 1]]
