"""The optimizer of a training, and its learning rates."""

from __future__ import annotations

import math
import warnings

import torch

from ..config.schema import StagesConfig, TrainConfig
from .distiller import Distiller

ADAPTER = "adapter"  # its group of the optimizer


def make_optimizer(train: TrainConfig, module: Distiller, *, on_device: bool = False) -> torch.optim.Optimizer:
    """One optimizer over student, hint projections F_t and adapter; the adapter has its regularizer for decay. on_device: its
    step is one kernel that takes learning rates and loss scales as tensors, so that a graph can hold it."""
    adapter = module.objective.adapter
    own = list(adapter.parameters()) if adapter is not None else []
    ids = {id(p) for p in own}
    groups = [{"params": [p for p in module.parameters() if id(p) not in ids], "weight_decay": train.weight_decay}]
    groups += [{"params": own, "weight_decay": 0.0, "name": ADAPTER}] if own else []
    fused = True if on_device else None
    if train.optimizer == "adamw":
        # Steps without a graph would warn.
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
        return torch.optim.AdamW(groups, lr=train.lr, fused=fused, capturable=on_device)
    nesterov = train.nesterov and train.momentum > 0.0
    return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, nesterov=nesterov, fused=fused)


def learning_rate(train: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """The rate at a step: a pure function, so that there is no scheduler state to save."""
    epoch, total = step / steps_per_epoch, train.epochs
    if train.schedule == "onecycle":
        # Up from lr/25 over 30 % of the run, then down to almost nothing, both along half a cosine.
        top = 0.3 * total
        if epoch < top:
            return train.lr * (1 / 25 + (1 - 1 / 25) * 0.5 * (1 - math.cos(math.pi * epoch / top)))
        return train.lr * (1e-4 + (1 - 1e-4) * 0.5 * (1 + math.cos(math.pi * (epoch - top) / (total - top))))
    if epoch < train.warmup:
        return train.lr * (step + 1) / (train.warmup * steps_per_epoch + 1)
    if train.schedule == "cosine":
        done = (epoch - train.warmup) / max(1e-9, total - train.warmup)
        return train.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if train.schedule == "step":
        return train.lr * train.gamma ** sum(epoch >= milestone for milestone in train.milestones)
    return train.lr


def adapter_rate(stages: StagesConfig, epoch: int) -> float | None:
    """The adapter's own rate in an epoch (from 1); None: it has the student's."""
    if stages.adapter_lr is None:
        return None
    return stages.adapter_lr * 0.1 ** sum(epoch > milestone for milestone in stages.adapter_milestones)
