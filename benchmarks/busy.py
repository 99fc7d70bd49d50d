"""How much slower the weighted KL gets on a CPU one of whose cores has other work: ``python -m benchmarks.busy``.

Cut into equal parts, work on two cores takes twice as long when one of them has half of its time. Handed out piece by piece, a core
does what it has time for: 1.33 times as long.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable

import torch

import amtml_fast as af
from amtml_fast.testing import CASES

SIZE = (512, 32000, 3)  # rows, classes, teachers


def spin(core: int) -> None:
    os.sched_setaffinity(0, [core])
    while True:
        pass


def seconds(step: Callable[[], None]) -> float:
    def once() -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    for _ in range(5):  # the first calls wait for large pages
        once()
    return statistics.median(once() for _ in range(9))


def main() -> None:
    cores = sorted(os.sched_getaffinity(0))
    torch.set_num_threads(len(cores))
    student, teachers, weights, labels = CASES["multi_teacher_kd"].inputs(*SIZE)

    def step() -> None:
        loss = af.multi_teacher_kd_loss(student, teachers, weights, labels)
        torch.autograd.grad(loss, (student, weights))

    free = seconds(step)
    other = multiprocessing.get_context("spawn").Process(target=spin, args=(cores[-1],), daemon=True)
    other.start()
    time.sleep(5)  # it imports torch first
    busy = seconds(step)
    other.kill()
    print(
        f"{len(cores)} cores, {SIZE}: {free * 1e3:.1f} ms; with one of them busy {busy * 1e3:.1f} ms, {busy / free:.2f} times as long"
    )


if __name__ == "__main__":
    main()
