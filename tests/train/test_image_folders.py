"""Folders of images, one a class, and Tiny-ImageNet's."""

import numpy as np
import pytest
import torch
from PIL import Image
from small_images import random_images, save_image

from amtml_fast.train.data.images import load


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


@pytest.mark.parametrize("target", [".", "../..", "../dog"])
def test_a_link_that_leads_back_is_named(folder, target):
    """Its images counted 40 times, and behind .. those of other classes, too."""
    save_image(folder / "train" / "cat" / "deep" / "5.png", 0)
    if target == "../dog":
        (folder / "train" / "dog" / "back").symlink_to("../cat/deep")
        load("image_folder", folder)  # no harm, unless that leads back
        target = "../../dog"
    (folder / "train" / "cat" / "deep" / "link").symlink_to(target)
    with pytest.raises(
        ValueError, match=r"link.*: a link must not lead back to a folder above it, got one to .*/train/"
    ):
        load("image_folder", folder)


def test_an_image_of_a_size_that_cannot_be_is_named(folder):
    """Pillow's error for it is of a class of its own."""
    file = folder / "train" / "cat" / "5.bmp"
    save_image(file, 0)
    content = bytearray(file.read_bytes())
    content[18:26] = 2 * (100_000).to_bytes(4, "little")
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"5\.bmp: not a readable image \(Image size \(10000000000 pixels\)"):
        load("image_folder", folder)


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
