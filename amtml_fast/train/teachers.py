"""The frozen teachers: in eval mode, without gradients, their training outputs computed once where possible."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from . import data as datasets
from . import workers, zoo
from .config import Config, ConfigError, TeacherConfig
from .features import FeatureExtractor
from .models import build
from .progress import Display
from .run import RunError
from .zoo import brings_weights

EVAL_BATCH = 512
HINT = "hint"


@dataclass
class Outputs:
    """Outputs of one or more teachers for the same images."""

    logits: list[Tensor]  # T x [N, C] float32
    maps: list[Tensor]  # T x [N, c_t, h_t, w_t]; empty without hints


@dataclass
class Teachers:
    """T frozen teachers; `scores` are validation accuracies, what `best_high` sorts them by."""

    names: list[str]
    models: list[FeatureExtractor]
    scores: list[float]
    channels: list[int]  # of the hint maps; empty without hints
    parameters: list[int]
    cache: Outputs | None = field(default=None)  # of the whole training split

    def only(self, names: Sequence[str], *, hints: bool) -> Teachers:
        """These of the teachers, in this order, sharing models and cache; without their hint maps if not `hints`."""
        chosen = [self.names.index(name) for name in names]
        cache = None
        if self.cache is not None:
            maps = [self.cache.maps[i] for i in chosen] if hints and self.cache.maps else []
            cache = Outputs([self.cache.logits[i] for i in chosen], maps)
        return Teachers(
            list(names),
            [self.models[i] for i in chosen],
            [self.scores[i] for i in chosen],
            [self.channels[i] for i in chosen] if hints and self.channels else [],
            [self.parameters[i] for i in chosen],
            cache,
        )

    @torch.no_grad()
    def live(self, images: Tensor) -> Outputs:
        """The teachers run on `images` [n, C, H, W]."""
        logits, maps = [], []
        for model in self.models:
            out, caught = model(images)
            logits.append(out.float())
            if HINT in caught:
                maps.append(caught[HINT].float())
        return Outputs(logits, maps)

    def outputs(self, batch: datasets.Batch) -> Outputs:
        """Outputs for a batch of the training split: looked up by index if cached, else computed."""
        if self.cache is None:
            return self.live(batch.images)
        logits = [whole[batch.index] for whole in self.cache.logits]
        return Outputs(logits, [whole[batch.index] for whole in self.cache.maps])

    def fill_cache(self, data: datasets.ImageData, display: Display) -> None:
        """Runs every teacher once over the training split and keeps the outputs on the images' device."""
        self.cache = self.collect(data.train, data, display)

    def collect(self, split: datasets.ImageSet, data: datasets.ImageData, display: Display) -> Outputs:
        """Outputs for a whole split, in its order."""
        n, whole = len(split.labels), Outputs([], [])
        with display.bar("teacher outputs", n) as bar:
            for batch in datasets.Loader(split, data, EVAL_BATCH):
                part = self.live(batch.images)
                for kept, new in ((whole.logits, part.logits), (whole.maps, part.maps)):
                    if not kept:
                        kept += [x.new_empty(n, *x.shape[1:]) for x in new]
                    for all_rows, rows in zip(kept, new, strict=True):
                        all_rows[batch.index] = rows
                bar.add(len(batch.labels))
        return whole


def weights_file(config: Config, teacher: TeacherConfig) -> Path | None:
    """The teacher's own weights if the configuration names some, None if a library has them, else what `teach` writes."""
    if teacher.model.weights is not None:
        return Path(teacher.model.weights)
    if brings_weights(teacher.model):
        return None
    return config.folder / "teachers" / teacher.name / "model.safetensors"


def fingerprint(config: Config) -> dict[str, str]:
    """SHA-256 of each teacher's weights, and its own input statistics: what a distilled student depends on."""
    found = {}
    for teacher in config.teachers:
        path, model = weights_file(config, teacher), teacher.model
        if path is not None and not path.is_file():
            raise RunError(missing(teacher, path))
        digest = sha256(path) if path is not None else zoo.fingerprint(model.factory, model.args)
        found[teacher.name] = digest if model.mean is None else f"{digest}, mean {model.mean}, std {model.std}"
    return found


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def missing(teacher: TeacherConfig, path: Path) -> str:
    what = "there is no such file" if teacher.model.weights else "it is not trained yet; run `amtml-fast teach` first"
    return f"teacher {teacher.name!r}: looked for {path}: {what}"


