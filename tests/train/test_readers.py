"""Readers on small files in the true formats: digits, IDX, CIFAR; and the validation split."""

import gzip
import struct
import sys
import types

import numpy as np
import pytest
import torch
from small_images import random_images

from amtml_fast.train.data import readers
from amtml_fast.train.data.images import channel_statistics, load

# --- digits and the validation split


@pytest.fixture(scope="module")
def digits():
    return load("digits", val_fraction=0.15, seed=3)


def test_digits_are_the_1797_scans(digits):
    from sklearn.datasets import load_digits

    assert len(digits.train) + len(digits.val) + len(digits.test) == 1797
    assert digits.train.images.dtype == torch.uint8 and digits.train.labels.dtype == torch.int64
    assert digits.test.images.shape[1:] == (1, 8, 8)
    assert digits.classes == tuple("0123456789") and digits.num_classes == 10 and digits.in_channels == 1
    ours = torch.cat([split.images for split in (digits.train, digits.val, digits.test)])
    assert ours.max() == 255
    restored = sorted((ours.float() * 16 / 255).round().to(torch.uint8).flatten(1).tolist())
    assert restored == sorted(load_digits().data.astype(np.uint8).tolist())


def test_the_test_split_does_not_depend_on_seed_or_fraction(digits):
    other = load("digits", val_fraction=0.3, seed=4)
    assert torch.equal(other.test.images, digits.test.images)
    assert torch.equal(other.test.labels, digits.test.labels)
    counts = torch.bincount(digits.test.labels)
    assert len(digits.test) == 359 and counts.min() >= 34 and counts.max() <= 37


def test_load_is_a_function_of_its_seed(digits):
    again, other = load("digits", val_fraction=0.15, seed=3), load("digits", val_fraction=0.15, seed=4)
    assert torch.equal(again.val.images, digits.val.images) and torch.equal(again.train.images, digits.train.images)
    assert not torch.equal(other.val.images, digits.val.images)


def test_validation_takes_its_fraction_of_every_class(digits):
    val, train = torch.bincount(digits.val.labels), torch.bincount(digits.train.labels)
    for in_val, in_train in zip(val.tolist(), train.tolist(), strict=True):
        assert in_val == round(0.15 * (in_val + in_train))


@pytest.mark.parametrize("seed", [2**32, 2**63 - 1, (2**63 - 1, 3)])
def test_every_seed_that_a_configuration_may_have_draws_a_split_of_its_own(seed):
    labels = np.repeat([0, 1], 50)
    chosen, rest = readers.stratified(labels, 0.2, seed)
    assert sorted([*chosen, *rest]) == list(range(100))
    for other in (0, 2**32 - 1, 2**62):
        assert not np.array_equal(chosen, readers.stratified(labels, 0.2, other)[0])


def test_stratified_is_disjoint_and_whole():
    labels = np.array([0] * 10 + [1] * 3 + [2] * 1 + [3] * 2)
    chosen, rest = readers.stratified(labels, 0.2, seed=0)
    assert sorted([*chosen, *rest]) == list(range(16))
    # Two of ten; one of three, though 0.6 rounds to it only just; none of one; one of two, though 0.4 rounds to none.
    assert np.bincount(labels[chosen], minlength=4).tolist() == [2, 1, 0, 1]
    most, _ = readers.stratified(labels, 0.95, seed=0)
    assert np.bincount(labels[most], minlength=4).tolist() == [9, 2, 0, 1]


