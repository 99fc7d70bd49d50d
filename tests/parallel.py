"""The same work in several processes that are a group, and on several numbers of threads."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def in_processes(count: int, work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What ``work``, a function of a test's module, makes of the rank in each of so many processes of one thread."""
    # Forked from a process that has imported the slow modules once.
    multiprocessing.set_forkserver_preload(["torch.distributed.tensor", "amtml_fast"])
    torch.multiprocessing.start_processes(_process, (count, work, str(folder)), count, start_method="forkserver")
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(count)]


def _process(rank: int, count: int, work: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory is filled with NaN, as in conftest.py
    torch.utils.deterministic.fill_uninitialized_memory = True
    names = ("RANK", "LOCAL_RANK"), ("WORLD_SIZE", "LOCAL_WORLD_SIZE")  # as torchrun sets them
    os.environ.update({name: str(x) for x, of in zip((rank, count), names) for name in of})
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    torch.save(work(rank), f"{folder}/{rank}")
    dist.destroy_process_group()


def on_threads(counts: tuple[int, ...], work: Callable[[], Any]) -> list[Any]:
    """What ``work`` gives with each of these numbers of threads."""
    before, found = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            found.append(work())
    finally:
        torch.set_num_threads(before)
    return found
