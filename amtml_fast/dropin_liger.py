"""Liger's distillation losses from hidden states and output layers, under their names. ``amtml_fast.dropin`` passes them on.

``amtml_fast.fused_linear_kd_loss`` has the same with several teachers, weights by token and more divergences. Neither multiplies by
T^2. Both divide by the tokens whose label is not ``ignore_index``, at least 1, and give the teacher no gradient. Four things differ
from theirs: products and logits of 16-bit inputs are float32 (chunked loss: theirs are 16 bits); vocabularies of different sizes are
an error (chunked loss: theirs gives the student's missing classes logits of 0); the two parts that ``return_soft_hard_loss`` asks for
have their gradients (theirs have none); a run without a token that counts is 0 (``LigerFusedLinearJSD``: theirs raises an error).
"""

from typing import Any

import torch
from torch import Tensor, nn

from amtml_fast import checks
from amtml_fast.dropin_language import counted, divergence_at
from amtml_fast.functional import fused_linear_kd_loss
from amtml_fast.terms import LinearTeacher, weighed

__all__ = ["LigerFusedLinearJSD", "LigerFusedLinearJSDLoss"]


def _frozen(*tensors: Any) -> LinearTeacher:
    return LinearTeacher(*(x.detach() if isinstance(x, Tensor) else x for x in tensors))


class LigerFusedLinearJSDLoss(nn.Module):
    """Liger's chunked loss: ``weight_hard_loss`` of the cross-entropy at temperature 1 and ``weight_soft_loss`` of the divergence
    that ``generalized_jsd_loss`` has at this ``beta``.

    Args:
        weight_hard_loss, weight_soft_loss: >= 0.
        beta: in [0, 1].
        compiled: plays no part.
        chunk_size: rows at a time; None chooses by the shapes.
        return_soft_hard_loss: return the loss and its two parts. The student's products are then made twice.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int | None = None,
        return_soft_hard_loss: bool = False,
    ):
        super().__init__()
        checks.number(type(self).__name__, "beta", beta, 0, 1)
        checks.ignore_index(type(self).__name__, ignore_index)
        checks.number(type(self).__name__, "temperature", temperature, *checks.POSITIVE)
        self.weight_hard_loss, self.weight_soft_loss, self.beta = weight_hard_loss, weight_soft_loss, beta
        self.ignore_index, self.temperature, self.compiled = ignore_index, temperature, compiled
        self.chunk_size, self.return_soft_hard_loss = chunk_size, return_soft_hard_loss
        self._check_weights()

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Inputs [tokens, H] and [tokens, H_t], weights [C, H] and [C, H_t], biases [C], labels [tokens]."""
        name = type(self).__name__
        if not isinstance(true_labels, Tensor):  # without labels there would be no cross-entropy
            raise TypeError(f"{name}: true_labels must be a tensor, got {type(true_labels).__name__}")
        self._check_weights()  # they may have been set since
        teacher = _frozen(teacher_input, teacher_weight, teacher_bias)
        divergence, beta = divergence_at(name, self.beta)

        def share(alpha: float) -> Tensor:
            return fused_linear_kd_loss(
                student_input, student_weight, [teacher], None, true_labels, student_bias=student_bias, alpha=alpha,
                divergence=divergence, beta=beta, temperature=self.temperature, t2_scale=False,
                ignore_index=self.ignore_index, chunk_size=self.chunk_size,
            )  # fmt: skip

        hard_weight, soft_weight = self.weight_hard_loss, self.weight_soft_loss
        if self.return_soft_hard_loss:
            soft, hard = share(1.0), share(0.0)
            return weighed(hard, hard_weight) + weighed(soft, soft_weight), soft, hard
        total = hard_weight + soft_weight
        return weighed(share(soft_weight / total if total else 0.0), total)

    def _check_weights(self) -> None:
        for name in ("weight_hard_loss", "weight_soft_loss"):
            checks.number(type(self).__name__, name, getattr(self, name), *checks.NOT_NEGATIVE)


class LigerFusedLinearJSD(nn.Module):
    """Liger's: the divergence that ``generalized_jsd_loss`` has at ``jsd_beta``, without cross-entropy.

    ``accum_dtype`` plays no part: sums over chunks are float32.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        checks.number(type(self).__name__, "jsd_beta", jsd_beta, 0, 1)
        checks.ignore_index(type(self).__name__, ignore_index)
        checks.number(type(self).__name__, "temperature", temperature, *checks.POSITIVE)
        self.jsd_beta, self.ignore_index = jsd_beta, ignore_index
        self.temperature, self.accum_dtype = temperature, accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """Inputs [tokens, H] and [tokens, H_t], weights [C, H] and [C, H_t]; labels [tokens] say which tokens count, None: all."""
        name = type(self).__name__
        divergence, beta = divergence_at(name, self.jsd_beta)
        if shift_labels is not None:
            shift_labels = counted(
                name, "shift_labels", shift_labels, student_input, self.ignore_index, "student_input"
            )
        return fused_linear_kd_loss(
            student_input, student_weight, [_frozen(teacher_input, teacher_weight)], None, shift_labels, alpha=1.0,
            divergence=divergence, beta=beta, temperature=self.temperature, t2_scale=False,
        )  # fmt: skip