def test_mean_and_std_are_those_of_the_training_split(digits):
    pixels = digits.train.images.double() / 255
    assert digits.mean == pytest.approx([pixels.mean().item()], abs=1e-12)
    assert digits.std == pytest.approx([pixels.std(correction=0).item()], abs=1e-12)
    images = torch.stack([torch.full((4, 2, 2), 51, dtype=torch.uint8), torch.full((4, 2, 2), 7, dtype=torch.uint8)], 1)
    images[:2, 0] = 0
    mean, std = channel_statistics(images)
    assert mean == pytest.approx([0.1, 7 / 255]) and std == pytest.approx([0.1, 1.0])  # a constant channel has std 1


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_val_fraction_must_be_a_fraction(fraction):
    with pytest.raises(ValueError, match=f"data.val_fraction must be between 0 and 1, got {fraction}"):
        load("digits", val_fraction=fraction)


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="no data set 'cifar'; near names: cifar10"):
        load("cifar")
    with pytest.raises(ValueError, match=r"data\.root must be null for digits"):
        load("digits", tmp_path)


# --- fashion_mnist


def idx(array, magic=None):
    header = struct.pack(f">{array.ndim + 1}I", 0x0800 + array.ndim if magic is None else magic, *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def fashion(tmp_path):
    """A folder with 40 training and 20 test images of 28x28 in IDX files."""
    images = {"train": random_images(40, 28, 28), "t10k": random_images(20, 28, 28)}
    for split, array in images.items():
        labels = np.arange(len(array)) % 10
        (tmp_path / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(array)))
        (tmp_path / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return tmp_path, images


def test_fashion_mnist_is_read_byte_for_byte(fashion):
    folder, images = fashion
    loaded = load("fashion_mnist", str(folder))
    assert np.array_equal(loaded.test.images[:, 0].numpy(), images["t10k"])
    assert loaded.test.labels.tolist() == [*range(10)] * 2
    assert loaded.test.images.shape == (20, 1, 28, 28)
    assert len(loaded.train) == 30 and len(loaded.val) == 10  # one of four in each class
    assert loaded.classes[0] == "T-shirt/top" and loaded.classes[9] == "Ankle boot"
    for image, label in zip(loaded.train.images, loaded.train.labels, strict=True):
        position = int(np.flatnonzero((images["train"] == image[0].numpy()).all(axis=(1, 2)))[0])
        assert label == position % 10


def test_fashion_mnist_missing_says_what_where_and_whence(fashion, monkeypatch):
    folder, _ = fashion
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    message = rf"looked for t10k-labels-idx1-ubyte.gz in {folder}, not found; .*apt-get install dataset-fashion-mnist"
    with pytest.raises(FileNotFoundError, match=message):
        load("fashion_mnist", folder)
    monkeypatch.setattr(readers, "FASHION_MNIST_FOLDER", folder / "nowhere")
    with pytest.raises(FileNotFoundError, match=f"looked for train-images-idx3-ubyte.gz in {folder / 'nowhere'}"):
        load("fashion_mnist")


@pytest.mark.skipif(
    not readers.FASHION_MNIST_FOLDER.is_dir(), reason="the package dataset-fashion-mnist is not installed"
)
def test_fashion_mnist_as_debian_installs_it():
    loaded = load("fashion_mnist")
    assert len(loaded.train) == 54_000 and len(loaded.val) == 6_000 and len(loaded.test) == 10_000
    assert loaded.mean == pytest.approx([0.286], abs=1e-3) and loaded.std == pytest.approx([0.353], abs=1e-3)


IMAGES = idx(random_images(40, 28, 28))
BROKEN_IDX = [
    ("train-images-idx3", gzip.compress(IMAGES)[:-100], "truncated or not gzip"),
    ("train-images-idx3", b"<html>not found</html>", "truncated or not gzip"),
    ("train-images-idx3", b"", "must begin with the IDX magic number 2051, got 0"),
    (
        "train-images-idx3",
        gzip.compress(IMAGES)[:40] + b"\0" * 20 + gzip.compress(IMAGES)[60:],
        "truncated or not gzip",
    ),
    (
        "train-images-idx3",
        gzip.compress(IMAGES[:-1]),
        r"must have 31376 bytes for the shape \[40, 28, 28\] of its header, got 31375",
    ),
    ("train-images-idx3", gzip.compress(IMAGES + b"\0"), r"must have 31376 bytes for the shape .* got 31377"),
    ("train-images-idx3", gzip.compress(IMAGES[:10]), r"magic number 2051, got 2051 \(10 bytes\)"),
    ("train-images-idx3", gzip.compress(idx(np.arange(40) % 10)), "magic number 2051, got 2049"),
    ("train-labels-idx1", gzip.compress(idx(np.arange(40) % 10, magic=0x0D01)), "magic number 2049, got 3329"),
    ("train-labels-idx1", gzip.compress(idx(np.arange(40) % 11)), r"labels must be in \[0, 10\), got 10 at record 10"),
]


@pytest.mark.parametrize("file, content, message", BROKEN_IDX, ids=range(len(BROKEN_IDX)))
def test_a_broken_idx_file_is_named(fashion, file, content, message):
    folder, _ = fashion
    (folder / f"{file}-ubyte.gz").write_bytes(content)
    with pytest.raises(ValueError, match=f"{file}-ubyte.gz: .*{message}"):
        load("fashion_mnist", folder)


def test_idx_counts_must_agree(fashion):
    folder, _ = fashion
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(39) % 10)))
    with pytest.raises(
        ValueError, match=r"train-labels-idx1-ubyte.gz must hold 40 labels like train-images-idx3-ubyte.gz, got 39"
    ):
        load("fashion_mnist", folder)


