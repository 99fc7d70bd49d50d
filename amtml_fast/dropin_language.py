"""The distillation losses of libraries for language models, under their names. ``amtml_fast.dropin`` passes them on.

``amtml_fast.multi_teacher_kd_loss`` has the same divergences with several teachers, weights by token and labels. None of these
but ModelOpt's multiplies by T^2. Logits are [B, S, C] or [tokens, C], labels [B, S] or flat. Tokens whose label is -100 count
nothing; the others' mean is the loss, in DistillKit their sum. Four things differ from theirs: 16-bit logits are computed in
float32; where no token counts, the loss is 0 (DistiLLM's and TRL's ``"mean"`` are NaN); a class that only one side has (a logit of
-inf) adds what the formula says, where DistiLLM and torchtune leave it out; and a teacher that requires grad is an error, where theirs
have a gradient to it (ModelOpt's and ``sparse_kl_div`` have none).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from amtml_fast import checks
from amtml_fast.functional import multi_teacher_kd_loss, topk_kd_loss
from amtml_fast.terms import times, wide_dtype

__all__ = [
    "ForwardKLLoss",
    "ForwardKLWithChunkedOutputLoss",
    "LogitsDistillationLoss",
    "ReverseKLLoss",
    "ReverseKLWithChunkedOutputLoss",
    "SymmetricKLLoss",
    "SymmetricKLWithChunkedOutputLoss",
    "dense_kl_div",
    "forward_kl",
    "generalized_jsd_loss",
    "js_distance",
    "reverse_kl",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "sparse_kl_div",
    "symmetric_kl",
    "tv_distance",
]


def counted(
    function: str,
    name: str,
    labels: Tensor,
    student: Tensor,
    ignore_index: int = -100,
    student_name: str = "the student's logits",
) -> Tensor:
    """0 where a token counts, -100 where none does: the labels' values do not matter, and may be of another vocabulary."""
    checks.ignore_index(function, ignore_index)
    checks.tensor(function, student_name, student)
    if not isinstance(labels, Tensor):
        raise TypeError(f"{function}: {name} must be a tensor, got {type(labels).__name__}")
    tokens, flat = student.shape[:-1], math.prod(student.shape[:-1])
    # as many in another shape would be other tokens' labels; one that is flat has an order
    if labels.shape != tokens and (labels.numel() != flat or (labels.dim() != 1 and len(tokens) != 1)):
        wanted = f"[{flat}]" if len(tokens) == 1 else f"{list(tokens)} or [{flat}]"
        raise ValueError(f"{function}: {name} must be {wanted}, got {checks.shape(labels)}")
    if not labels.is_floating_point():  # torch cuts ignore_index to the bits of bytes, of which 156 would be -100
        labels = labels.long()
    return torch.where(labels == ignore_index, -100, 0).reshape(tokens)


def _over_tokens(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    divergence: str,
    beta: float | None = None,
    *,
    reduction: str = "batchmean",
    temperature: float = 1.0,
    count: int | Tensor | None = None,
    with_entropy: bool = False,
) -> Tensor:
    """D(teacher, student). ``labels`` are those of ``counted``. ``with_entropy`` adds the teacher's: a cross term."""
    out = multi_teacher_kd_loss(
        student, [teacher], None, labels, temperature=temperature, alpha=1.0, divergence=divergence, beta=beta,
        t2_scale=False, reduction=reduction, num_items_in_batch=count, return_stats=with_entropy,
    )  # fmt: skip
    if not with_entropy:
        return out
    loss, stats = out
    entropy = stats.target_entropy.sum()
    if reduction == "batchmean" and labels is not None:
        entropy = entropy / (labels == 0).sum().clamp(min=1)
    return loss + entropy


def divergence_at(function: str, beta: float) -> tuple[str, float | None]:
    """What ``generalized_jsd_loss`` is at this beta: our name for it, and our beta."""
    checks.number(function, "beta", beta, 0, 1)
    return ("forward_kl", None) if beta == 0 else ("reverse_kl", None) if beta == 1 else ("jsd", beta)


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """TRL's (GKD): ``beta KL(t || m) + (1 - beta) KL(s || m)`` with ``m = beta t + (1 - beta) s``; KL(t || s) at beta 0, KL(s || t)
    at beta 1.

    ``"batchmean"`` divides by the tokens that count, or without labels by the first dimension; ``"mean"`` by tokens times
    classes; ``num_items_in_batch`` replaces either. ``"none"`` is an error: theirs has one number a class.
    """
    divergence, share = divergence_at("generalized_jsd_loss", beta)
    checks.one_of("generalized_jsd_loss", "reduction", reduction, ("batchmean", "sum", "mean"))
    if labels is not None:
        labels = counted("generalized_jsd_loss", "labels", labels, student_logits)
    count = num_items_in_batch
    if count is None and reduction == "batchmean" and labels is None:
        count = max(len(student_logits), 1)
    return _over_tokens(
        student_logits, teacher_logits, labels, divergence, share,
        reduction=reduction if count is None else "batchmean", temperature=temperature, count=count,
    )  # fmt: skip


