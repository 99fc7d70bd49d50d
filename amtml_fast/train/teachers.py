"""The frozen teachers: in eval mode, without gradients, their training outputs kept on the disk where possible."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import data as datasets
from . import environment, preflight, zoo
from .cache import Storage, Store, free_disk, locked, no_room
from .compiling import compile_frozen
from .config import Config, ConfigError, TeacherConfig
from .features import FeatureExtractor
from .models import build
from .progress import Display
from .run import RunError
from .zoo import brings_weights

EVAL_BATCH = 512
HINT = "hint"
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by engine.mixed_precision
SECONDS_BETWEEN_LOOKS = 0.1  # whether another process has finished with the cache


@dataclass
class Outputs:
    """Outputs of one or more teachers for the same images."""

    logits: list[Tensor]  # T x [N, C] float32
    maps: list[Tensor]  # T x [N, c_t, h_t, w_t]; empty without hints


class Kept(NamedTuple):
    """The same, as it is kept of every training image in one version."""

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

    def only(self, names: Sequence[str], *, hints: bool) -> Teachers:
        """These of the teachers, in this order, sharing models and cache; without their hint maps if not `hints`."""
        chosen = [self.names.index(name) for name in names]
        cache = {
            view: Kept([kept.logits[i] for i in chosen], [kept.maps[i] for i in chosen] if hints and kept.maps else [])
            for view, kept in self.cache.items()
        }
        return Teachers(
            list(names),
            [self.models[i] for i in chosen],
            [self.scores[i] for i in chosen],
            [self.channels[i] for i in chosen] if hints and self.channels else [],
            [self.parameters[i] for i in chosen],
            self.precision,
            self.kinds,
            cache,
        )

    def live(self, images: Tensor) -> Outputs:
        """The teachers run on any number of `images` [n, C, H, W]; never compiled."""
        return self._outputs(images, [model.forward for model in self.models])

    def run(self, images: Tensor) -> Outputs:
        """The teachers run on a batch of the training, compiled if they were."""
        return self._outputs(images, self.models)

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

    def outputs(self, batch: datasets.Batch) -> Outputs:
        """Outputs for a batch of the training split: looked up if they are kept, else computed, and rounded alike."""
        kept = self.cache.get(batch.view)
        if kept is None or (self.channels and not kept.maps):
            live = self.run(batch.images)
            logits = [self.kinds.logits.through(output) for output in live.logits]
            return Outputs(logits, [self.kinds.maps.through(output) for output in live.maps])
        return Outputs(
            [store.rows(batch.index) for store in kept.logits], [store.rows(batch.index) for store in kept.maps]
        )


def _ordinary(x: Tensor) -> Tensor:
    """float32, and no tensor of the inference mode any more, which no backward may keep."""
    return x.clone() if x.dtype == torch.float32 else x.float()


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
        net = extractor(config, teacher, data, hints=hints)
        memory = torch.channels_last if channels_last else torch.contiguous_format
        net.to(device, memory_format=memory)  # type: ignore[call-overload]
        models.append(net.eval().requires_grad_(False))
    teachers = assemble([teacher.name for teacher in config.teachers], models, data)
    if config.engine.compile:
        for model in models:
            compile_frozen(model)
    teachers.precision = PRECISIONS.get(config.engine.mixed_precision)
    maps = Storage() if config.cache.hints == "never" else Storage(config.cache.hints)
    teachers.kinds = Kinds(Storage(config.cache.logits), maps)
    return teachers


def check(config: Config, data: datasets.ImageData, *, hints: bool) -> None:
    """That every teacher fits the data and has the module of its hint, before those are trained that will be."""
    for teacher in config.teachers:
        preflight.teacher_maps(extractor(config, teacher, data, hints=hints, untrained=True), teacher.name, data)


def extractor(
    config: Config, teacher: TeacherConfig, data: datasets.ImageData, *, hints: bool, untrained: bool = False
) -> FeatureExtractor:
    """The teacher's net; untrained: one that `teach` trains has random weights."""
    own = teacher.model
    if untrained and not brings_weights(own):
        channels = data.train.images.shape[1]
        model = build(own.factory, dict(own.args), num_classes=len(data.classes), in_channels=channels)
    else:
        model = _model(config, teacher, data)
    return FeatureExtractor(model, {HINT: teacher.hint} if hints and teacher.hint else {})


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
    maps = [preflight.teacher_maps(model, name, data) for name, model in zip(names, models, strict=True)]
    teachers.channels = [int(x.shape[1]) for caught in maps for x in caught.values()]
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
    for batch in datasets.Loader(split, data, EVAL_BATCH * world_size, rank=rank, world_size=world_size):
        if len(batch.labels):
            # Not model(...): what is compiled is compiled for the training's batches.
            count += (model.forward(batch.images)[0].argmax(1) == batch.labels).sum()
    model.train(was_training)
    return count


