"""Fills the cache of the teachers' outputs, where images are fixed and there is room."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from ..config import environment
from ..config.schema import Config, ConfigError
from ..data.images import ImageData, Loader
from ..models.evaluate import EVAL_BATCH
from ..models.layout import channels_last
from ..progress import Display
from .frozen import Kept, Teachers, fingerprint
from .store import Storage, Store, free_disk, locked, no_room

SECONDS_BETWEEN_LOOKS = 0.1  # whether another process has finished with the cache


def use_cache(
    config: Config,
    teachers: Teachers,
    data: ImageData,
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


def stores(config: Config, teachers: Teachers, data: ImageData) -> dict[int | None, Kept]:
    """Where the outputs of each version of the images are, or will be; nothing is read or written."""
    probe = teachers.live(next(iter(Loader(data.val, data, 1))).images)
    kinds, prints, split = teachers.kinds, fingerprint(config), data.train
    if isinstance(kinds.logits.kind, int) and kinds.logits.kind >= data.num_classes:
        raise ConfigError(
            f"config: cache.logits must be fewer than the {data.num_classes} classes of {data.name}, "
            f"got {kinds.logits.kind}; float16 keeps all"
        )
    shared = {
        "data": {"name": data.name, "train": split.digest, "mean": data.mean, "std": data.std},
        "computed": {
            "device": split.images.device.type,
            "channels_last": channels_last(config.engine.channels_last, split.images.shape),
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
    data: ImageData,
    display: Display,
    check: Callable[[], None],
) -> None:
    """Opens every store of `cache`, computing what is missing and no other process is computing at the time."""
    loader = Loader(
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
    teacher: Teachers, parts: Sequence[Store], loader: Loader, display: Display, check: Callable[[], None]
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