def _mixed(share: float, first: Callable[[], Tensor], second: Callable[[], Tensor]) -> Tensor:
    """``share`` of the first and the rest of the second. One without weight counts nothing, even if it is infinite."""
    if share in (0, 1):
        return first() if share == 1 else second()
    return times(first(), share) + times(second(), 1 - share)


# --- DistiLLM: the labels are no_model_batch["label"]


def _distillm(
    function: str,
    logits: Tensor,
    teacher_logits: Tensor,
    no_model_batch: Mapping[str, Tensor],
    divergence: str,
    beta: float | None = None,
    with_entropy: bool = False,
) -> Tensor:
    labels = counted(function, 'no_model_batch["label"]', no_model_batch["label"], logits)
    return _over_tokens(logits, teacher_logits, labels, divergence, beta, with_entropy=with_entropy)


def _check_share(function: str, lam: float, *, above: bool = False) -> None:
    """In [0, 1), or in (0, 1) with ``above``: with a mixture of one side alone nothing is left to learn, theirs has gradient 0."""
    checks.number(function, "lam", lam, 0, 1, above=above)
    if lam == 1:
        raise ValueError(f"{function}: lam must be below 1, got {lam}")


def forward_kl(logits: Tensor, teacher_logits: Tensor, no_model_batch: Mapping[str, Tensor]) -> Tensor:
    """DistiLLM's: KL(t || s) and the teacher's entropy, which has no gradient."""
    return _distillm("forward_kl", logits, teacher_logits, no_model_batch, "forward_kl", with_entropy=True)


def reverse_kl(logits: Tensor, teacher_logits: Tensor, no_model_batch: Mapping[str, Tensor]) -> Tensor:
    """DistiLLM's: KL(s || t)."""
    return _distillm("reverse_kl", logits, teacher_logits, no_model_batch, "reverse_kl")


def symmetric_kl(
    logits: Tensor, teacher_logits: Tensor, no_model_batch: Mapping[str, Tensor], lam: float = 0.9
) -> Tensor:
    """DistiLLM's: (1 - lam) of ``forward_kl``, lam of ``reverse_kl``."""
    given = logits, teacher_logits, no_model_batch
    return _mixed(1 - lam, lambda: forward_kl(*given), lambda: reverse_kl(*given))


def js_distance(
    logits: Tensor, teacher_logits: Tensor, no_model_batch: Mapping[str, Tensor], lam: float = 0.9
) -> Tensor:
    """DistiLLM's: ``lam KL(s || m) + (1 - lam) KL(t || m)`` with ``m = (1 - lam) t + lam s``."""
    _check_share("js_distance", lam, above=True)
    return _distillm("js_distance", logits, teacher_logits, no_model_batch, "jsd", 1 - lam)


def tv_distance(logits: Tensor, teacher_logits: Tensor, no_model_batch: Mapping[str, Tensor]) -> Tensor:
    """DistiLLM's: half of the sum of absolute differences."""
    return _distillm("tv_distance", logits, teacher_logits, no_model_batch, "tvd")


def skewed_forward_kl(
    logits: Tensor, teacher_logits: Tensor, no_model_batch: Mapping[str, Tensor], lam: float = 0.1
) -> Tensor:
    """DistiLLM's: ``KL(t || lam t + (1 - lam) s)`` and the teacher's entropy, which has no gradient."""
    _check_share("skewed_forward_kl", lam)
    if lam == 0:
        return forward_kl(logits, teacher_logits, no_model_batch)
    return _distillm("skewed_forward_kl", logits, teacher_logits, no_model_batch, "skew_kl", lam, with_entropy=True)


def skewed_reverse_kl(
    logits: Tensor, teacher_logits: Tensor, no_model_batch: Mapping[str, Tensor], lam: float = 0.1
) -> Tensor:
    """DistiLLM's: ``KL(s || (1 - lam) t + lam s)``."""
    _check_share("skewed_reverse_kl", lam)
    if lam == 0:
        return reverse_kl(logits, teacher_logits, no_model_batch)
    return _distillm("skewed_reverse_kl", logits, teacher_logits, no_model_batch, "skew_reverse_kl", lam)


# --- torchtune


class ForwardKLLoss(nn.Module):
    """torchtune's: KL(t || s) and the teacher's entropy, which has no gradient. Logits [tokens, C] or [B, S, C]."""

    divergence, with_entropy = "forward_kl", True

    def __init__(self, ignore_index: int = -100):
        super().__init__()
        checks.ignore_index(type(self).__name__, ignore_index)
        self.ignore_index = ignore_index

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True) -> Tensor:
        """``normalize``: divide by the tokens that count."""
        labels = counted(type(self).__name__, "labels", labels, student_logits, self.ignore_index)
        return _over_tokens(
            student_logits, teacher_logits, labels, self.divergence, reduction="batchmean" if normalize else "sum",
            with_entropy=self.with_entropy,
        )  # fmt: skip


