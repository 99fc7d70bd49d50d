"""Peak memory of a workload, in a process of its own: ``python -m benchmarks.memory "angle 128x100 float32" cpp eager``.

Prints a JSON object: provider -> bytes above the inputs. On the CPU it is the high-water mark of the process, whose malloc
is told to take large blocks from the system and to give them back at once.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def of(workload: str, *providers: str) -> dict[str, int | None]:
    """The same from another process, which starts a new one."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-m", "benchmarks.memory", workload, *providers]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(command[2:])} failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def main(name: str, *providers: str) -> None:
    import torch

    from .machine import peak_bytes
    from .providers import function_of
    from .workloads import Workload

    op, size, dtype = name.split()
    task = Workload(op, tuple(map(int, size.split("x"))), getattr(torch, dtype)).task()
    print(json.dumps({p: peak_bytes(task.step(function_of(p, task))) for p in providers}))


if __name__ == "__main__":
    main(*sys.argv[1:])
