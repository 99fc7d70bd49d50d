"""Presets: values for several keys under one name. They belong to the configuration, whichever method reads the keys."""

from collections.abc import Callable
from typing import Any

from .schema import Config


def scaled(config: Config, epoch: int) -> int:
    """An epoch of the authors' 280, in a training of this configuration's length."""
    return max(1, round(config.distill.epochs * epoch / 280))


def two_stage(config: Config) -> dict[str, Any]:
    """Adapter and student together, then the adapter frozen: after 80 of 280 epochs with the authors."""
    return {"stages": {"adapter_epochs": scaled(config, 80)}}


def paper_code(config: Config) -> dict[str, Any]:
    """What the authors' notebooks do, as far as it differs; docs/method.md has the list. 280 epochs with them, of which
    80 train the adapter; other numbers of epochs are scaled."""
    groups = list(config.student.groups)
    return {
        "loss": {
            "reduction": "mean",
            "kl_scale": 2.0,
            "alpha": 0.7,
            "temperature": 5.0,
            "pool": "avg",
            "init_scale": 1.0,
            "adapter_seed": 1,
            "regularizer_weight": 0.1,
            "angle_on": "logits",
            "distance_weight": 1.0,
            "normalize_hints": True,
            "pool_teacher_hints": True,
            "hint_bound": 0.005,
            "train_hints": False,
            # Of three teachers the first two give hints.
            "mapping": {t.name: g for t, g in list(zip(config.teachers, groups, strict=False))[:2]} or "best_high",
        },
        "stages": {
            "adapter_epochs": scaled(config, 80),
            "adapter_lr": 0.1,
            "adapter_milestones": [scaled(config, 40), scaled(config, 50)],
        },
        "distill": {
            "optimizer": "sgd",
            "lr": 0.1,
            "momentum": 0.9,
            "nesterov": False,
            "weight_decay": 5e-4,
            "schedule": "step",
            "warmup": 0.0,
            "milestones": [scaled(config, 180), scaled(config, 230)],
            "gamma": 0.1,
        },
    }


# A preset sees the configuration without it and returns the values that it sets; an explicit key beats it.
PRESETS: dict[str, Callable[[Config], dict[str, Any]]] = {
    "default": lambda config: {},
    "two_stage": two_stage,
    "paper_code": paper_code,
}