class ReverseKLLoss(ForwardKLLoss):
    """torchtune's: KL(s || t)."""

    divergence, with_entropy = "reverse_kl", False


class SymmetricKLLoss(nn.Module):
    """torchtune's: ``sym_kd_ratio`` of ``ForwardKLLoss``, the rest of ``ReverseKLLoss``."""

    def __init__(self, sym_kd_ratio: float = 0.5, ignore_index: int = -100):
        super().__init__()
        checks.number("SymmetricKLLoss", "sym_kd_ratio", sym_kd_ratio, 0, 1)
        checks.ignore_index("SymmetricKLLoss", ignore_index)
        self.ignore_index, self.sym_kd_ratio = ignore_index, sym_kd_ratio
        self.fkl, self.rkl = ForwardKLLoss(ignore_index), ReverseKLLoss(ignore_index)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True) -> Tensor:
        """``normalize``: divide by the tokens that count."""
        given = student_logits, teacher_logits, labels, normalize
        return _mixed(self.sym_kd_ratio, lambda: self.fkl(*given), lambda: self.rkl(*given))


class _OverChunks(nn.Module):
    """torchtune's: one of its losses over logits that come in chunks, lists of [B, S / chunks, C]. Labels [B, S]."""

    def __init__(self, num_output_chunks: int, ignore_index: int):
        super().__init__()
        checks.count(type(self).__name__, "num_output_chunks", num_output_chunks)
        checks.ignore_index(type(self).__name__, ignore_index)
        self.num_output_chunks, self.ignore_index = num_output_chunks, ignore_index

    def loss(self) -> nn.Module:
        """Of one chunk, with the settings as they are now."""
        raise NotImplementedError

    def forward(self, student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], labels: Tensor) -> Tensor:
        name, loss = type(self).__name__, self.loss()
        if not isinstance(labels, Tensor) or labels.dim() != 2:
            got = checks.shape(labels) if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(f"{name}: labels must be [B, S], got {got}")
        chunks = labels.chunk(self.num_output_chunks, 1)
        for argument, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
            found = len(logits) if isinstance(logits, (list, tuple)) else type(logits).__name__
            if found != len(chunks):  # theirs leaves out those that are too many
                raise ValueError(f"{name}: {argument} must be {len(chunks)} chunks like those of labels, got {found}")
        sums = [loss(*given, normalize=False) for given in zip(student_logits, teacher_logits, chunks)]
        return torch.stack(sums).sum() / (labels != self.ignore_index).sum().clamp(min=1)


class ForwardKLWithChunkedOutputLoss(_OverChunks):
    """torchtune's: ``ForwardKLLoss`` of chunks, which need no other memory here than the logits themselves."""

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100):
        super().__init__(num_output_chunks, ignore_index)

    def loss(self) -> nn.Module:
        return ForwardKLLoss(self.ignore_index)


class ReverseKLWithChunkedOutputLoss(_OverChunks):
    """torchtune's: ``ReverseKLLoss`` of chunks."""

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100):
        super().__init__(num_output_chunks, ignore_index)

    def loss(self) -> nn.Module:
        return ReverseKLLoss(self.ignore_index)


class SymmetricKLWithChunkedOutputLoss(_OverChunks):
    """torchtune's: ``SymmetricKLLoss`` of chunks."""

    def __init__(self, num_output_chunks: int = 8, sym_kd_ratio: float = 0.5, ignore_index: int = -100):
        super().__init__(num_output_chunks, ignore_index)
        checks.number("SymmetricKLWithChunkedOutputLoss", "sym_kd_ratio", sym_kd_ratio, 0, 1)
        self.sym_kd_ratio = sym_kd_ratio

    def loss(self) -> nn.Module:
        return SymmetricKLLoss(self.sym_kd_ratio, self.ignore_index)


# --- ModelOpt


