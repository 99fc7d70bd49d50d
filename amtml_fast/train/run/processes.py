"""Several processes: what they share, what they agree on, and what each writes as if it were alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

# What the other side's end looks like: gloo's and NCCL's words, where torch has no class for them.
LOST = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "NCCL", "gloo")


def shard(module: nn.Module, device: torch.device) -> nn.Module:
    """FSDP2 in place: parameters, gradients and the optimizer's state are spread over the processes; whole only during a
    step. To be called before the optimizer is made."""
    fully_shard(module, mesh=init_device_mesh(device.type, (dist.get_world_size(),)))
    return module


@contextmanager
def complete(module: nn.Module) -> Iterator[None]:
    """Within it every process has all parameters, so that a part of the module can be called by itself."""
    if isinstance(module, FSDPModule):
        module.unshard()
    try:
        yield
    finally:
        if isinstance(module, FSDPModule):
            module.reshard()


def same_buffers(module: nn.Module) -> None:
    """BatchNorm's running statistics are of each process's own images: those of the first one count."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def state(module: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state dicts of one process, whatever the number of processes; on the first one, empty on the others."""
    return get_state_dict(module, optimizer, options=_options())


def model_state(module: nn.Module) -> dict[str, Tensor]:
    return cast(dict[str, Tensor], get_model_state_dict(module, options=_options()))


def load_state(module: nn.Module, optimizer: Optimizer, model: Mapping[str, Any], optim: Mapping[str, Any]) -> None:
    """What `state` gave, on any number of processes. ValueError, with nothing loaded, where it is not of this module."""
    # Looked at here, for torch leaves a tensor that is missing as it was.
    wanted = {name: tuple(x.shape) for name, x in module.state_dict().items()}
    found = {name: tuple(x.shape) for name, x in model.items()}
    for name in {**wanted, **found}:
        if wanted.get(name) != found.get(name):
            raise ValueError(f"{name} must be {wanted.get(name, 'nothing')}, got {found.get(name, 'nothing')}")
    trained = {name for name, _ in module.named_parameters()}
    grouped = {name for group in optim["param_groups"] for name in group["params"]}
    if trained != grouped:
        raise ValueError(
            f"optimizer must have the same parameters, got others: {', '.join(sorted(trained ^ grouped)[:3])}"
        )
    options = StateDictOptions(full_state_dict=True)
    set_state_dict(module, optimizer, model_state_dict=dict(model), optim_state_dict=dict(optim), options=options)


def _options() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def anyone(accelerator: Accelerator, asked: bool) -> bool:
    """Whether any process was asked; each has to call this at the same step."""
    flag = torch.tensor([float(asked)], dtype=torch.float32, device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum").item())


def lost(error: RuntimeError) -> bool:
    """Whether the error says that another process has gone."""
    return isinstance(error, dist.DistError) or any(words in str(error) for words in LOST)
