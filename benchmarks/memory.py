"""Peak memory of a workload, in a process of its own: ``python -m benchmarks.memory "angle 128x100 float32" cpp eager``.

Prints a JSON object: provider -> bytes above the inputs. On the CPU it is the high-water mark of the process, whose malloc
is told to take large blocks from the system and to give them back at once.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from .machine import peak_bytes
from .providers import PLAIN, function_of
from .workloads import Workload

ROOT = Path(__file__).parents[1]


def of(workload: str, *providers: str, module: str = "benchmarks.memory") -> dict[str, int | None]:
    """What the module prints of a workload, in a process of its own."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-m", module, workload, *providers]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(command[2:])} failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


@functools.cache
def _of_plain_angle() -> int:
    return of("angle 128x100 float32", "eager")["eager"] or 0


def predicted(workload: Workload, provider: str) -> float:
    """Bytes of the plain forms that grow with N^3, from what a small one takes; 0 for all others."""
    if provider not in PLAIN or workload.op not in ("angle", "whole_loss") or workload.size[0] <= 256:
        return 0
    return _of_plain_angle() * (workload.size[0] / 128) ** 3


def main(name: str, *providers: str) -> None:
    op, size, dtype = name.split()
    task = Workload(op, tuple(map(int, size.split("x"))), getattr(torch, dtype)).task()
    print(json.dumps({p: peak_bytes(task.step(function_of(p, task))) for p in providers}))


if __name__ == "__main__":
    main(*sys.argv[1:])
