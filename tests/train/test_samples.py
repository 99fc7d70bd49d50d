"""Images of every mode, and Datasets from Python."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from small_images import random_images, save_image

from amtml_fast.train.data import samples
from amtml_fast.train.data.images import from_datasets, load

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
    for classes, kind in ((2, "int"), ("ab", "str"), (len, "builtin_function_or_method")):
        Named.classes = classes
        with pytest.raises(
            TypeError, match=f"classes: must be the classes' names in the order of the labels, got {kind}"
        ):
            from_datasets(Named(pairs(*images)), pairs(*images))
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


@pytest.mark.parametrize(
    ("train", "test", "got"),
    [
        ([1, 2, 1, 2], [1, 2], "2, must have an image, got none of class 0"),
        ([0, 0, 2, 2], [0], "2, must have an image, got none of class 1"),
        ([0, 1, 0, 1], [3], "3, must have an image, got none of class 2"),
        ([0, 0, 10**12, 10**12], [0], "1000000000000, must have an image, got none of class 1"),
    ],
)
def test_labels_that_leave_a_class_without_a_training_image_are_named(train, test, got):
    """Those from 1 on made a class more, and numbers that are no labels as many as memory takes."""

    def of(labels):
        return pairs(*(ZERO for _ in labels), labels=labels)

    with pytest.raises(ValueError, match=rf"^train: each class up to the largest label of train and test, {got}; if"):
        from_datasets(of(train), of(test))
    if max(train) < 4:
        assert from_datasets(of(train), of(test), classes=list("abcd")).num_classes == 4


@pytest.mark.parametrize("label", LABELS, ids=repr)
def test_a_whole_label_of_any_type_is_taken(label):
    images = [torch.zeros(1, 4, 4)] * 2
    loaded = from_datasets([(x, label) for x in images], [(images[0], label)], classes="a b c".split())
    assert loaded.test.labels.tolist() == [2]


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


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(pairs(ZERO))

    def __len__(self):
        return 1


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
    (
        iter(pairs(ZERO)),
        TypeError,
        r"train must be a Dataset with a length and an index \(no stream\), got list_iterator",
    ),
    (Stream(), TypeError, r"train must be a Dataset with a length and an index \(no stream\), got Stream"),
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
