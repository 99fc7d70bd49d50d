"""The adapter that weighs the teachers of ``DistillationTrainer`` by the student's hidden states."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from amtml_fast.hf.output_layer import NAME, OutputLayer
from amtml_fast.losses import TeacherAdapter
from amtml_fast.terms import without_autocast


class HiddenAdapter(TeacherAdapter):
    """Weights [N, T] from last hidden states [N, H]: a ``TeacherAdapter`` (Eq 5-6) of ``silu(project(layer_norm(h)))``.

    Hidden states serve the next token. Which kind of text it is can be read from them, but not by one linear map: with the
    projection the mixture of teachers explains held-out text better, and students learn more (docs/language_models.md).
    """

    def __init__(self, hidden: int, teachers: int, width: int = 64):
        super().__init__(width, teachers)
        self.project = nn.Linear(hidden, width)

    def forward(self, hidden: Tensor) -> Tensor:
        with without_autocast(hidden):
            rows = F.layer_norm(hidden.float(), hidden.shape[-1:])
            return super().forward(F.silu(self.project(rows)))


def adapter_of(found: Any, student: OutputLayer, teachers: int) -> HiddenAdapter:
    """The one found, which an earlier trainer has taught, or a new one."""
    name, hidden = f"{NAME}: model.teacher_adapter", student.layer.in_features
    if found is None:
        found = HiddenAdapter(hidden, teachers)
    elif not isinstance(found, HiddenAdapter):
        raise TypeError(f"{name} must be the HiddenAdapter of an earlier trainer or None, got {type(found).__name__}")
    elif (found.project.in_features, len(found.theta)) != (hidden, teachers):
        raise ValueError(
            f"{name} must be of {teachers} teachers and a hidden size of {hidden}, got one of {len(found.theta)} and "
            f"{found.project.in_features}, from an earlier trainer; model.teacher_adapter = None starts a new one"
        )
    return found.to(student.layer.weight.device)
