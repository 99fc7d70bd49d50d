"""What an epoch's row of metrics.jsonl is made of, and what to say about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.parts import truth
from ..figures.numbers import ONE_HOT, UNIFORM
from ..methods.base import StepLoss, heaviest

EXAMPLES = "examples"


class Sums:
    """Sums of an epoch on the device, read once at its end. They stay in the same memory from one epoch to the next, so
    that a graph can add to them."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.totals, self.examples = device, dict[str, Tensor](), 0
        self.dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64

    def start(self, before: Mapping[str, Tensor] | None = None) -> None:
        """A new epoch. `before`: what `reduced` gave when a stop cut it short; for one of several processes."""
        before = dict(before or {})
        self.examples = int(before.pop(EXAMPLES, 0))
        for total in self.totals.values():
            total.zero_()
        for name, value in before.items():
            self._add(name, value.to(self.device))

    def add(self, out: StepLoss, logits: Tensor, labels: Tensor) -> None:
        """What a batch adds on the device; the caller counts its `examples`."""
        n = len(labels)
        self._add("train_accuracy", (logits.argmax(1) == truth(labels)).sum())
        for name, value in {"loss": out.loss.detach(), **out.terms}.items():
            self._add(name, value.float() * n)
        if out.weights is not None and out.weights.shape[-1] > 1:  # one teacher has all the weight: nothing to measure
            w = out.weights.float().reshape(-1, out.weights.shape[-1])
            entropy = torch.special.entr(w).sum() / math.log(w.shape[1])
            self._add("entropy", entropy)
            self._add("weight_mean", w.sum(0))
            self._add("weight_won", heaviest(w).sum(0))

    def _add(self, name: str, value: Tensor) -> None:
        value = value.to(self.dtype)
        if name not in self.totals:
            self.totals[name] = torch.zeros_like(value)
        self.totals[name] += value

    def reduced(self, accelerator: Accelerator) -> dict[str, Tensor]:
        """The sums over all processes, on the CPU; one transfer."""
        totals = {**self.totals, EXAMPLES: torch.tensor(self.examples, dtype=self.dtype, device=self.device)}
        flat = torch.cat([value.reshape(-1) for value in totals.values()])
        parts = accelerator.reduce(flat, reduction="sum").cpu().split([value.numel() for value in totals.values()])
        return {name: part.reshape(value.shape) for (name, value), part in zip(totals.items(), parts, strict=True)}

    def means(self, accelerator: Accelerator) -> dict[str, Any]:
        """Means per example over all processes."""
        totals = self.reduced(accelerator)
        n = totals.pop(EXAMPLES)
        return {name: (value / n).tolist() for name, value in totals.items()}


def collapsed(row: Mapping[str, Any], teachers: Sequence[str]) -> str | None:
    """What to say about an adapter with these metrics of an epoch; None while its entropy is between the bounds."""
    entropy = row.get("entropy")
    if entropy is None or ONE_HOT <= entropy <= UNIFORM:
        return None
    if entropy > UNIFORM:
        return (
            f"the teacher weights are uniform (normalized entropy above {UNIFORM}); "
            "if that lasts, try a smaller loss.regularizer_weight or a larger loss.init_scale"
        )
    share, name = max(zip(row["weight_won"], teachers, strict=True))
    return (
        f"one teacher has all the weight (normalized entropy below {ONE_HOT}), {name} on {100 * share:.0f} % of the examples; "
        "if that lasts, try a larger loss.regularizer_weight, a smaller loss.init_scale, or loss.adapter_label_weight=1"
    )
