"""Readers on small files in the true formats, the validation split, and the batches of the Loader."""

import gzip
import struct
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from amtml_fast.train.data import readers, samples
from amtml_fast.train.data.images import (
    Batch,
    ImageData,
    ImageSet,
    Loader,
    channel_statistics,
    flip_and_crop,
    from_datasets,
    load,
)

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


def random_images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


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


# --- image_folder


def save_image(path, color, size=(6, 4), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


@pytest.fixture
def folder(tmp_path):
    for label, name in enumerate(["cat", "dog"]):
        for i in range(4):
            save_image(tmp_path / "train" / name / f"{i}.png", (10 * label, i, 200))
        save_image(tmp_path / "test" / name / "0.PNG", (10 * label, 99, 200))
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    return tmp_path


def test_image_folder(folder):
    loaded = load("image_folder", folder, val_fraction=0.25)
    assert loaded.classes == ("cat", "dog")
    assert loaded.test.images.shape == (2, 3, 4, 6) and loaded.test.labels.tolist() == [0, 1]
    assert loaded.test.images[:, :, 0, 0].tolist() == [[0, 99, 200], [10, 99, 200]]
    assert len(loaded.train) == 6 and len(loaded.val) == 2
    assert (loaded.train.images[:, 0, 0, 0] == 10 * loaded.train.labels).all()


def test_image_folder_keeps_every_pixel_in_its_place(folder):
    pixels = random_images(4, 6, 3)
    Image.fromarray(pixels).save(folder / "test" / "dog" / "0.PNG")
    assert np.array_equal(load("image_folder", folder).test.images[1].numpy(), pixels.transpose(2, 0, 1))


def test_image_folder_takes_val_where_there_is_no_test(folder):
    save_image(folder / "val" / "dog" / "0.jpg", 128, mode="L")  # gray JPEGs become RGB
    assert len(load("image_folder", folder).test) == 2  # test/ goes first
    (folder / "test").rename(folder / "kept")
    loaded = load("image_folder", folder)
    assert loaded.test.labels.tolist() == [1] and loaded.test.images[0, :, 0, 0].tolist() == [128] * 3


def test_image_folder_reads_every_image_at_any_depth(folder, tmp_path_factory):
    wanted = load("image_folder", folder, val_fraction=0.25)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    save_image(elsewhere / "linked.png", (0, 11, 200))
    for place, shade in (
        ("images/5.png", 5),
        ("images/deep/6.JPEG", 6),
        ("7.bmp", 7),
        ("more/8.webp", 8),
        ("x/9.gif", 9),
    ):
        save_image(folder / "train" / "cat" / place, (0, shade, 200))
    (folder / "train" / "cat" / "link").symlink_to(elsewhere)
    save_image(folder / "test" / "dog" / "images" / "1.png", 0)
    loaded = load("image_folder", folder, val_fraction=0.25)
    assert len(loaded.train) + len(loaded.val) == len(wanted.train) + len(wanted.val) + 6
    assert loaded.test.labels.tolist() == [0, 1, 1]


def test_image_folder_leaves_hidden_folders_and_files_out(folder):
    wanted = load("image_folder", folder)
    save_image(folder / "train" / ".ipynb_checkpoints" / "0.png", 0)
    save_image(folder / "train" / "cat" / ".ipynb_checkpoints" / "0.png", 0)
    save_image(folder / "test" / ".ipynb_checkpoints" / "0.png", 0)
    (folder / "train" / "cat" / "._0.png").write_bytes(b"what macOS leaves on other disks")
    (folder / "train" / "._0.png").write_bytes(b"")
    loaded = load("image_folder", folder)
    assert loaded.classes == ("cat", "dog")
    for split in ("train", "val", "test"):
        assert torch.equal(getattr(loaded, split).images, getattr(wanted, split).images)


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_image_beside_the_class_folders_is_named(folder, part):
    save_image(folder / part / "stray.jpg", 0)
    with pytest.raises(ValueError, match=rf"{part}/stray.jpg: an image must be in the folder of its class"):
        load("image_folder", folder)


def test_tiny_imagenet_does_not_mind_a_hidden_folder(tiny):
    (tiny / "wnids.txt").write_text("n02\nn01\n")
    (tiny / "train" / ".ipynb_checkpoints").mkdir()
    assert len(load("tiny_imagenet", tiny).train) == 2


def test_image_folder_errors_name_the_place(folder, tmp_path_factory):
    save_image(folder / "train" / "dog" / "9.png", 0, size=(5, 4))
    with pytest.raises(ValueError, match=r"dog/9.png: images must be of one size, 6x4 like .*cat/0.png, got 5x4"):
        load("image_folder", folder)
    (folder / "train" / "dog" / "9.png").write_bytes((folder / "train" / "dog" / "0.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"dog/9.png: not a readable image"):
        load("image_folder", folder)
    (folder / "train" / "dog" / "9.png").unlink()
    (folder / "train" / "eel").mkdir()
    with pytest.raises(ValueError, match="train/eel: a class of the training set must have an image, found none"):
        load("image_folder", folder)
    (folder / "train" / "eel").rmdir()
    save_image(folder / "test" / "eel" / "0.png", 0)
    with pytest.raises(ValueError, match=r"test/eel: this class has no folder in .*train"):
        load("image_folder", folder)
    (folder / "test").rename(folder / "kept")
    with pytest.raises(FileNotFoundError, match=f"looked for the folder test or val in {folder}, not found"):
        load("image_folder", folder)
    (folder / "test").mkdir()
    with pytest.raises(FileNotFoundError, match=r"looked for .*test/<class>/\*.png \(or .jpg, .jpeg\), found no image"):
        load("image_folder", folder)
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(FileNotFoundError, match=f"looked for the folder train in {empty}, not found"):
        load("image_folder", empty)


@pytest.fixture
def tiny(tmp_path):
    """Two wnids in Tiny-ImageNet's layout; test/ has images without labels, as in the archive."""
    for wnid in ("n02", "n01"):
        for i in range(2):
            save_image(tmp_path / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", 0, size=(8, 8))
        (tmp_path / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    for i in range(3):
        save_image(tmp_path / "val" / "images" / f"val_{i}.JPEG", (60 * i,) * 3, size=(8, 8))
    save_image(tmp_path / "test" / "images" / "test_0.JPEG", 0, size=(8, 8))
    rows = ["val_2.JPEG\tn01\t0\t0\t7\t7", "val_0.JPEG\tn02\t0\t0\t7\t7", "val_1.JPEG\tn01\t0\t0\t7\t7", ""]
    (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(rows))
    (tmp_path / "words.txt").write_text("n00\tentity\nn01\tgoldfish, Carassius auratus\nn03\tother\n")
    return tmp_path


def test_tiny_imagenet_layout(tiny):
    loaded = load("image_folder", tiny)
    assert loaded.classes == ("goldfish", "n02")  # the first name of words.txt, and the folder's where it has none
    assert len(loaded.train) == 2 and len(loaded.val) == 2
    assert loaded.test.labels.tolist() == [0, 1, 0]
    assert loaded.test.images[:, 0, 4, 4].tolist() == [120, 0, 60]


def test_tiny_imagenet_errors(tiny):
    (tiny / "val" / "images" / "val_1.JPEG").unlink()
    with pytest.raises(FileNotFoundError, match=r"looked for val_1.JPEG in .*val_annotations.txt names it"):
        load("image_folder", tiny)
    (tiny / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01\nval_2.JPEG\tn09\n")
    with pytest.raises(
        ValueError, match=r"val_annotations.txt: line 2 must be .* a class of train/, got 'val_2.JPEG\\tn09'"
    ):
        load("image_folder", tiny)


def test_tiny_imagenet_by_its_name(tiny, tmp_path_factory, monkeypatch):
    (tiny / "wnids.txt").write_text("n02\nn01\n")
    loaded, as_folder = load("tiny_imagenet", tiny), load("image_folder", tiny)
    assert loaded.name == "tiny_imagenet" and loaded.classes == as_folder.classes
    assert torch.equal(loaded.train.images, as_folder.train.images)
    assert torch.equal(loaded.test.labels, as_folder.test.labels)

    working = tmp_path_factory.mktemp("working")
    (working / "data").mkdir()
    (working / "data" / "tiny-imagenet-200").symlink_to(tiny)
    monkeypatch.chdir(working)
    assert len(load("tiny_imagenet").test) == 3  # the default folder
    assert len(load("tiny_imagenet", working / "data").test) == 3  # where the archive was unpacked


def test_half_a_tiny_imagenet_is_named(tiny):
    source = "get it from http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    with pytest.raises(FileNotFoundError, match=rf"wnids.txt in .*200 and {tiny}, not found; {source}"):
        load("tiny_imagenet", tiny)
    (tiny / "wnids.txt").write_text("n02\nn03\nn01\n")
    with pytest.raises(FileNotFoundError, match=rf"train/n03: .*wnids.txt lists .*\(1 of 3 are missing\); {source}"):
        load("tiny_imagenet", tiny)
    (tiny / "wnids.txt").write_text("n02\n")
    with pytest.raises(ValueError, match=r"train/n01: .*wnids.txt does not list this class"):
        load("tiny_imagenet", tiny)
    (tiny / "wnids.txt").write_text("n02\nn01\n")
    (tiny / "val" / "val_annotations.txt").unlink()  # without it test/ would be read, which has no labels
    with pytest.raises(FileNotFoundError, match=rf"looked for val/val_annotations.txt in .*; {source}"):
        load("tiny_imagenet", tiny)


# --- images in every mode

LEVELS = np.array([[0, 1, 63, 127], [128, 191, 254, 255]], dtype=np.uint8)
COLORS = np.stack([LEVELS, LEVELS[::-1], 255 - LEVELS], 2)


def image_of(kind):
    """A PIL image of the kind, and what must be read of it, [H, W] or [H, W, 3] uint8."""
    if kind.startswith("16 bits"):
        wide = LEVELS.astype(np.uint16)
        return Image.fromarray(wide * 257 if kind.endswith("repeated") else wide << 8), LEVELS
    if kind == "palette" or kind == "palette, transparent":
        image = Image.fromarray(np.arange(8, dtype=np.uint8).reshape(2, 4)).convert("P")
        image.putpalette(COLORS.tobytes())
        if kind.endswith("transparent"):
            image.info["transparency"] = bytes([0, 128, 255, 0, 7, 8, 9, 10])  # of each color
        return image, COLORS
    image = Image.fromarray(COLORS)
    alpha = Image.fromarray(255 - LEVELS)
    if kind == "1 bit":
        return Image.fromarray(LEVELS > 127), np.where(LEVELS > 127, 255, 0)
    if kind == "gray, transparent":
        return Image.merge("LA", [Image.fromarray(LEVELS), alpha]), LEVELS
    if kind == "transparent":
        image.putalpha(alpha)
        return image, COLORS
    if kind == "CMYK":
        return image.convert("CMYK"), COLORS
    if kind == "gray":
        return Image.fromarray(LEVELS), LEVELS
    assert kind == "color"
    return image, COLORS


KINDS = [
    "16 bits, repeated",
    "16 bits, shifted",
    "palette",
    "palette, transparent",
    "1 bit",
    "gray",
    "gray, transparent",
]
KINDS += ["color", "transparent", "CMYK"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_mode_of_image_in_a_folder_and_from_a_dataset(kind, tmp_path):
    image, wanted = image_of(kind)
    suffix = "tif" if kind == "CMYK" else "png"  # PNG has no inks
    for place in ("train/a/0", "train/a/1", "test/a/0"):
        path = tmp_path / f"{place}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    read = load("image_folder", tmp_path).test.images[0].numpy()
    assert np.array_equal(read, np.broadcast_to(wanted.reshape(2, 4, -1), (2, 4, 3)).transpose(2, 0, 1))

    with Image.open(tmp_path / f"test/a/0.{suffix}") as opened:
        for each in (image, opened):
            loaded = from_datasets([(each, 0), (each, 0)], [(each, 0)])
            assert np.array_equal(loaded.test.images[0].numpy(), wanted.reshape(2, 4, -1).transpose(2, 0, 1))


def test_sixteen_bits_in_mode_i_are_those_of_a_png(tmp_path):
    """As older versions of Pillow open them, and as every version opens a PGM."""
    path = tmp_path / "0.pgm"
    path.write_bytes(b"P5 4 2 65535\n" + (LEVELS.astype(">u2") * 257).tobytes())
    with Image.open(path) as image:
        assert image.mode == "I"
        assert np.array_equal(np.asarray(samples.eight_bits(image)), LEVELS)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_have_no_white(mode, tmp_path):
    for place in ("train/a/0.tif", "train/a/1.tif", "test/a/0.tif"):
        save_image(tmp_path / place, 70_000, mode=mode)
    with pytest.raises(
        ValueError, match=rf"0.tif: not a readable image \(must have 8 or 16 bits .* got 32 \(mode {mode}\)"
    ):
        load("image_folder", tmp_path)
    image = Image.new(mode, (6, 4), 70_000)
    with pytest.raises(ValueError, match=rf"train\[0\]: not a readable image .* got 32 \(mode {mode}\)"):
        from_datasets([(image, 0)], [(image, 0)])


def test_an_exif_orientation_turns_nothing(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    pixels = random_images(4, 6, 3)
    for place in ("train/a/0.png", "train/a/1.png", "test/a/0.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / place, exif=exif)
    assert np.array_equal(load("image_folder", tmp_path).test.images[0].numpy(), pixels.transpose(2, 0, 1))


# --- Datasets from Python


def pairs(*images, labels=None):
    return [(image, i % 2 if labels is None else labels[i]) for i, image in enumerate(images)]


def test_from_datasets_takes_every_kind_of_image():
    pixels = random_images(4, 3, 5, 6)
    as_uint8 = [torch.from_numpy(image) for image in pixels]
    as_float = [image.float() / 255 for image in as_uint8]
    as_array = [image.transpose(1, 2, 0) for image in pixels]
    as_pil = [Image.fromarray(image) for image in as_array]
    for images in (as_uint8, as_float, as_array, as_pil):
        loaded = from_datasets(pairs(*images), pairs(*images), classes=["a", "b"], val_fraction=0.5)
        assert np.array_equal(loaded.test.images.numpy(), pixels)
        assert loaded.classes == ("a", "b") and len(loaded.train) == len(loaded.val) == 2
    halves = [image.bfloat16() / 255 for image in as_uint8], [image.half() / 255 for image in as_uint8]
    for images, most in zip(halves, (1, 0), strict=True):  # bfloat16 has 8 bits of a value, float16 has 11
        read = from_datasets(pairs(*images), pairs(*images)).test.images.numpy()
        assert np.abs(read.astype(int) - pixels).max() <= most
    gray = [torch.zeros(5, 6, dtype=torch.uint8)] * 4
    assert from_datasets(pairs(*gray), pairs(*gray)).test.images.shape == (4, 1, 5, 6)


def test_from_datasets_takes_the_datasets_own_class_names():
    class Named(list):
        classes = ("x", "y", "z")

    images = [torch.zeros(1, 4, 4)] * 4
    assert from_datasets(Named(pairs(*images)), pairs(*images)).classes == ("x", "y", "z")
    assert from_datasets(pairs(*images), pairs(*images)).classes == ("0", "1")
    Named.classes = [7, 8]  # as some data sets have them
    assert from_datasets(Named(pairs(*images)), pairs(*images)).classes == ("7", "8")


LABELS = [
    2,
    2.0,
    np.int64(2),
    np.uint8(2),
    np.float32(2),
    np.array(2),
    np.array([2]),
    torch.tensor(2),
    torch.tensor([2]),
]
LABELS += [torch.tensor(2, dtype=torch.int16), torch.tensor([[2.0]]), torch.tensor(2.0, requires_grad=True)]


@pytest.mark.parametrize("label", LABELS, ids=repr)
def test_a_whole_label_of_any_type_is_taken(label):
    images = [torch.zeros(1, 4, 4)] * 2
    assert from_datasets([(x, label) for x in images], [(images[0], label)]).test.labels.tolist() == [2]


def test_labels_may_be_true_and_false():
    images = [torch.zeros(1, 4, 4)] * 4
    both = [False, np.bool_(True), torch.tensor(False), True]
    loaded = from_datasets(pairs(*images, labels=both), pairs(*images, labels=both))
    assert loaded.test.labels.tolist() == [0, 1, 0, 1]


NO_LABELS = [
    (1.7, ValueError, r"train\[1\]: the label must be a whole number, got 1.7"),
    (np.float32(0.5), ValueError, r"train\[1\]: the label must be a whole number, got 0.5"),
    (torch.tensor(0.5), ValueError, r"train\[1\]: the label must be a whole number, got 0.5"),
    (float("nan"), ValueError, r"train\[1\]: the label must be a whole number, got nan"),
    (float("inf"), ValueError, r"train\[1\]: the label must be a whole number, got inf"),
    ("1", TypeError, r"train\[1\]: the label must be a whole number, got str"),
    (np.str_("1"), TypeError, r"train\[1\]: the label must be a whole number, got str"),
    (None, TypeError, r"train\[1\]: the label must be a whole number, got NoneType"),
    ([1], TypeError, r"train\[1\]: the label must be a whole number, got list of 1"),
    (torch.tensor([0, 1]), TypeError, r"train\[1\]: the label must be one whole number, got Tensor of shape \[2\]"),
    (np.array([0, 1]), TypeError, r"train\[1\]: the label must be one whole number, got ndarray of shape \[2\]"),
    (torch.tensor([]), TypeError, r"train\[1\]: the label must be one whole number, got Tensor of shape \[0\]"),
    (-1, ValueError, r"train\[1\]: the label must be 0 or more, got -1"),
    (torch.tensor([-1.0]), ValueError, r"train\[1\]: the label must be 0 or more, got -1"),
]


@pytest.mark.parametrize("label, error, message", NO_LABELS, ids=range(len(NO_LABELS)))
def test_what_is_no_whole_label_is_named(label, error, message):
    with pytest.raises(error, match=message):
        from_datasets(pairs(ZERO, ZERO, labels=[0, label]), pairs(ZERO, ZERO))


ZERO = torch.zeros(1, 4, 4)
BAD_DATASETS = [
    ([], ValueError, "train must have at least one sample, got none"),
    (pairs(ZERO, ZERO[:, :3]), ValueError, r"train\[1\]: images must be of one size, \[1, 4, 4\] .*got \[1, 3, 4\]"),
    (pairs(ZERO - 1), ValueError, r"train\[0\]: a float image must be in \[0, 1\] .* got \[-1, -1\]"),
    (pairs(ZERO * float("nan")), ValueError, r"train\[0\]: a float image must be in \[0, 1\]"),
    (pairs(ZERO.long()), TypeError, r"train\[0\]: an image must be uint8, .* got int64"),
    (pairs(torch.zeros(8, 6, 3)), ValueError, r"train\[0\]: a tensor must have its channels first, got \[8, 6, 3\]"),
    (
        pairs(np.zeros((3, 6, 8), np.uint8)),
        ValueError,
        r"train\[0\]: an array must have its channels last, got \[3, 6, 8\]",
    ),
    ([(ZERO, 0, 1)], TypeError, r"train\[0\] must be a pair \(image, label\), got tuple of 3"),
    ([{"image": ZERO, "label": 0}], TypeError, r"train\[0\] must be a pair \(image, label\), got dict"),
    (pairs(np.zeros((6, 8), np.uint16)), TypeError, r"train\[0\]: an image must be uint8, .* got uint16"),
    (pairs(ZERO[0, 0]), ValueError, r"train\[0\]: an image must have 2 or 3 dimensions, got \[4\]"),
    (pairs(ZERO, ZERO, labels=[0, -1]), ValueError, r"train\[1\]: the label must be 0 or more, got -1"),
    (pairs(ZERO, ZERO, labels=[0, 5]), ValueError, r"at least 6 classes \(the largest label is 5\), got 2"),
    (pairs(ZERO, ZERO, labels=[0, 1]), ValueError, "must have a class with two training images"),
    (pairs(torch.zeros(3, 4, 4)), ValueError, r"test: images must be \[3, 4, 4\] like those of train, got \[1, 4, 4\]"),
]


@pytest.mark.parametrize("train, error, message", BAD_DATASETS, ids=range(len(BAD_DATASETS)))
def test_from_datasets_refuses(train, error, message):
    with pytest.raises(error, match=message):
        from_datasets(train, pairs(ZERO, ZERO), classes=["a", "b"])


def test_load_by_import_path(tmp_path, monkeypatch):
    (tmp_path / "sets_of_tests.py").write_text(
        "import torch\n"
        "def both(root=None):\n"
        "    shade = 1.0 if root is None else 0.0\n"
        "    return [(torch.full((1, 4, 4), shade), i % 2) for i in range(8)], [(torch.zeros(1, 4, 4), 0)]\n"
        "def one():\n    return [1]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    loaded = load("sets_of_tests:both", val_fraction=0.25)
    assert loaded.name == "sets_of_tests:both" and len(loaded.train) == 6 and loaded.train.images.max() == 255
    assert load("sets_of_tests:both", tmp_path).train.images.max() == 0
    with pytest.raises(TypeError, match=r"must return \(train Dataset, test Dataset\), got list"):
        load("sets_of_tests:one")
    sys.modules.pop("sets_of_tests")


# --- Loader


@pytest.fixture(scope="module")
def colored():
    """23 images of 3x16x16 and labels, as all three splits."""
    images = ImageSet(torch.from_numpy(random_images(23, 3, 16, 16)), torch.arange(23) % 5)
    return ImageData("colored", images, images, images, tuple("abcde"), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def test_batches_cover_the_split_once_in_order(colored):
    loader = Loader(colored.test, colored, 5)
    batches = list(loader)
    assert len(loader) == len(batches) == 5 and [len(batch.labels) for batch in batches] == [5, 5, 5, 5, 3]
    assert torch.cat([batch.index for batch in batches]).tolist() == [*range(23)]
    assert torch.equal(torch.cat([batch.labels for batch in batches]), colored.test.labels)


def test_images_are_normalized_per_channel(colored):
    images = torch.cat([batch.images for batch in Loader(colored.test, colored, 5)])
    wanted = colored.test.images.double() / 255
    wanted -= torch.tensor([0.5, 0.4, 0.3], dtype=torch.float64).view(3, 1, 1)
    wanted /= torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64).view(3, 1, 1)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images.double(), wanted, rtol=1e-6, atol=1e-6)


def test_index_is_the_position_in_the_split(colored):
    for batch in Loader(colored.train, colored, 5, shuffle=True):
        assert torch.equal(batch.labels, colored.train.labels[batch.index])
        plain = next(iter(Loader(colored.train, colored, 23))).images
        assert torch.equal(batch.images, plain[batch.index])


def test_drop_last_drops_the_smaller_batch(colored):
    loader = Loader(colored.train, colored, 5, shuffle=True, drop_last=True)
    batches = list(loader)
    assert len(loader) == len(batches) == 4 and all(len(batch.labels) == 5 for batch in batches)


def same(a, b):
    return all(torch.equal(getattr(a, key), getattr(b, key)) for key in ("index", "images", "labels"))


def test_an_epoch_is_a_pure_function_of_seed_and_epoch(colored):
    def loader(seed=1):
        return Loader(colored.train, colored, 4, shuffle=True, augment=True, seed=seed)

    first = loader()
    first.set_epoch(3)
    wanted = list(first)
    assert sorted(torch.cat([batch.index for batch in wanted]).tolist()) == [*range(23)]

    torch.manual_seed(99)  # neither the global generator nor what was drawn before matters
    resumed = loader()
    for epoch in (5, 3):
        resumed.set_epoch(epoch)
        next(iter(resumed))
    assert all(same(a, b) for a, b in zip(resumed, wanted, strict=True))

    for other in (loader(), loader(seed=2)):
        other.set_epoch(4 if other.seed == 1 else 3)
        assert not any(torch.equal(a.index, b.index) for a, b in zip(other, wanted, strict=True))
        assert not any(torch.equal(a.images, b.images) for a, b in zip(other, wanted, strict=True))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("augment", [False, True])
def test_the_slices_of_all_ranks_are_the_batch_of_one_process(colored, world_size, augment):
    options = {"shuffle": True, "augment": augment, "seed": 7}
    whole = list(Loader(colored.train, colored, 6, **options))
    ranks = [
        list(Loader(colored.train, colored, 6, **options, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    for number, batch in enumerate(whole):
        parts = [batches[number] for batches in ranks]
        joined = Batch(*(torch.cat([getattr(p, k) for p in parts]) for k in ("index", "images", "labels")))
        assert same(joined, batch)
        if number < 3:
            assert [len(part.labels) for part in parts] == [6 // world_size] * world_size
    assert all(len(batches) == len(whole) == 4 for batches in ranks)  # 23 = 6 + 6 + 6 + 5


def test_a_last_batch_smaller_than_the_world_leaves_some_ranks_empty(colored):
    last = [list(Loader(colored.train, colored, 22, rank=rank, world_size=2))[-1] for rank in range(2)]
    assert sorted(len(batch.labels) for batch in last) == [0, 1]
    assert last[0].images.shape[1:] == last[1].images.shape[1:] == (3, 16, 16)


LOADER_ERRORS = [
    ({"batch_size": 5, "world_size": 2}, "multiple of world_size, got 5 over 2 processes"),
    ({"batch_size": 0}, "multiple of world_size, got 0"),
    ({"batch_size": 4, "world_size": 2, "rank": 2}, r"rank must be in \[0, 2\), got 2"),
    ({"batch_size": 24, "drop_last": True}, "23 images make no batch of 24 with drop_last"),
]


@pytest.mark.parametrize("options, message", LOADER_ERRORS)
def test_loader_refuses(colored, options, message):
    with pytest.raises(ValueError, match=message):
        Loader(colored.train, colored, **options)


def test_loader_refuses_an_empty_split(colored):
    empty = ImageSet(colored.train.images[:0], colored.train.labels[:0])
    with pytest.raises(ValueError, match="0 images make no batch of 4"):
        Loader(empty, colored, 4)


# --- augmentation


def test_flip_and_crop_by_hand():
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)  # padded by 1 on each side
    image[0, 0, 0, 0], image[0, 0, 7, 6], image[0, 0, 3, 4] = 1, 2, 3
    images, keep, flip = image.expand(4, 1, 8, 8), torch.tensor([False]), torch.tensor([True])
    offsets = torch.tensor([[1, 1], [1, 1], [0, 2], [2, 0]])  # the window's corner: [1, 1] is the image itself
    out = flip_and_crop(images, torch.cat([keep, flip, keep, flip]), offsets)[:, 0]
    assert torch.equal(out[0], image[0, 0])
    assert torch.equal(out[1], image[0, 0].flip(-1))
    moved = torch.zeros(8, 8, dtype=torch.uint8)  # one row down, one column left: pixels 1 and 2 leave the window
    moved[4, 3] = 3
    assert torch.equal(out[2], moved)
    mirrored = torch.zeros(8, 8, dtype=torch.uint8)  # mirrored, then one row up, one column right
    mirrored[6, 2], mirrored[2, 4] = 2, 3
    assert torch.equal(out[3], mirrored)


def test_padding_follows_each_side():
    images = torch.full((1, 2, 16, 32), 9, dtype=torch.uint8)
    out = flip_and_crop(images, torch.tensor([False]), torch.tensor([[0, 0]]))
    assert (out[0, :, :2] == 0).all() and (out[0, :, :, :4] == 0).all() and (out[0, :, 2:, 4:] == 9).all()


def test_the_loader_draws_every_flip_and_offset():
    corner = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    corner[0, 0, 7, 5] = 255  # stays in every window
    split = ImageSet(corner.expand(2000, 1, 16, 16), torch.zeros(2000, dtype=torch.int64))
    all_data = ImageData("corner", split, split, split, ("a",), (0.0,), (1.0,))
    counts = torch.zeros(16, 16)
    for batch in Loader(split, all_data, 500, augment=True):
        counts += batch.images.sum(dim=(0, 1))
    wanted = torch.zeros(16, 16)
    for column in (5, 10):  # as it is, and mirrored; moved by -2 to 2 in both directions
        wanted[5:10, column - 2 : column + 3] += 2000 / 50
    assert ((counts > 0) == (wanted > 0)).all()
    assert (counts - wanted).abs().max() < 5 * 40**0.5
    assert abs(counts[:, :8].sum() - 1000) < 5 * 500**0.5  # as it is: half of them


def test_augmentation_pads_with_black_before_normalizing(colored):
    white = ImageSet(torch.full((64, 3, 16, 16), 255, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64))
    batch = next(iter(Loader(white, colored, 64, augment=True)))
    values = sorted({round(value, 4) for value in batch.images[:, 0].flatten().tolist()})
    assert values == [-2.5, 2.5]  # (0 - 0.5) / 0.2 and (1 - 0.5) / 0.2
    assert (white.images == 255).all()


def test_to_moves_every_split():
    moved = load("digits").to("meta")
    assert {split.images.device.type for split in (moved.train, moved.val, moved.test)} == {"meta"}
    assert moved.train.labels.device.type == "meta"