def test_a_split_without_images_is_an_error(fashion):
    folder, _ = fashion
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(random_images(0, 28, 28))))
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(0))))
    with pytest.raises(ValueError, match="fashion_mnist must have images for training and for testing, got 40 and 0"):
        load("fashion_mnist", folder)


# --- CIFAR


def write_cifar(folder, classes):
    """Two images a class in each file, as in the published archives; returns the test images."""
    folder.mkdir(parents=True)
    labels = np.repeat(np.arange(classes), 2)
    test = random_images(2 * classes, 3, 32, 32)
    columns = [labels[:, None]] if classes == 10 else [labels[:, None] // 5, labels[:, None]]  # coarse, fine
    record = np.concatenate([*columns, test.reshape(len(test), -1)], axis=1).astype(np.uint8).tobytes()
    names = "\n".join(f"class{i}" for i in range(classes)) + "\n\n"
    if classes == 10:
        files = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
        (folder / "batches.meta.txt").write_text(names)
    else:
        files = ["train.bin", "test.bin"]
        (folder / "fine_label_names.txt").write_text(names)
    for file in files:
        (folder / file).write_bytes(record)
    return test


CIFAR = [("cifar10", "cifar-10-batches-bin", 10, 5), ("cifar100", "cifar-100-binary", 100, 1)]


@pytest.mark.parametrize("name, folder, classes, files", CIFAR)
def test_cifar_binary_version(tmp_path, name, folder, classes, files):
    test = write_cifar(tmp_path / folder, classes)
    loaded = load(name, tmp_path)
    assert np.array_equal(loaded.test.images.numpy(), test)
    assert loaded.test.labels.tolist() == np.repeat(np.arange(classes), 2).tolist()
    assert len(loaded.train) + len(loaded.val) == 2 * classes * files
    assert loaded.classes == tuple(f"class{i}" for i in range(classes))
    assert loaded.mean == (0.485, 0.456, 0.406) and loaded.std == (0.229, 0.224, 0.225)
    inside = load(name, tmp_path / folder)  # the folder itself is found too
    assert torch.equal(inside.train.images, loaded.train.images)


def test_cifar_default_folder_is_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"looked for data_batch_1.bin in data/cifar-10-batches-bin and data, not found"
    ):
        load("cifar10")
    write_cifar(tmp_path / "data" / "cifar-10-batches-bin", 10)
    assert len(load("cifar10").test) == 20