class LogitsDistillationLoss(nn.modules.loss._Loss):
    """ModelOpt's (0.47): T^2 KL(t || s) of logits [..., C], teacher side constant.

    ``reduction``: ``"mean"`` by the number of logits, ``"batchmean"`` by the first dimension, ``"sum"``, or ``"none"``, one value a
    token [...]. In 0.39 ``"batchmean"`` was the default, divided by the tokens.
    """

    def __init__(self, temperature: float = 1.0, reduction: str = "mean"):
        checks.one_of("LogitsDistillationLoss", "reduction", reduction, ("mean", "batchmean", "sum", "none"))
        super().__init__()
        self._temperature, self._reduction = temperature, reduction

    def forward(self, logits_s: Tensor, logits_t: Tensor) -> Tensor:
        name = "LogitsDistillationLoss"
        checks.tensor(name, "logits_s", logits_s)
        checks.tensor(name, "logits_t", logits_t)
        if logits_s.dim() < 2:
            raise ValueError(f"{name}: logits_s must be [..., C], got {checks.shape(logits_s)}")
        checks.same_shape(name, "logits_t", logits_t, "logits_s", logits_s)
        student, teacher = logits_s.flatten(0, -2), logits_t.detach().flatten(0, -2)
        reduction = "sum" if self._reduction == "batchmean" else self._reduction
        loss = multi_teacher_kd_loss(student, [teacher], None, temperature=self._temperature, reduction=reduction)
        if self._reduction == "batchmean":
            return times(loss, 1 / max(len(logits_s), 1))
        return loss.view(logits_s.shape[:-1]) if reduction == "none" else loss


# --- DistillKit: sums over tokens


def dense_kl_div(logits: Tensor, target_logits: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """DistillKit's: the sum of KL(t || s) over the tokens of ``mask`` [B, S] or [B, S, 1], which may hold weights; no T^2."""
    labels, weights = _masked("dense_kl_div", logits, mask)
    loss = multi_teacher_kd_loss(
        logits, [target_logits], None, labels, temperature=temperature, alpha=1.0, t2_scale=False, reduction="none"
    )
    return _summed(loss, weights)


def sparse_kl_div(
    logits: Tensor,
    target_ids: Tensor,
    target_values: Tensor,
    mask: Tensor | None = None,
    eps: float = 1e-6,
    missing: Any = "zero",
    log_target: bool = True,
    temperature: float = 1.0,
    target_generation_temperature: float = 1.0,
    student_generation_temperature: float = 1.0,
    chunk_length: int | None = None,
) -> Tensor:
    """DistillKit's: the sum of KL(t || s) over the tokens of ``mask``, from a teacher's k classes [B, S, k], which are constant; no T^2.

    Args:
        missing: theirs, or its value: ``"zero"``, our ``tail="renormalize"``, or ``"symmetric_uniform"``, our ``tail="bucket"``.
        log_target: ``target_values`` are log-probabilities; else logits, with ``"zero"`` only.
        temperature: of the loss. Log-probabilities of another (``target_generation_temperature``) are converted as theirs are: with
            ``"symmetric_uniform"`` the mass that is left counts as one class.
        eps, chunk_length: play no part. The bucket is exact, where theirs clamps its mass at ``eps``; and there is nothing to chunk.
    """
    name = "sparse_kl_div"
    missing = getattr(missing, "value", missing)
    checks.one_of(name, "missing", missing, ("zero", "symmetric_uniform"))
    if missing != "zero" and not log_target:
        raise ValueError(f'{name}: missing must be "zero" with log_target=False, got "{missing}"')
    for argument, value in (
        ("temperature", temperature),
        ("target_generation_temperature", target_generation_temperature),
        ("student_generation_temperature", student_generation_temperature),
    ):
        checks.number(name, argument, value, *checks.POSITIVE)
    checks.tensor(name, "target_values", target_values)
    labels, weights = _masked(name, logits, mask)
    power = target_generation_temperature / temperature
    log_probs = target_values.detach().to(wide_dtype(target_values))
    if missing == "zero":
        log_probs = (log_probs * power).log_softmax(-1)
    elif power != 1:
        left = torch.log1p(-log_probs.exp().sum(-1, keepdim=True).clamp(max=1))  # the logarithm of what is left
        log_probs = torch.cat([log_probs, left], -1).mul(power).log_softmax(-1)[..., :-1]
    loss = topk_kd_loss(
        logits, [target_ids], [log_probs], None, labels, temperature=temperature / student_generation_temperature,
        alpha=1.0, t2_scale=False, reduction="none", tail="renormalize" if missing == "zero" else "bucket",
    )  # fmt: skip
    return _summed(loss, weights)


def _masked(function: str, logits: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Labels that leave out the tokens where the mask is 0, and the mask of each row where it may hold weights."""
    checks.tensor(function, "logits", logits)
    if mask is None:
        return None, None
    tokens = logits.shape[:-1]
    if not isinstance(mask, Tensor) or not checks.is_any(mask.shape, [tokens, (*tokens, 1)]):
        got = checks.shape(mask) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{function}: mask must be {list(tokens)} or {[*tokens, 1]}, got {got}")
    mask = mask.reshape(tokens)
    return torch.where(mask == 0, -100, 0), None if mask.dtype == torch.bool else mask.flatten()


def _summed(loss: Tensor, weights: Tensor | None) -> Tensor:
    return loss.sum() if weights is None else (loss.flatten() * weights).sum()
