"""The frozen teachers: in eval mode, without gradients, their training outputs kept on the disk where possible."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config.schema import Config, ConfigError, TeacherConfig
from ..data.images import Batch, ImageData, Loader, random_stream
from ..data.parts import known
from ..files import RunError, sha256
from ..models import zoo
from ..models.compiling import as_constants, compile_in_place
from ..models.evaluate import EVAL_BATCH, accuracy
from ..models.features import FeatureExtractor
from ..models.folding import fold
from ..models.layout import memory_format
from ..models.networks import build
from ..models.probe import MAP, check_map, maps
from .store import Storage, Store

HINT = "hint"
SAMPLE = 20_000  # images at most, for a method that looks at the teachers' outputs before the training
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by engine.mixed_precision


@dataclass
class Outputs:
    """Outputs of one or more teachers for the same images."""

    logits: list[Tensor]  # T x [N, C] float32
    maps: list[Tensor]  # T x [N, c_t, h_t, w_t]; empty without hints


class Kept(NamedTuple):
    """Stored outputs of all training images, one version."""

    logits: list[Store]
    maps: list[Store]  # empty: not kept

    def of(self, i: int) -> list[Store]:
        """What is kept of one teacher."""
        return [self.logits[i], *self.maps[i : i + 1]]


class Kinds(NamedTuple):
    logits: Storage = Storage()
    maps: Storage = Storage()


@dataclass
class Teachers:
    """T frozen teachers; `scores` are validation accuracies, what `best_high` sorts them by."""

    names: list[str]
    models: list[FeatureExtractor]
    scores: list[float]
    channels: list[int]  # of the hint maps; empty without hints
    parameters: list[int]
    precision: torch.dtype | None = None  # they run under autocast to it; None: in float32
    kinds: Kinds = field(default_factory=Kinds)  # how outputs are kept, and so what a student gets to see of them
    cache: dict[int | None, Kept] = field(default_factory=dict)  # by Batch.view; what is not in it is computed
    compiled: bool = False  # in the steps of a training
    # By name, the copies that run in the steps; each is made when it first runs.
    fast: dict[str, FeatureExtractor] = field(default_factory=dict)

    def only(self, names: Sequence[str], *, hints: bool) -> Teachers:
        """These of the teachers, in this order, sharing models and cache; without their hint maps if not `hints`."""
        chosen = [self.names.index(name) for name in names]
        cache = {
            view: Kept([kept.logits[i] for i in chosen], [kept.maps[i] for i in chosen] if hints and kept.maps else [])
            for view, kept in self.cache.items()
        }
        return replace(
            self,
            names=list(names),
            models=[self.models[i] for i in chosen],
            scores=[self.scores[i] for i in chosen],
            channels=[self.channels[i] for i in chosen] if hints and self.channels else [],
            parameters=[self.parameters[i] for i in chosen],
            cache=cache,
        )

    def live(self, images: Tensor) -> Outputs:
        """The teachers run on any number of `images` [n, C, H, W], as they are."""
        return self._outputs(images, [model.forward for model in self.models])

    def run(self, images: Tensor) -> Outputs:
        """The teachers run on a batch of the training: by copies that are faster and right to rounding."""
        for name, model in zip(self.names, self.models, strict=True):
            if name not in self.fast:
                self.fast[name] = faster(model, compiled=self.compiled)
        with as_constants() if self.compiled and images.device.type == "cpu" else nullcontext():
            return self._outputs(images, [self.fast[name] for name in self.names])

    def _outputs(self, images: Tensor, teachers: Sequence[Callable[[Tensor], Any]]) -> Outputs:
        outputs = []
        with (
            torch.inference_mode(),
            torch.autocast(images.device.type, self.precision, enabled=self.precision is not None),
        ):
            for teacher in teachers:
                logits, caught = teacher(images)
                outputs.append((logits, caught.get(HINT)))
        return Outputs([_ordinary(x) for x, _ in outputs], [_ordinary(x) for _, x in outputs if x is not None])

    def outputs(self, batch: Batch) -> Outputs:
        """Outputs for a batch of the training split: looked up if they are kept, else computed, and rounded alike."""
        return self.looked_up(batch.view, batch.index) or self.computed(batch.images)

    def looked_up(self, view: int | None, index: Tensor, on_host: Tensor | None = None) -> Outputs | None:
        """What is kept for these images of a version; None where nothing is. on_host: the index on the CPU, without which
        a lookup on the disk waits for the device."""
        kept = self.cache.get(view)
        if kept is None or (self.channels and not kept.maps):
            return None
        return Outputs(*([store.rows(index, on_host) for store in stores] for stores in kept))

    def computed(self, images: Tensor) -> Outputs:
        """The teachers run on a batch of the training, their outputs rounded as kept ones are."""
        return self.rounded(self.run(images))

    def rounded(self, live: Outputs) -> Outputs:
        """As kept ones are."""
        logits, maps = self.kinds
        return Outputs([logits.through(x) for x in live.logits], [maps.through(x) for x in live.maps])


def sample(teachers: Teachers, data: ImageData) -> tuple[list[Tensor], Tensor]:
    """The teachers' logits for training images as they are, T x [n, C], and the labels [n] that students may know: of all images,
    or of SAMPLE at random, those with a label first."""
    split, labels = data.train, known(data.train.labels)
    mixed = torch.randperm(len(split), generator=random_stream(SAMPLE), dtype=torch.int64, device="cpu")
    order = mixed.to(labels.device)  # a data set may be sorted by class
    order = order[(labels[order] < 0).to(torch.int8).argsort(stable=True)]
    chosen = order[:SAMPLE].sort().values
    shown = Loader(split.at(chosen), data, EVAL_BATCH)
    logits = []
    for place, batch in zip(chosen.split(EVAL_BATCH), shown, strict=True):
        kept = teachers.looked_up(0, place, place.cpu())
        logits.append(kept.logits if kept is not None else teachers.rounded(teachers.live(batch.images)).logits)
    return [torch.cat(each) for each in zip(*logits, strict=True)], labels[chosen]


def _ordinary(x: Tensor) -> Tensor:
    """As float32 and as a normal tensor: autograd cannot save inference-mode tensors."""
    return x.clone() if x.dtype == torch.float32 else x.float()


def faster(model: FeatureExtractor, *, compiled: bool) -> FeatureExtractor:
    """A copy with BatchNorm folded into the convolutions, and compiled if asked. What is kept is of the net as it is."""
    model = copy.deepcopy(model)
    fold(model.model)
    if compiled:
        compile_in_place(model)
    return model


def weights_file(config: Config, teacher: TeacherConfig) -> Path | None:
    """The teacher's own weights if the configuration names some, None if a library has them, else what `teach` writes."""
    if teacher.model.weights is not None:
        return Path(teacher.model.weights)
    if teacher.model.brings_weights:
        return None
    return config.teacher_folder(teacher.name) / "model.safetensors"