@pytest.mark.parametrize("name, folder, classes, files", CIFAR)
def test_broken_cifar_files_are_named(tmp_path, name, folder, classes, files):
    write_cifar(tmp_path / folder, classes)
    file = next((tmp_path / folder).glob("test*.bin"))
    content = file.read_bytes()

    file.write_bytes(content[:-1])
    record = 3073 if classes == 10 else 3074
    message = f"{file.name}: must be whole records of {record} bytes, got {len(content) - 1} bytes"
    with pytest.raises(ValueError, match=message):
        load(name, tmp_path)

    file.write_bytes(b"")
    with pytest.raises(ValueError, match=f"{file.name}: must be whole records"):
        load(name, tmp_path)

    broken = bytearray(content)
    broken[record + record - 3073] = classes  # the (fine) label of the second record
    file.write_bytes(broken)
    with pytest.raises(
        ValueError, match=rf"{file.name}: labels must be in \[0, {classes}\), got {classes} at record 1"
    ):
        load(name, tmp_path)

    file.unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"looked for {file.name} in .*https://www.cs.toronto.edu/.*-binary.tar.gz"
    ):
        load(name, tmp_path)

    file.write_bytes(content)
    names = next((tmp_path / folder).glob("*.txt"))
    names.write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=f"{names.name}: must hold {classes} class names, got 2"):
        load(name, tmp_path)


class FakeCIFAR:
    """As much of torchvision's CIFAR sets as is read: images [N, 32, 32, 3] and labels from the binary version."""

    def __init__(self, root, train=True, download=False):
        assert download
        self.asked.append((root, train))
        count = 2 * self.size
        self.data = random_images(count, 3, 32, 32).transpose(0, 2, 3, 1) + np.uint8(train)
        self.targets = [i % self.size for i in range(count)]
        self.classes = [f"class{i}" for i in range(self.size)]


@pytest.fixture
def torchvision(monkeypatch):
    """A stand-in for torchvision, and what it was asked for."""
    asked = []
    sets = types.ModuleType("torchvision.datasets")
    for classes in (10, 100):
        setattr(sets, f"CIFAR{classes}", type("Fake", (FakeCIFAR,), {"size": classes, "asked": asked}))
    package = types.ModuleType("torchvision")
    package.datasets = sets
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", sets)
    return asked


@pytest.mark.parametrize("name, folder, classes, files", CIFAR)
def test_cifar_is_fetched_where_it_is_missing_and_asked_for(tmp_path, torchvision, name, folder, classes, files):
    with pytest.raises(FileNotFoundError, match=r"binary.tar.gz and unpack it there, or set data.download=true"):
        load(name, tmp_path)
    assert torchvision == []
    loaded = load(name, tmp_path, download=True)
    assert torchvision == [(tmp_path, True), (tmp_path, False)]
    assert np.array_equal(loaded.test.images.numpy(), random_images(2 * classes, 3, 32, 32))
    assert loaded.test.labels.tolist() == [*range(classes)] * 2
    assert loaded.classes == tuple(f"class{i}" for i in range(classes))
    assert loaded.mean == (0.485, 0.456, 0.406) and loaded.std == (0.229, 0.224, 0.225)
    assert len(loaded.train) + len(loaded.val) == 2 * classes

    test = write_cifar(tmp_path / folder, classes)  # the files that are there go first
    assert np.array_equal(load(name, tmp_path, download=True).test.images.numpy(), test)
    assert len(torchvision) == 2


def test_fetching_says_what_it_needs(tmp_path, torchvision, monkeypatch):
    by_hand = r"get it from https://www.cs.toronto.edu/.*cifar-10-binary.tar.gz"

    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(FakeCIFAR, "__init__", no_network)
    with pytest.raises(FileNotFoundError, match=rf"fetch CIFAR10 into {tmp_path} \(no route to host\); {by_hand}"):
        load("cifar10", tmp_path, download=True)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=rf'needs torchvision \(pip install "amtml-fast\[zoo\]"\); or {by_hand}'):
        load("cifar10", tmp_path, download=True)
    with pytest.raises(
        ValueError, match=r"data.name must be one of cifar10, cifar100 with data.download, got 'digits'"
    ):
        load("digits", download=True)
