"""Which backend is the faster on this GPU: times every operator of the suite on each and prints lines for ``backend.AUTO``.

    python -m benchmarks.tune [--op topk_kd]

Nothing is changed. A few seconds an operator, and Triton's compilation. To use what it prints, put the lines into AUTO in
amtml_fast/backend.py, with the GPU and the figures beside them.
"""

import argparse
import statistics
from collections.abc import Iterable
from typing import NamedTuple

from amtml_fast.backend import Choice
from amtml_fast.testing import tensors

from . import machine
from .providers import OURS, function_of, why_not
from .workloads import ORDER, WORKLOADS, Workload

ROUNDS = 20
CLEARLY = 1.05  # times faster than the order that holds for all: less is left alone


class Timed(NamedTuple):
    op: str
    numbers: int  # of the operator's first tensor
    seconds: dict[str, float]  # of each backend

    @property
    def order(self) -> tuple[str, ...]:
        return tuple(sorted(self.seconds, key=self.seconds.__getitem__))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=ORDER, help="of this operator alone")
    args = parser.parse_args()
    if len(OURS) < 2:
        print(f"On {machine.DEVICE.type} there is one backend, {OURS[0]}: nothing to choose.")
        return
    timed = []
    for workload in WORKLOADS:
        if args.op in (None, workload.op) and not any(why_not(name, workload) for name in OURS):
            timed.append(time(workload))
            figures = ", ".join(f"{name} {1e3 * s:.3f} ms" for name, s in timed[-1].seconds.items())
            print(f"{workload.name}: {figures}", flush=True)
    print(f"\nFor AUTO, measured on {machine.name()}:")
    for choice in choices(machine.DEVICE.type, timed):
        print(f"    {choice!r},")


def time(workload: Workload) -> Timed:
    """Medians of forward and backward, the backends in turn."""
    task = workload.task()
    steps = {name: task.step(function_of(name, task)) for name in OURS}
    for step in steps.values():
        step()
    rounds: dict[str, list[float]] = {name: [] for name in OURS}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            rounds[name].append(machine.seconds(step))
    op, numbers = "multi_teacher_kd" if workload.op == "kl" else workload.op, next(tensors(task.args)).numel()
    return Timed(op, numbers, {name: statistics.median(times) for name, times in rounds.items()})


def choices(device_type: str, timed: Iterable[Timed]) -> list[Choice]:
    """The lines of AUTO that follow: the order that is right most often for all operators, and before it the sizes, from the
    largest down, at which another one is clearly faster."""
    timed = list(timed)
    if not timed:
        return []
    orders = [t.order for t in timed]
    usual = max(sorted(set(orders)), key=orders.count)
    lines: list[Choice] = []
    for op in dict.fromkeys(t.op for t in timed):
        wanted = usual  # for all sizes below
        of_op = []
        for t in sorted((t for t in timed if t.op == op), key=lambda t: t.numbers):
            if t.seconds[wanted[0]] > CLEARLY * t.seconds[t.order[0]]:
                wanted = t.order
                of_op.append(Choice(device_type, op, t.numbers, wanted))
        lines += reversed(of_op)
    return [*lines, Choice(device_type, None, 0, usual)]


if __name__ == "__main__":
    main()