def existing_weights(config: Config, teacher: TeacherConfig) -> Path | None:
    """The same file; RunError where it is not there."""
    path = weights_file(config, teacher)
    if path is not None and not path.is_file():
        what = (
            "there is no such file" if teacher.model.weights else "it is not trained yet; run `amtml-fast teach` first"
        )
        raise RunError(f"teacher {teacher.name!r}: looked for {path}: {what}")
    return path


def fingerprint(config: Config) -> dict[str, str]:
    """SHA-256 of each teacher's weights, and its own input statistics: what a distilled student depends on."""
    found = {}
    for teacher in config.teachers:
        path, model = existing_weights(config, teacher), teacher.model
        digest = sha256(path) if path is not None else zoo.fingerprint(model.factory, model.args)
        found[teacher.name] = digest if model.mean is None else f"{digest}, mean {model.mean}, std {model.std}"
    return found


def load(config: Config, data: ImageData, *, hints: bool) -> Teachers:
    """Every teacher of the configuration on the data's device, frozen, with its validation accuracy."""
    if not config.teachers:
        raise ConfigError("config: teachers must hold at least one for this method, got none")
    device = data.train.images.device
    models = []
    for teacher in config.teachers:
        net = extractor(config, teacher, data, hints=hints)
        memory = memory_format(config.engine.channels_last, data.train.images.shape)
        net.to(device, memory_format=memory)  # type: ignore[call-overload]
        models.append(net.eval().requires_grad_(False))
    teachers = assemble([teacher.name for teacher in config.teachers], models, data)
    teachers.compiled = config.engine.compile
    teachers.precision = PRECISIONS.get(config.engine.mixed_precision)
    hint_storage = Storage() if config.cache.hints == "never" else Storage(config.cache.hints)
    teachers.kinds = Kinds(Storage(config.cache.logits), hint_storage)
    return teachers


def check(config: Config, data: ImageData, *, hints: bool) -> None:
    """That every teacher fits the data and has the module of its hint, before those are trained that will be."""
    for teacher in config.teachers:
        teacher_maps(extractor(config, teacher, data, hints=hints, untrained=True), teacher.name, data)


def extractor(
    config: Config, teacher: TeacherConfig, data: ImageData, *, hints: bool, untrained: bool = False
) -> FeatureExtractor:
    """The teacher's net with its weights; untrained: one that `teach` trains has random ones. It is made to take the data's
    images where it was trained on images normalized by other statistics: those of the configuration, or those that a net
    with weights from elsewhere carries itself."""
    if hints and teacher.hint is None:
        raise ConfigError(
            f"config: teachers.{teacher.name}.hint must be the dotted path of the module whose output is the hint, "
            "got null; or set loss.hint_weight=0"
        )
    own = teacher.model
    path = None if untrained and not own.brings_weights else existing_weights(config, teacher)
    model = build(own.factory, own.args, num_classes=data.num_classes, in_channels=data.in_channels, weights=path)
    if own.mean is not None and own.std is not None:
        zoo.renormalize(model, (data.mean, data.std), (own.mean, own.std))
    elif own.brings_weights and (said := zoo.statistics(model)) is not None:
        zoo.renormalize(model, (data.mean, data.std), said)
    return FeatureExtractor(model, {HINT: teacher.hint} if hints and teacher.hint else {})


def teacher_maps(model: FeatureExtractor, name: str, data: ImageData) -> dict[str, Tensor]:
    """The hint map that is caught, of two images. ConfigError for what is no map."""
    caught = maps(model, f"teacher {name!r}", data, modes=(False,))
    for key, path in model.paths.items():
        check_map(f"teachers.{name}.{key}", path, caught[key], MAP)
    return caught


def assemble(names: Sequence[str], models: Sequence[FeatureExtractor], data: ImageData) -> Teachers:
    """Teachers from ready extractors: checks their class count and measures them on the validation split."""
    parameters = [sum(p.numel() for p in model.parameters()) for model in models]
    hints = [teacher_maps(model, name, data) for name, model in zip(names, models, strict=True)]
    channels = [int(x.shape[1]) for caught in hints for x in caught.values()]
    scores = [accuracy(model, data.val, data, f"teacher {name!r}") for name, model in zip(names, models, strict=True)]
    return Teachers(list(names), list(models), scores, channels, parameters)
