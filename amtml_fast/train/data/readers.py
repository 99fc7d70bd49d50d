"""Image data sets, from the files in which they are published to uint8 arrays.

Every reader takes the folder (None: its default place) and returns Arrays. A missing file is a FileNotFoundError that
says what was looked for, where, and where to get it; a file that is cut short or is something else is a ValueError that
names it. No reader here unpickles anything; torchvision does, where it is asked to fetch CIFAR, after a check of MD5 sums.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .samples import eight_bits

DEFAULT_FOLDER = Path("data")  # for the sets that no package installs; below the working directory
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")


class Arrays(NamedTuple):
    """A data set as it was read: images [N, C, H, W] uint8, labels [N] int64, mean and std if fixed."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def stratified(labels: np.ndarray, fraction: float, seed: int | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Positions [n], [N - n] of a seeded split that takes `fraction` of every class, and the rest, both ascending.

    Each class gives round(fraction * its size), but at least one of two images or more, and never all.
    """
    rng = np.random.RandomState(_words(seed))  # its stream is frozen for good, that of default_rng is not
    taken = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        taken.append(members[:count])
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[np.concatenate(taken)] = True
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def _words(seed: int | Sequence[int]) -> int | Sequence[int]:
    """What RandomState takes: a seed that is longer than its 32 bits is given as two numbers."""
    parts = [seed] if isinstance(seed, int) else seed
    return seed if max(parts) < 2**32 else [word for part in parts for word in (part % 2**32, part >> 32)]


def read_digits(root: Path | None = None) -> Arrays:
    """scikit-learn's 1797 scans of 8x8; a fifth of each class is the test set, the same for every seed of a run."""
    if root is not None:
        raise ValueError(f"data.root must be null for digits, which are inside scikit-learn, got {root}")
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise ImportError("digits: the scans come with scikit-learn, which is not installed (pip install scikit-learn)")
    file = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if file.is_file():
        rows = np.loadtxt(file, delimiter=",")
    else:  # through scikit-learn itself, whose import takes longer than this data set's training
        from sklearn.datasets import load_digits

        rows = np.column_stack(load_digits(return_X_y=True))
    images = np.rint(rows[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
    labels = rows[:, -1].astype(np.int64)
    test, train = stratified(labels, 0.2, seed=1797)
    return Arrays(images[train], labels[train], images[test], labels[test], tuple("0123456789"))


def read_fashion_mnist(root: Path | None = None) -> Arrays:
    """The four IDX .gz files, 60,000 + 10,000 images of 28x28."""
    folder = FASHION_MNIST_FOLDER if root is None else root
    source = f"get it with apt-get install dataset-fashion-mnist (installs into {FASHION_MNIST_FOLDER}), or from "
    source += "https://github.com/zalandoresearch/fashion-mnist"
    splits: list[np.ndarray] = []
    for split in ("train", "t10k"):
        images_file, labels_file = f"{split}-images-idx3-ubyte.gz", f"{split}-labels-idx1-ubyte.gz"
        _require([folder], [images_file, labels_file], source)
        images, labels = _read_idx(folder / images_file, dims=3), _read_idx(folder / labels_file, dims=1)
        if len(images) != len(labels):
            raise ValueError(
                f"{folder / labels_file} must hold {len(images)} labels like {images_file}, got {len(labels)}"
            )
        _check_labels(labels, len(FASHION_MNIST_CLASSES), folder / labels_file)
        splits += [images[:, None], labels.astype(np.int64)]
    train_images, train_labels, test_images, test_labels = splits
    return Arrays(train_images, train_labels, test_images, test_labels, FASHION_MNIST_CLASSES)


def _read_idx(path: Path, dims: int) -> np.ndarray:
    """A gzipped IDX file of unsigned bytes: two zeros, type 8, the number of dimensions, each size, big-endian."""
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: truncated or not gzip ({error})") from error
    header = 4 + 4 * dims
    magic = int.from_bytes(content[:4], "big")
    if len(content) < header or magic != 0x0800 + dims:
        raise ValueError(
            f"{path}: must begin with the IDX magic number {0x0800 + dims}, got {magic} ({len(content)} bytes)"
        )
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    wanted = header + math.prod(shape)
    if len(content) != wanted:
        raise ValueError(f"{path}: must have {wanted} bytes for the shape {shape} of its header, got {len(content)}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def read_cifar10(root: Path | None = None, *, download: bool = False) -> Arrays:
    """The 'binary version' of CIFAR-10: data_batch_1.bin to data_batch_5.bin, test_batch.bin, batches.meta.txt.

    download: where a file is missing, through torchvision instead, which fetches its own version.
    """
    train = [f"data_batch_{i}.bin" for i in range(1, 6)]
    return _read_cifar(root, "cifar-10-batches-bin", train, "test_batch.bin", "batches.meta.txt", 10, download)


def read_cifar100(root: Path | None = None, *, download: bool = False) -> Arrays:
    """The 'binary version' of CIFAR-100, fine labels: train.bin, test.bin, fine_label_names.txt; or see read_cifar10."""
    return _read_cifar(root, "cifar-100-binary", ["train.bin"], "test.bin", "fine_label_names.txt", 100, download)


def _read_cifar(
    root: Path | None, folder_name: str, train: list[str], test: str, names: str, classes: int, download: bool
) -> Arrays:
    root = DEFAULT_FOLDER if root is None else root
    by_hand = f"get it from https://www.cs.toronto.edu/~kriz/cifar-{classes}-binary.tar.gz and unpack it there"
    source = f"{by_hand}, or set data.download=true to fetch it through torchvision"
    try:
        folder = _require([root / folder_name, root], [*train, test, names], source)
    except FileNotFoundError:
        if not download:
            raise
        return _cifar_of_torchvision(root, classes, by_hand)
    # A record is its label bytes (CIFAR-100: coarse, then fine) and 3 x 32 x 32 pixels.
    label_bytes = 2 if classes == 100 else 1
    parts = [_read_records(folder / name, label_bytes, classes) for name in train]
    class_names = tuple(line.strip() for line in (folder / names).read_text().splitlines() if line.strip())
    if len(class_names) != classes:
        raise ValueError(f"{folder / names}: must hold {classes} class names, got {len(class_names)}")
    train_images, train_labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    test_images, test_labels = _read_records(folder / test, label_bytes, classes)
    return Arrays(train_images, train_labels, test_images, test_labels, class_names, IMAGENET_MEAN, IMAGENET_STD)


def _cifar_of_torchvision(root: Path, classes: int, by_hand: str) -> Arrays:
    """The same images in the same order as in the binary version, fetched into `root` unless they are there."""
    name = f"CIFAR{classes}"
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(
            f'data.download: fetching {name} into {root} needs torchvision (pip install "amtml-fast[zoo]"); or {by_hand}'
        ) from error
    try:
        train, test = (getattr(datasets, name)(root, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:  # no network; a file that is not what it should be
        raise FileNotFoundError(
            f"data.download: torchvision could not fetch {name} into {root} ({error}); {by_hand}"
        ) from error
    images = [split.data.transpose(0, 3, 1, 2) for split in (train, test)]  # [N, 32, 32, 3] -> [N, 3, 32, 32]
    labels = [np.array(split.targets, dtype=np.int64) for split in (train, test)]
    return Arrays(images[0], labels[0], images[1], labels[1], tuple(train.classes), IMAGENET_MEAN, IMAGENET_STD)


def _read_records(path: Path, label_bytes: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    content = np.fromfile(path, np.uint8)
    size = label_bytes + 3 * 32 * 32
    if len(content) == 0 or len(content) % size:
        raise ValueError(f"{path}: must be whole records of {size} bytes, got {len(content)} bytes")
    records = content.reshape(-1, size)
    labels = records[:, label_bytes - 1].astype(np.int64)
    _check_labels(labels, classes, path)
    return records[:, label_bytes:].reshape(-1, 3, 32, 32), labels


def read_image_folder(root: Path | None = None) -> Arrays:
    """The images below train/<class>/, at any depth, and below test/<class>/ (or val/<class>/, if there is no test/).

    Tiny-ImageNet: train/<wnid>/images, val/images with val/val_annotations.txt, names from words.txt; its val/ is the
    test set (its test/ has no labels). All images must be of one size; they are read as RGB. Hidden folders and files,
    whose names begin with a dot, are left out, and so is what has no suffix of IMAGE_SUFFIXES.
    """
    root = DEFAULT_FOLDER if root is None else root
    source = "wanted train/<class>/*.png (or .jpg, .jpeg) and test/<class>/ or val/<class>/ beside it"
    if not (root / "train").is_dir():
        raise FileNotFoundError(f"data.root: looked for the folder train in {root}, not found; {source}")
    classes = _class_folders(root / "train")
    train_files, train_labels = _class_images(root / "train", classes)
    missing = sorted(set(range(len(classes))) - set(train_labels.tolist()))
    if missing:
        folder = root / "train" / classes[missing[0]]
        raise ValueError(f"{folder}: a class of the training set must have an image, found none")
    annotations = root / "val" / "val_annotations.txt"
    if annotations.is_file():
        test_files, test_labels = _annotated_images(annotations, classes)
    else:
        test_folder = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
        if test_folder is None:
            raise FileNotFoundError(f"data.root: looked for the folder test or val in {root}, not found; {source}")
        strangers = [name for name in _class_folders(test_folder) if name not in classes]
        if strangers:
            raise ValueError(f"{test_folder / strangers[0]}: this class has no folder in {root / 'train'}")
        test_files, test_labels = _class_images(test_folder, classes)
    images = _decode([*train_files, *test_files])
    n = len(train_files)
    return Arrays(images[:n], train_labels, images[n:], test_labels, _class_names(root / "words.txt", classes))


def read_tiny_imagenet(root: Path | None = None) -> Arrays:
    """Tiny-ImageNet as it is published: 64x64, 500 training images for each of the 200 classes of wnids.txt.

    Its val/ is the test set. A part of it will do whose wnids.txt names the classes that train/ holds.
    """
    root = DEFAULT_FOLDER if root is None else root
    source = "get it from http://cs231n.stanford.edu/tiny-imagenet-200.zip and unpack it there"
    folder = _require([root / "tiny-imagenet-200", root], ["wnids.txt", "val/val_annotations.txt"], source)
    train, wnids = folder / "train", (folder / "wnids.txt").read_text().split()
    missing = [wnid for wnid in wnids if not (train / wnid).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"{train / missing[0]}: {folder / 'wnids.txt'} lists this class, but there is no such folder "
            f"({len(missing)} of {len(wnids)} are missing); {source}"
        )
    strangers = [name for name in _class_folders(train) if name not in wnids]
    if strangers:
        raise ValueError(f"{train / strangers[0]}: {folder / 'wnids.txt'} does not list this class")
    return read_image_folder(folder)


def _class_folders(folder: Path) -> list[str]:
    return sorted(inner.name for inner in folder.iterdir() if inner.is_dir() and not inner.name.startswith("."))


def _class_images(folder: Path, classes: Sequence[str]) -> tuple[list[Path], np.ndarray]:
    files: list[Path] = []
    labels: list[int] = []
    strays = sorted(file for file in folder.iterdir() if file.is_file() and _is_image(file.name))
    if strays:
        raise ValueError(f"{strays[0]}: an image must be in the folder of its class, {folder}/<class>/")
    for label, name in enumerate(classes):
        found = sorted(_images_below(folder / name))
        files += found
        labels += [label] * len(found)
    if not files:
        raise FileNotFoundError(f"data.root: looked for {folder}/<class>/*.png (or .jpg, .jpeg), found no image")
    return files, np.array(labels, dtype=np.int64)


def _images_below(folder: Path) -> Iterator[Path]:
    """At any depth, through links too, as torchvision's ImageFolder, but for links that lead back: there would be no end."""
    ways: dict[str, tuple[str, ...]] = {}  # where a folder really is, and all above it
    for inner, folders, files in os.walk(folder, onerror=_unreadable, followlinks=True):
        place, above = os.path.realpath(inner), ways.get(os.path.dirname(inner), ())
        if place in above:
            raise ValueError(f"{inner}: a link must not lead back to a folder above it, got one to {place}")
        ways[inner] = (*above, place)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(inner, name) for name in files if _is_image(name))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _unreadable(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # a test set may lack a class
        raise error


def _annotated_images(annotations: Path, classes: Sequence[str]) -> tuple[list[Path], np.ndarray]:
    """Tiny-ImageNet's val_annotations.txt: a line is file name, wnid and a bounding box, separated by tabs."""
    files: list[Path] = []
    labels: list[int] = []
    label_of = {name: label for label, name in enumerate(classes)}
    for number, line in enumerate(annotations.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in label_of:
            raise ValueError(f"{annotations}: line {number} must be a file name and a class of train/, got {line!r}")
        files.append(annotations.parent / "images" / fields[0])
        labels.append(label_of[fields[1]])
    if not files:
        raise ValueError(f"{annotations} must name at least one image, got none")
    _require([annotations.parent / "images"], [file.name for file in files], f"{annotations} names it")
    return files, np.array(labels, dtype=np.int64)


def _class_names(words: Path, classes: Sequence[str]) -> tuple[str, ...]:
    """The first word that words.txt has for each wnid; the folder's name where it has none."""
    if not words.is_file():
        return tuple(classes)
    lines = (line.split("\t") for line in words.read_text(encoding="utf-8").splitlines() if "\t" in line)
    names = {fields[0]: fields[1].split(",")[0].strip() for fields in lines}
    return tuple(names.get(name, name) for name in classes)


def _decode(files: Sequence[Path]) -> np.ndarray:
    """The images of `files` as [N, 3, H, W] uint8, decoded by threads (the decoders release the interpreter's lock)."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("image_folder: reading images needs the package pillow (pip install pillow)") from error

    def pixels(file: Path) -> np.ndarray:
        try:
            with Image.open(file) as image:
                return np.asarray(eight_bits(image).convert("RGB"))  # [H, W, 3]
        except MemoryError:
            raise
        except Exception as error:  # PIL has errors of its own, such as for a size that cannot be
            raise ValueError(f"{file}: not a readable image ({error})") from error

    height, width, _ = pixels(files[0]).shape
    images = np.empty((len(files), 3, height, width), np.uint8)

    def store(i: int) -> None:
        image = pixels(files[i])
        if image.shape != (height, width, 3):
            got = f"{image.shape[1]}x{image.shape[0]}"
            raise ValueError(f"{files[i]}: images must be of one size, {width}x{height} like {files[0]}, got {got}")
        images[i] = image.transpose(2, 0, 1)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(store, range(len(files))):  # the loop raises what a thread raised
            pass
    return images


def _require(folders: Sequence[Path], files: Sequence[str], source: str) -> Path:
    """The first of `folders` that has all `files`; else an error that names the first missing file and `source`."""
    for folder in folders:
        if all((folder / file).is_file() for file in files):
            return folder
    # The folder that has some of them is where the missing one belongs.
    best = max(folders, key=lambda folder: sum((folder / file).is_file() for file in files))
    missing = next(file for file in files if not (best / file).is_file())
    raise FileNotFoundError(
        f"data.root: looked for {missing} in {' and '.join(map(str, folders))}, not found; {source}"
    )


def _check_labels(labels: np.ndarray, classes: int, path: Path) -> None:
    if len(labels) and labels.max() >= classes:
        at = int(np.flatnonzero(labels >= classes)[0])
        raise ValueError(f"{path}: labels must be in [0, {classes}), got {labels[at]} at record {at}")


DATASETS: dict[str, Callable[[Path | None], Arrays]] = {
    "digits": read_digits,
    "fashion_mnist": read_fashion_mnist,
    "cifar10": read_cifar10,
    "cifar100": read_cifar100,
    "tiny_imagenet": read_tiny_imagenet,
    "image_folder": read_image_folder,
}
DOWNLOADS: dict[str, Callable[[Path | None], Arrays]] = {
    "cifar10": partial(read_cifar10, download=True),
    "cifar100": partial(read_cifar100, download=True),
}