def use_cache(
    config: Config,
    teachers: Teachers,
    data: datasets.ImageData,
    display: Display,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Gives the teachers of a configuration their kept outputs, made here where they are missing, if images are fixed and
    the configuration and the room allow it. `check` is called between batches, and raises to stop."""
    if config.cache.teachers == "never" or (config.data.augment and config.data.views is None):
        return
    cache = stores(config, teachers, data)
    everything = [store for kept in cache.values() for store in (*kept.logits, *kept.maps)]
    if not has_room(config, everything, display):
        return
    fill(config, teachers, cache, data, display, check)
    device = data.train.images.device
    free = free_memory(device)
    if device.type != "cpu" and (free is None or sum(store.nbytes() for store in everything) <= free // 2):
        for store in everything:
            store.to(device)
    teachers.cache = cache


def stores(config: Config, teachers: Teachers, data: datasets.ImageData) -> dict[int | None, Kept]:
    """Where the outputs of each version of the images are, or will be; nothing is read or written."""
    probe = teachers.live(next(iter(datasets.Loader(data.val, data, 1))).images)
    kinds, prints, split = teachers.kinds, fingerprint(config), data.train
    if isinstance(kinds.logits.kind, int) and kinds.logits.kind >= len(data.classes):
        raise ConfigError(
            f"config: cache.logits: fewer than the {len(data.classes)} classes of {data.name} wanted, "
            f"got {kinds.logits.kind}; float16 keeps all"
        )
    shared = {
        "data": {"name": data.name, "train": split.digest(), "mean": data.mean, "std": data.std},
        "computed": {
            "device": split.images.device.type,
            "channels_last": config.engine.channels_last,
            "mixed_precision": config.engine.mixed_precision,
            **environment.precision(),
        },
    }

    def store(name: str, key: Mapping[str, object], output: Tensor, storage: Storage) -> Store:
        return Store(config.cache_folder, name, key, rows=len(split), shape=output.shape[1:], storage=storage)

    cache: dict[int | None, Kept] = {}
    for view in range(1, min(config.data.views, config.distill.epochs) + 1) if config.data.views else (0,):
        kept = cache[view] = Kept([], [])
        for i, teacher in enumerate(config.teachers):
            model = {"weights": prints[teacher.name], "factory": teacher.model.factory, "args": teacher.model.args}
            drawn = {"seed": config.augment_seed, "view": view} if view else None
            key = {**shared, "teacher": model, "augment": drawn, "hint": None}
            kept.logits.append(store(f"{teacher.name}-logits", key, probe.logits[i], kinds.logits))
            if probe.maps and config.cache.hints != "never":
                key["hint"] = teacher.hint
                kept.maps.append(store(f"{teacher.name}-hint", key, probe.maps[i], kinds.maps))
    return cache


def has_room(config: Config, everything: Sequence[Store], display: Display) -> bool:
    """Whether to keep the outputs. `always` asks for room on the disk; `auto` for twice that room, and for memory that
    can hold them all while they are looked up, without which reading them might take longer than the teachers do."""
    missing, whole = sum(s.nbytes(s.missing()) for s in everything), sum(s.nbytes() for s in everything)
    disk, memory = free_disk(config.cache_folder), free_memory(torch.device("cpu"))
    if config.cache.teachers == "always":
        if missing > disk:
            raise no_room(config.cache_folder, missing, "nothing was written")
        return True
    for size, free, where in ((missing, disk // 2, "half of the free disk"), (whole, memory, "the free memory")):
        if free is not None and size > free:
            display.warn(
                f"the teachers' outputs would take {size / 2**30:.1f} GiB, and {where} is {free / 2**30:.1f} GiB; "
                "computing them in each step instead (cache.teachers=always to insist; float16 or fewer cache.logits, "
                "cache.hints=float16 or never take less)"
            )
            return False
    return True


def fill(
    config: Config,
    teachers: Teachers,
    cache: Mapping[int | None, Kept],
    data: datasets.ImageData,
    display: Display,
    check: Callable[[], None],
) -> None:
    """Opens every store of `cache`, computing what is missing and no other process is computing at the time."""
    loader = datasets.Loader(
        data.train,
        data,
        EVAL_BATCH,
        augment=config.data.augment,
        views=config.data.views,
        augment_seed=config.augment_seed,
    )

    def made(view: int, name: str, parts: Sequence[Store]) -> bool:
        """False while another process writes them."""
        check()
        if all([store.open() for store in parts]):
            return True
        with ExitStack() as stack:
            if not all(stack.enter_context(locked(store)) for store in parts):
                return False
            loader.set_epoch(view)
            compute(teachers.only([name], hints=len(parts) > 1), parts, loader, display, check)
        return all([store.open() for store in parts])

    waiting = [(view or 0, n, kept.of(i)) for view, kept in cache.items() for i, n in enumerate(teachers.names)]
    said = False
    while busy := [each for each in waiting if not made(*each)]:
        if len(busy) == len(waiting):
            if not said:
                display.say("waiting for another process, which is computing the teachers' outputs")
            said = True
            time.sleep(SECONDS_BETWEEN_LOOKS)
        waiting = busy


def compute(
    teacher: Teachers, parts: Sequence[Store], loader: datasets.Loader, display: Display, check: Callable[[], None]
) -> None:
    """Runs one teacher over what is missing of its outputs."""
    for store in parts:
        store.prepare()
    if not any(store.wanted for store in parts):
        return
    with display.bar(f"outputs of {teacher.names[0]}", len(loader.split)) as bar:
        first = 0
        for batch in loader:
            check()
            n = len(batch.labels)
            wanting = [i for i, store in enumerate(parts) if store.wants(first, first + n)]
            if wanting:
                out = teacher.live(batch.images)
                for i in wanting:
                    parts[i].add(first, [*out.logits, *out.maps][i])
            first += n
            bar.add(n)


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