def load(config: Config, data: datasets.ImageData, *, hints: bool, channels_last: bool = False) -> Teachers:
    """Every teacher of the configuration on the data's device, frozen, with its validation accuracy."""
    if not config.teachers:
        raise ConfigError("config: teachers: at least one teacher wanted for this method, got none")
    device = data.train.images.device
    models = []
    for teacher in config.teachers:
        if hints and teacher.hint is None:
            raise ConfigError(
                f"config: teachers.{teacher.name}.hint: the dotted path of the module whose output is the hint wanted, "
                "got null; or set loss.hint_weight=0"
            )
        model = _model(config, teacher, data)
        extractor = FeatureExtractor(model, {HINT: teacher.hint} if hints and teacher.hint else {})
        memory = torch.channels_last if channels_last else torch.contiguous_format
        extractor.to(device, memory_format=memory)  # type: ignore[call-overload]
        models.append(extractor.eval().requires_grad_(False))
    return assemble([teacher.name for teacher in config.teachers], models, data)


def _model(config: Config, teacher: TeacherConfig, data: datasets.ImageData) -> nn.Module:
    """The teacher's net with its weights, made to take the data's images where it was trained on images normalised by
    other statistics: those of the configuration, or those that a net with weights from elsewhere carries itself."""
    path, own = weights_file(config, teacher), teacher.model
    if path is not None and not path.is_file():
        raise RunError(missing(teacher, path))
    classes, channels = len(data.classes), data.train.images.shape[1]
    model = build(own.factory, dict(own.args), num_classes=classes, in_channels=channels, weights=path)
    if own.mean is not None and own.std is not None:
        zoo.renormalise(model, (data.mean, data.std), (own.mean, own.std))
    elif brings_weights(own) and (said := zoo.statistics(model)) is not None:
        zoo.renormalise(model, (data.mean, data.std), said)
    return model


def assemble(names: Sequence[str], models: Sequence[FeatureExtractor], data: datasets.ImageData) -> Teachers:
    """Teachers from ready extractors: checks their class count and measures them on the validation split."""
    parameters = [sum(p.numel() for p in model.parameters()) for model in models]
    teachers = Teachers(list(names), list(models), [], [], parameters)
    probe = next(iter(datasets.Loader(data.val, data, 2)))
    first = teachers.live(probe.images)
    for name, logits in zip(names, first.logits, strict=True):
        if logits.ndim != 2 or logits.shape[1] != len(data.classes):
            raise ValueError(
                f"teacher {name!r}: {len(data.classes)} classes wanted, those of {data.name} and of the student; "
                f"got logits of shape {[*logits.shape]} for {len(probe.labels)} images"
            )
    teachers.channels = [int(x.shape[1]) for x in first.maps]
    teachers.scores = [accuracy(model, data.val, data) for model in models]
    return teachers


def accuracy(model: FeatureExtractor, split: datasets.ImageSet, data: datasets.ImageData) -> float:
    """Fraction of `split` that the model gets right, in eval mode; the mode is put back."""
    return right(model, split, data).item() / max(1, len(split))


@torch.no_grad()
def right(
    model: FeatureExtractor, split: datasets.ImageSet, data: datasets.ImageData, *, rank: int = 0, world_size: int = 1
) -> Tensor:
    """How many images of this process's share of `split` the model gets right, a 0-d tensor."""
    was_training = model.training
    model.eval()
    count = torch.zeros((), dtype=torch.int64, device=split.labels.device)
    # What is compiled is compiled for the training's batches.
    with torch.compiler.set_stance("force_eager"):
        for batch in datasets.Loader(split, data, EVAL_BATCH * world_size, rank=rank, world_size=world_size):
            if len(batch.labels):
                count += (model(batch.images)[0].argmax(1) == batch.labels).sum()
    model.train(was_training)
    return count


def wants_cache(config: Config, teachers: Teachers, data: datasets.ImageData, display: Display) -> bool:
    """Whether to keep the teachers' outputs: `auto` does if images never change and the outputs fit into memory."""
    if config.cache_teachers == "never":
        return False
    if config.cache_teachers == "always":
        if config.data.augment:
            raise ConfigError(
                "config: cache_teachers=always needs data.augment=false: augmented images change each epoch"
            )
        return True
    if config.data.augment:
        return False
    one = teachers.live(next(iter(datasets.Loader(data.val, data, 1))).images)
    size = sum(x.numel() * x.element_size() for x in (*one.logits, *one.maps)) * len(data.train.labels)
    free = free_memory(data.train.images.device)
    if free is not None and data.train.images.device.type == "cpu":
        free //= workers.count(config)  # each of them looks at the same memory
    if free is not None and size > free // 2:
        display.warn(
            f"the teachers' outputs would take {size / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free; "
            "computing them in each step instead (cache_teachers=always to insist)"
        )
        return False
    return True


def free_memory(device: torch.device) -> int | None:
    """Free bytes on the device, None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
