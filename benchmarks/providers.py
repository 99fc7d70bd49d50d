"""Who computes: our backends, the plain PyTorch reference, torch.compile of it, other libraries where they have it, and the short
form that one writes without a library."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import amtml_fast as af
from amtml_fast import backend

from .machine import DEVICE
from .short_forms import SHORT
from .workloads import Task, Workload

OURS = ("cuda", "triton") if DEVICE.type == "cuda" else ("cpp",)
PLAIN = ("eager", "compile")
PEERS = ("F.kl_div", "Liger")  # of "kl" alone: these libraries have no weighted form
IN_SHORT = ("a short form", "a short form, compiled")
ALL = (*OURS, *PLAIN, *PEERS, *IN_SHORT)


def why_not(name: str, workload: Workload) -> str | None:
    """Why a provider does not run a workload here, or None. An empty answer: it has nothing of the kind."""
    if name in OURS:
        op = "multi_teacher_kd" if workload.op == "kl" else workload.op
        return backend.why_not(op, name, DEVICE.type)
    if (name in PEERS and workload.op != "kl") or (name in IN_SHORT and workload.op not in SHORT):
        return ""
    if name == "Liger":
        if DEVICE.type == "cpu":
            return "it runs on GPUs alone"
        try:
            import liger_kernel  # noqa: F401
        except ImportError:
            return "not installed"
    return None


def function_of(name: str, task: Task) -> Callable[..., Tensor]:
    """The task's function, computed by this provider."""
    if name == "F.kl_div":
        return lambda z, x: F.kl_div(z.log_softmax(-1), x.softmax(-1), reduction="batchmean")
    if name == "Liger":
        from liger_kernel.transformers import LigerKLDIVLoss

        loss = LigerKLDIVLoss(reduction="batchmean")
        return lambda z, x: loss(z.log_softmax(-1), x.softmax(-1))
    if name in IN_SHORT:
        return _compiled(SHORT[task.op]) if "compile" in name else SHORT[task.op]
    if name == "compile":
        return _on("reference", _compiled(task.function))
    return _on("reference" if name == "eager" else name, task.function)


def checked(workload: Workload, provider: str, tolerance: float) -> Callable[[], object]:
    """The step to be timed, after the provider's gradients were found to be those of the float64 reference."""
    small, task = _task(workload.checked()), _task(workload)
    small.check(small.step(function_of(provider, small)), tolerance)
    return task.step(function_of(provider, task))


@functools.lru_cache(maxsize=2)  # all providers take the same tensors
def _task(workload: Workload) -> Task:
    return workload.task()


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False)  # for the sizes that are timed, although another one was checked


def _on(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any) -> Tensor:
        with af.use_backend(name):
            return function(*args)

    return call
