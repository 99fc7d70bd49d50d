"""Who trains on what: shares of the images, labels that a student may not use, and domains that a teacher knows alone.

`data.share` of a data set's training images are the teachers' (ImageData.teaching, as they are in the files), and `data.student_share`
of these the students' (ImageData.train). Students may use `data.labeled_share` of their labels, drawn anew for each seed of a
student. A label y that is hidden is stored as ~y, that is -1 - y: what learns sees IGNORED in its place, and only an oracle looks
behind it. With `data.domains` the images of validation, of test and of the training set are shown in these, one after the other;
a teacher with a domain of its own sees all of its images in that one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..config.schema import ConfigError, DataConfig, TeacherConfig
from .images import ImageData, ImageSet, random_stream
from .readers import stratified

IGNORED = -100  # in place of a hidden label, for every loss
TEACHING, STUDENTS, LABELS, SHUFFLED, NOISE = range(5)  # told apart in the seeds of draws


def rotated(images: Tensor) -> Tensor:
    if images.shape[2] != images.shape[3]:
        wanted = f"square for the domain rotated, got {images.shape[2]} x {images.shape[3]}"
        raise ConfigError(f"config: data.domains: images must be {wanted}")
    return images.rot90(1, (2, 3))


def noisy(images: Tensor) -> Tensor:
    """With normal noise of a fifth of the range, the same for each place in the split."""
    drawn = torch.randn(images.shape, generator=random_stream(0, NOISE), dtype=torch.float32, device="cpu")
    return (images + 51 * drawn.to(images.device)).clamp(0, 255).round().to(torch.uint8)


# By name, of uint8 images [N, C, H, W].
DOMAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "upright": lambda images: images,
    "rotated": rotated,  # by a quarter, against the clock
    "inverted": lambda images: 255 - images,
    "noisy": noisy,
}


def known(labels: Tensor) -> Tensor:
    """Labels as a student may see them."""
    return torch.where(labels >= 0, labels, IGNORED)


def truth(labels: Tensor) -> Tensor:
    """Every label, hidden or not."""
    return torch.where(labels >= 0, labels, ~labels)


def divided(data: ImageData, config: DataConfig, seed: int) -> ImageData:
    """The data with the teachers' part, the students', and its domains."""
    check_domains(config.domains)
    teaching = part(data.train, config.share, (seed, TEACHING))
    train, val, test = (in_domains(split, config.domains) for split in (teaching, data.val, data.test))
    return replace(
        data, train=part(train, config.student_share, (seed, STUDENTS)), val=val, test=test, teaching=teaching
    )


def check_domains(domains: Sequence[str]) -> None:
    if strange := [name for name in domains if name not in DOMAINS or domains.count(name) > 1]:
        wanted = f"different ones of {', '.join(DOMAINS)}"
        raise ConfigError(f"config: data.domains must be {wanted}, got {strange[0]!r} in {domains}")


def in_domains(split: ImageSet, domains: Sequence[str]) -> ImageSet:
    """Image i in the domain i modulo their number."""
    if not domains:
        return split
    images = split.images.clone()
    for first, name in enumerate(domains):
        images[first :: len(domains)] = DOMAINS[name](split.images[first :: len(domains)])
    return ImageSet(images, split.labels)


def part(split: ImageSet, share: float | None, seeds: Sequence[int]) -> ImageSet:
    """This share of every class, in the split's order."""
    return split if share is None else split.at(drawn_places(split, share, seeds))


def drawn_places(split: ImageSet, share: float, seeds: Sequence[int]) -> Tensor:
    """The places of this share of every class, ascending."""
    chosen, _ = stratified(split.labels.cpu().numpy(), share, seeds)
    return torch.from_numpy(chosen).to(split.labels.device)


def of_teacher(data: ImageData, teacher: TeacherConfig, domains: Sequence[str], seed: int) -> ImageData:
    """The data as a teacher trains on it: the images of its classes, all of them in its domain, and with `shuffled_labels`
    each label that of another image. Validation and test stay whole."""
    train, count = data.train if data.teaching is None else data.teaching, data.num_classes
    if teacher.domain is not None:
        train = replace(train, images=DOMAINS[teacher.domain](train.images))
    elif data.teaching is not None:
        train = in_domains(train, domains)
    if teacher.classes is not None:
        classes = teacher.classes
        if not classes or not all(0 <= label < count for label in classes):
            raise ConfigError(f"config: teachers.classes must be labels in [0, {count}), got {list(classes)}")
        train = train.at(torch.isin(train.labels, torch.tensor(classes, dtype=torch.int64, device=train.labels.device)))
    if teacher.shuffled_labels:
        order = torch.randperm(len(train), generator=random_stream(seed, SHUFFLED), dtype=torch.int64, device="cpu")
        train = replace(train, labels=train.labels[order.to(train.labels.device)])
    return replace(data, train=train)


def of_student(data: ImageData, labeled: float | None, seed: int, *, alone: bool) -> ImageData:
    """The data as a student trains on it: only this share of the labels known. `alone`, without teachers, there is nothing to
    learn from the other images: those with a label, over and over, make an epoch as long."""
    if labeled is None:
        return data
    train, places = data.train, drawn_places(data.train, labeled, (seed, LABELS))
    if len(places) == 0:
        wanted = f"enough for a label of one class, of {len(train)} images"
        raise ConfigError(f"config: data.labeled_share must be {wanted}, got {labeled}")
    if alone:
        return replace(data, train=train.at(repeated(places, len(train))))
    labels = ~train.labels
    labels[places] = train.labels[places]
    return replace(data, train=replace(train, labels=labels))


def repeated(places: Tensor, count: int) -> Tensor:
    """These places over and over, `count` in all. What is left of the last time is spread over all of them: a data set may be
    sorted by class."""
    rest = count % len(places)
    spread = torch.arange(rest, dtype=torch.int64, device=places.device) * len(places) // max(1, rest)
    return torch.cat([places.repeat(count // len(places)), places[spread]])
