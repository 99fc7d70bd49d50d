"""How long the loss of a vocabulary split among processes takes: ``python -m benchmarks.split_vocabulary``.

Two processes of one thread hold half of the classes each; one process of two threads holds all of them. The median of some steps,
forward and backward, of the slower process, by the library's kernels and by its plain PyTorch.
"""

import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

import amtml_fast as af

from .workloads import inputs

SIZE = (512, 32000, 3)  # rows, classes, teachers
DIVERGENCES = "forward_kl", "reverse_kl", "jsd"
PROCESSES, ROUNDS = 2, 7


def milliseconds(step: Callable[[], object], group: bool) -> float:
    step()
    times = []
    for _ in range(ROUNDS):
        if group:
            dist.barrier()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def steps(part: slice, group: object) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    student, teachers, weights, labels = inputs("divergence", *SIZE)
    own: Tensor = student.detach()[:, part].contiguous().requires_grad_()
    others, weights = [t[:, part].contiguous() for t in teachers], weights.detach()

    def step(divergence: str) -> object:
        loss = af.multi_teacher_kd_loss(own, others, weights, labels, divergence=divergence, process_group=group)
        return torch.autograd.grad(loss, own)

    return {name: lambda name=name: step(name) for name in DIVERGENCES}  # type: ignore[misc]


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    size = SIZE[1] // PROCESSES
    for name, step in steps(slice(rank * size, (rank + 1) * size), dist.group.WORLD).items():
        for backend in ("auto", "reference"):
            with af.use_backend(backend):
                slowest = torch.tensor(milliseconds(step, True))
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if rank == 0:
                print(f"{name}: {PROCESSES} processes, {backend}: {slowest.item():.0f} ms", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    print(f"{SIZE} float32, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(process, (folder,), nprocs=PROCESSES, start_method="spawn")
    torch.set_num_threads(PROCESSES)
    for name, step in steps(slice(None), None).items():
        print(f"{name}: one process of {PROCESSES} threads: {milliseconds(step, False):.0f} ms")


if __name__ == "__main__":
    main()
