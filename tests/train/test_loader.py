"""The batches of the Loader, and augmentation."""

import pytest
import torch
from small_images import random_images

from amtml_fast.train.data.images import Batch, ImageData, ImageSet, Loader, flip_and_crop, load

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
