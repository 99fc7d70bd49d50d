"""``multi_teacher_kd_loss`` from hidden states and output layers: no logits [N, C] are ever held.

For a chunk of rows a product makes the logits, the row kernels of ``multi_teacher_kd``, ``divergence`` or ``topk_kd`` make the loss
and its gradient to them, and two products make of it gradients to the hidden states and the weight. The products are torch's; on the
CPU, in float32, those of csrc/cpu/fused_linear_kd.cpp. Value and gradients come from one pass; backward multiplies them by the incoming gradient.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amtml_fast import backend, checks, reference
from amtml_fast.ops import _kd
from amtml_fast.ops._base import (
    define,
    empty,
    first_order,
    kernels,
    may_overwrite_saved,
    needs_grad,
    operator,
    run,
    save,
    save_grads,
    saved,
    scaled,
)
from amtml_fast.ops.divergence import check_options, check_row_numbers, check_values
from amtml_fast.reference import KDOptions, KDStats, LinearTeacher, TopKTeacher, wide_dtype

operator("fused_linear_kd")  # on the row kernels of each backend

_NAME = "fused_linear_kd_loss"
ACCUMULATE = ("fp32", "bf16")


def fused_linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teachers: Sequence[Tensor | LinearTeacher | TopKTeacher],
    teacher_weights: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_index: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    accumulate: str = "fp32",
    temperature: float | Tensor = 4.0,
    alpha: float | Tensor = 0.7,
    mode: str = "mixture",
    reduction: str = "batchmean",
    t2_scale: bool = True,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    num_items_in_batch: int | Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float | None = None,
    teacher_temperature: float | Sequence[float] | None = None,
    return_stats: bool = False,
) -> Any:
    """``multi_teacher_kd_loss`` (Eq 7-8) from hidden states and output layers, whose logits are never held all at once::

        student = cap(logit_scale * (student_hidden @ student_weight.T + student_bias))
        teacher_t = cap(logit_scale * (hidden_t @ weight_t.T + bias_t))    # a LinearTeacher
        cap(x) = softcap * tanh(x / softcap)                               # x itself without softcap
        loss = multi_teacher_kd_loss(student, teachers, teacher_weights, labels, ...)

    The work is done in chunks of rows. Beside the gradients it takes memory for (2 + T) chunks of logits.

    Args:
        student_hidden: [N, H], or [B, S, H] taken as B * S rows.
        student_weight: [C, H], the output layer; it may be tied to an embedding.
        teachers: a list of T teachers, of any mixture of kinds. All are frozen: a tensor that requires grad is an error.

            - ``LinearTeacher(hidden [N, H_t], weight [C, H_t], bias [C] or None)``. H_t is the teacher's own.
            - a tensor of logits [N, C], read in place. ``logit_scale`` and ``softcap`` do not change it.
            - ``TopKTeacher(indices [N, k], log_probs [N, k])``, made **at this temperature**: ``topk_kd_loss`` with tail
              "renormalize". ``teacher_temperature`` plays no part for it.

            [B, S, ...] where the student has it. Vocabularies are one: fill up a shorter one with rows of zeros in the weight
            and a bias of -inf (or logits of -inf).
        teacher_weights: [N, T], [T] (the same for every row) or None (uniform); [B, S, T] or [B * S, T] with [B, S, H].
        labels: [N] or [B, S] integer classes, or None.
        student_bias: [C] or None.
        teacher_index: [N] or [B, S] int64: row i learns from this teacher alone, with weight 1; not with ``teacher_weights``.
            Of each teacher only the products of its own rows are made.
        logit_scale: > 0.
        softcap: > 0, or None.
        chunk_size: rows at a time; None chooses by the shapes. The result does not depend on it, but for rounding.
        accumulate: ``"fp32"``, or ``"bf16"``: the sum over chunks of the gradient to ``student_weight`` is held in bfloat16. That
            saves half of its memory, and rounds once a chunk.
        temperature, alpha, mode, reduction, t2_scale, ignore_index, label_smoothing, num_items_in_batch, divergence, beta,
            teacher_temperature, return_stats: as in ``multi_teacher_kd_loss``.

    Returns:
        Scalar, or one value a row for ``"none"``; float32 (float64 if an input is). With ``return_stats`` also ``KDStats``: with
        ``teacher_index``, ``teacher_kl`` is 0 for the teachers that a row does not learn from.

    Gradients flow to ``student_hidden``, ``student_weight``, ``student_bias``, ``teacher_weights`` and ``alpha``. Value and
    gradients are made in one forward pass; with ``reduction="none"`` backward makes the products again.

    Logits are float32 (float64 if an input is) for every dtype of the inputs, under autocast, too. On a GPU 16-bit hidden states
    and weight of the same dtype are multiplied as they are, and the gradient of the logits is rounded to that dtype before its
    products; where the two differ, both are converted. On the CPU all products are float32.

    On the CPU an ignored row costs nothing. On a GPU it costs as much as another, because to count them would be a sync; with
    ``teacher_index`` there is one sync a call, which counts both.

    Raises:
        ValueError, TypeError, RuntimeError: an argument that does not fit; nothing is computed then. On a GPU the values of
            weights, labels, ``temperature`` and ``alpha`` are not looked at.
    """
    leading, classes, kinds, flat = _check_tensors(student_hidden, student_weight, student_bias, teachers)
    rows = leading.numel()
    like = student_hidden.detach().new_empty(()).expand(*leading, classes)  # what the logits would be like
    _kd.check_rows(_NAME, like, len(kinds), teacher_weights, labels, ignore_index, "student_hidden")
    _check_index(teacher_index, teacher_weights, like)
    checks.one_of(_NAME, "reduction", reduction, _kd.REDUCTIONS)
    checks.one_of(_NAME, "accumulate", accumulate, ACCUMULATE)
    checks.number(_NAME, "logit_scale", logit_scale, 0, math.inf, above=True)
    if softcap is not None:
        checks.number(_NAME, "softcap", softcap, 0, math.inf, above=True)
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int)):
        raise TypeError(f"{_NAME}: chunk_size must be an int >= 1 or None, got {chunk_size!r}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{_NAME}: chunk_size must be an int >= 1 or None, got {chunk_size}")
    if num_items_in_batch is not None:
        _kd.check_num_items(_NAME, num_items_in_batch, reduction, labels)
    check_options(_NAME, temperature, alpha, mode, label_smoothing, divergence, beta, teacher_temperature, len(kinds))
    check_row_numbers(_NAME, like, temperature, alpha, labels, "student_hidden")

    more = reference.divergence_of(temperature, alpha, divergence, beta, teacher_temperature, len(kinds))
    weights = None if teacher_weights is None else teacher_weights.reshape(-1, len(kinds))
    labels, index = (None if x is None else _kd.as_long(x.reshape(rows)) for x in (labels, teacher_index))
    check_values(_NAME, labels, ignore_index, more, classes, weights)
    _check_classes(kinds, flat, labels, index, classes, ignore_index)
    chosen = backend.choose("fused_linear_kd", student_hidden, student_weight, student_bias, weights, more.alpha, *flat)
    if chosen == "reference":
        return reference.fused_linear_kd_loss(
            student_hidden, student_weight, teachers, teacher_weights, labels,
            student_bias=student_bias, teacher_index=teacher_index, logit_scale=logit_scale, softcap=softcap,
            temperature=temperature, alpha=alpha, mode=mode, reduction=reduction, t2_scale=t2_scale,
            ignore_index=ignore_index, label_smoothing=label_smoothing, num_items_in_batch=num_items_in_batch,
            divergence=divergence, beta=beta, teacher_temperature=teacher_temperature, return_stats=return_stats,
        )  # fmt: skip

    hidden = student_hidden.reshape(rows, student_hidden.shape[-1])
    floating = [x for x in flat if x.is_floating_point()]
    wide = wide_dtype(hidden, student_weight, student_bias, weights, *floating)
    weights = None if weights is None else weights.to(wide).expand(rows, -1)
    alphas, temperatures = (None if x is None else x.to(wide) for x in (more.alpha, more.temperature))
    flat = [x.reshape(rows, x.shape[-1]) if of_rows else x for x, of_rows in zip(flat, _of_rows(kinds))]
    numbers = reference.divergence_numbers(temperature, alpha, mode, reduction, t2_scale, ignore_index, label_smoothing)
    row_reduction = reduction if num_items_in_batch is None else "sum"
    ce_weight, kl_weight = (1.0 - numbers.alpha, float(numbers.alpha)) if labels is not None else (0.0, 1.0)
    settings = Settings(
        chosen, _row_kernel(kinds, numbers, more, index, return_stats), more.name, more.beta, mode,
        list(more.teacher_temperatures), float(numbers.temperature), t2_scale, ce_weight, kl_weight, row_reduction,
        ignore_index, float(label_smoothing), float(logit_scale), float(softcap or 0), chunk_size or 0, accumulate == "bf16",
    )  # fmt: skip
    inputs = hidden, student_weight, student_bias, weights, alphas
    needs = tuple(needs_grad(x) for x in inputs)
    out = run(
        FusedLinearKD, any(needs), *inputs, labels, index, temperatures, kinds, settings, needs, return_stats, *flat
    )
    loss, s = out if return_stats else (out, None)
    loss = _kd.per_item(loss, like, reduction, num_items_in_batch)
    if s is None:
        return loss
    stats = KDStats(s[:, 0], s[:, 1], s[:, 4:], s[:, 2], s[:, 3])
    routed = (
        None
        if index is None
        else index.unsqueeze(1) == torch.arange(len(kinds), dtype=index.dtype, device=index.device)
    )
    weights = weights if routed is None else routed.to(wide)
    return loss, reference.shaped_stats(reference.linear_stats(stats, teachers, weights, routed), leading)


# --- checks


def _check_tensors(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teachers: Any
) -> tuple[torch.Size, int, list[str], list[Tensor]]:
    """The shape of rows, the number of classes, the kinds of the teachers and all their tensors, of arguments that fit."""
    checks.tensor(_NAME, "student_hidden", hidden)
    if hidden.dim() not in (2, 3) or hidden.shape[-1] < 1:
        raise ValueError(f"{_NAME}: student_hidden must be [N, H] or [B, S, H] with H >= 1, got {checks.shape(hidden)}")
    leading = hidden.shape[:-1]
    _check_layer("student_weight", weight, "student_bias", bias, hidden, hidden, None)
    classes = weight.shape[0]
    if isinstance(teachers, (Tensor, LinearTeacher, TopKTeacher)) or not isinstance(teachers, (list, tuple)):
        wanted = "a list of teachers (LinearTeacher, TopKTeacher or a tensor of logits)"
        raise TypeError(f"{_NAME}: teachers must be {wanted}, got {_described(teachers)}")
    if len(teachers) == 0:
        raise ValueError(f"{_NAME}: teachers must hold at least one teacher, got none")
    kinds: list[str] = []
    flat: list[Tensor] = []
    for i, teacher in enumerate(teachers):
        name = f"teachers[{i}]"
        if isinstance(teacher, LinearTeacher):
            _check_of_rows(f"{name}.hidden", teacher.hidden, leading, "H_t", hidden)
            _check_layer(
                f"{name}.weight", teacher.weight, f"{name}.bias", teacher.bias, teacher.hidden, hidden, classes
            )
            given = [x for x in teacher if x is not None]
            kinds.append("linear" if teacher.bias is None else "linear_bias")
        elif isinstance(teacher, TopKTeacher):
            checks.integers(_NAME, f"{name}.indices", teacher.indices)
            _check_leading(f"{name}.indices", teacher.indices, leading, "k")
            if not 1 <= teacher.indices.shape[-1] <= classes:
                wanted = f"k classes with 1 <= k <= {classes}"
                raise ValueError(f"{_NAME}: {name}.indices must have {wanted}, got {checks.shape(teacher.indices)}")
            checks.same_device(_NAME, f"{name}.indices", teacher.indices, "student_hidden", hidden)
            _check_of_rows(f"{name}.log_probs", teacher.log_probs, leading, "k", hidden)
            checks.same_shape(_NAME, f"{name}.log_probs", teacher.log_probs, f"{name}.indices", teacher.indices)
            given = list(teacher)
            kinds.append("topk")
        elif isinstance(teacher, Tensor):
            _check_of_rows(name, teacher, leading, "C", hidden)
            if teacher.shape[-1] != classes:
                _other_vocabulary(name, teacher, f"[..., {classes}]")
            given = [teacher]
            kinds.append("logits")
        else:
            wanted = "a LinearTeacher, a TopKTeacher or a tensor of logits"
            raise TypeError(f"{_NAME}: {name} must be {wanted}, got {type(teacher).__name__}")
        for x in given:
            _kd.check_frozen(_NAME, name, x)
        flat += given
    return leading, classes, kinds, flat


def _described(value: Any) -> str:
    return f"a tensor {checks.shape(value)}" if isinstance(value, Tensor) else f"{type(value).__name__}"


def _check_layer(
    name: str,
    weight: Tensor,
    bias_name: str,
    bias: Tensor | None,
    hidden: Tensor,
    student_hidden: Tensor,
    classes: int | None,
) -> None:
    """An output layer [C, H] that fits its hidden states, with the student's classes if given."""
    checks.tensor(_NAME, name, weight)
    width = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width or weight.shape[0] < 1:
        wanted = f"[C, {width}] for hidden states {checks.shape(hidden)}"
        raise ValueError(f"{_NAME}: {name} must be {wanted}, got {checks.shape(weight)}")
    if classes is not None and weight.shape[0] != classes:
        _other_vocabulary(name, weight, f"[{classes}, {width}]")
    checks.same_device(_NAME, name, weight, "student_hidden", student_hidden)
    if bias is None:
        return
    checks.tensor(_NAME, bias_name, bias)
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{_NAME}: {bias_name} must be [{weight.shape[0]}] like {name}, got {checks.shape(bias)}")
    checks.same_device(_NAME, bias_name, bias, "student_hidden", student_hidden)


def _other_vocabulary(name: str, value: Tensor, wanted: str) -> None:
    raise ValueError(
        f"{_NAME}: {name} must be {wanted} with the classes of student_weight, got {checks.shape(value)}; fill up the shorter "
        "vocabulary (weight with zeros and bias with -inf, or logits with -inf)"
    )


def _check_of_rows(name: str, value: Tensor, leading: torch.Size, last: str, hidden: Tensor) -> None:
    checks.tensor(_NAME, name, value)
    _check_leading(name, value, leading, last)
    checks.same_device(_NAME, name, value, "student_hidden", hidden)


def _check_leading(name: str, value: Tensor, leading: torch.Size, last: str) -> None:
    if value.dim() < 2 or value.shape[:-1] not in (leading, (leading.numel(),)) or value.shape[-1] < 1:
        wanted = ", ".join(map(str, leading))
        raise ValueError(f"{_NAME}: {name} must be [{wanted}, {last}] like student_hidden, got {checks.shape(value)}")


def _check_index(index: Tensor | None, weights: Tensor | None, like: Tensor) -> None:
    if index is None:
        return
    if weights is not None:
        raise ValueError(f"{_NAME}: teacher_weights must be None with teacher_index, got {checks.shape(weights)}")
    checks.integers(_NAME, "teacher_index", index)
    leading = like.shape[:-1]
    if index.shape not in (leading, (leading.numel(),)):
        wanted = f"{list(leading)} like student_hidden"
        raise ValueError(f"{_NAME}: teacher_index must be {wanted}, got {checks.shape(index)}")
    checks.same_device(_NAME, "teacher_index", index, "student_hidden", like)


def _check_classes(
    kinds: list[str],
    flat: list[Tensor],
    labels: Tensor | None,
    index: Tensor | None,
    classes: int,
    ignore_index: int,
) -> None:
    """The values of integers, where looking costs no sync; in rows that count."""
    given = {}
    if index is not None:
        given["teacher_index"] = (index.unsqueeze(1), len(kinds))
    at = 0
    for t, kind in enumerate(kinds):
        if kind == "topk":
            given[f"teachers[{t}].indices"] = (flat[at].reshape(-1, flat[at].shape[-1]), classes)
        at += TENSORS[kind]
    for name, (values, most) in given.items():
        if not checks.values_are_free(values):
            continue
        bad = (values < 0) | (values >= most)
        if labels is not None:
            bad &= (labels != ignore_index).unsqueeze(1)
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            raise ValueError(f"{_NAME}: {name} must be in [0, {most}), got {int(values[row, column])} in row {row}")


# --- the call

TENSORS = {"logits": 1, "topk": 2, "linear": 2, "linear_bias": 3}  # kind of a teacher -> how many tensors it has


def _of_rows(kinds: list[str]) -> list[bool]:
    """Of the tensors of all teachers, which have a row for each of the student's."""
    rows = {"logits": [True], "topk": [True, True], "linear": [True, False], "linear_bias": [True, False, False]}
    return [x for kind in kinds for x in rows[kind]]


def _row_kernel(
    kinds: list[str], options: KDOptions, divergence: reference.Divergence, index: Tensor | None, need_stats: bool
) -> str:
    """The operator whose kernels take the chunks: the most special one that can."""
    if need_stats or divergence.name != "forward_kl" or options.mode == "logits":
        return "divergence"
    if divergence.alpha is not None or divergence.temperature is not None:
        return "divergence"
    if all(kind == "topk" for kind in kinds) and (options.mode == "mixture" or index is not None):
        return "topk_kd"
    return "divergence" if divergence.teacher_temperatures else "multi_teacher_kd"


class Settings(NamedTuple):
    """What is no tensor, as the raw ops take it."""

    backend: str
    row_kernel: str
    divergence: str
    beta: float
    mode: str
    teacher_temperatures: list[float]  # none: the student's
    temperature: float
    t2_scale: bool
    ce_weight: float
    kl_weight: float
    reduction: str
    ignore_index: int
    label_smoothing: float
    logit_scale: float
    softcap: float  # 0: none
    chunk_size: int  # 0: chosen here
    narrow_sum: bool  # accumulate="bf16"


class FusedLinearKD(torch.autograd.Function):
    """The loss, or with ``need_stats`` the loss and the statistics [N, 4 + T], which are not differentiable.

    ``needs``: a gradient to the hidden states, the weight, the bias, the teachers' weights and alpha.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weights: Tensor | None,
        alphas: Tensor | None,
        labels: Tensor | None,
        index: Tensor | None,
        temperatures: Tensor | None,
        kinds: list[str],
        settings: Settings,
        needs: tuple[bool, ...],
        need_stats: bool,
        *teachers: Tensor,
    ) -> Any:
        ctx.in_forward, ctx.needs = settings.reduction != "none", needs
        now = needs if ctx.in_forward else (False,) * len(needs)
        inputs = hidden, weight, bias, weights, alphas
        loss, *grads, stats = torch.ops.amtml.fused_linear_kd_fwd.default(
            *inputs, labels, index, temperatures, teachers, kinds, *settings, *now, need_stats
        )
        ctx.set_materialize_grads(False)
        ctx.kinds, ctx.settings, ctx.backend = kinds, settings, settings.backend
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        if ctx.in_forward:
            save_grads(ctx, grads, inputs, needs)
        else:
            save(ctx, *inputs, labels, index, temperatures, *teachers)
        if not need_stats:
            return loss
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @first_order(_NAME)
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple:
        fixed = (None,) * (len(ctx.needs_input_grad) - 5)
        if grad_loss is None:
            return (None,) * 5 + fixed
        if ctx.in_forward:
            grads = _times(ctx, ctx.saved_tensors[:5], grad_loss)
        else:
            kept = saved(ctx)  # once: a checkpoint gives each tensor but once
            *inputs, labels, index, temperatures = kept[:8]
            grads = torch.ops.amtml.fused_linear_kd_bwd.default(
                grad_loss, *inputs, labels, index, temperatures, kept[8:], ctx.kinds, *ctx.settings, *ctx.needs
            )
        made = [None if not needed else g.to(dtype) for g, dtype, needed in zip(grads, ctx.dtypes, ctx.needs)]
        return *made, *fixed


def _times(ctx: Any, grads: Sequence[Tensor | None], by: Tensor) -> list[Any]:
    """Gradients that forward has saved, times that of the loss."""
    if ctx.backend == "cpp" or not may_overwrite_saved(ctx):
        return scaled(ctx, grads, by)
    for g in grads:
        if g is not None and g.dtype == torch.float32:  # reads nothing where the loss has a gradient of 1
            kernels(ctx.backend).scale_rows_.default(g, by)
        elif g is not None:
            g.mul_(by)
    return list(grads)


# --- the raw ops

_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? weights, Tensor? alphas, Tensor? labels, Tensor? index, "
    "Tensor? temperatures, Tensor[] teachers, str[] kinds, str backend, str row_kernel, str divergence, float beta, str mode, "
    "float[] teacher_temperatures, float temperature, bool t2_scale, float ce_weight, float kl_weight, str reduction, "
    "int ignore_index, float label_smoothing, float logit_scale, float softcap, int chunk_size, bool narrow_sum, "
    "bool need_hidden_grad, bool need_weight_grad, bool need_bias_grad, bool need_weights_grad, bool need_alpha_grad"
)
# loss (scalar, or [N] for "none"), the five gradients, statistics [N, 4 + T]
_FORWARD = f"({_INPUTS}, bool need_statistics) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_BACKWARD = f"(Tensor grad_loss, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"


def _forward(*args: Any) -> tuple[Tensor, ...]:
    return _Call(None, *args).run()


def _backward(grad_loss: Tensor, *args: Any) -> tuple[Tensor, ...]:
    call = _Call(grad_loss, *args, False)
    grads = call.run()[1:6]
    return tuple(g.to(x.dtype) if x is not None else g for g, x in zip(grads, call.inputs))


def _fake_forward(*args: Any) -> tuple[Tensor, ...]:
    return _Call(None, *args).outputs()


def _fake_backward(grad_loss: Tensor, *args: Any) -> tuple[Tensor, ...]:
    call = _Call(grad_loss, *args, False)
    grads = call.outputs()[1:6]
    return tuple(torch.empty_like(g, dtype=x.dtype) if x is not None else g for g, x in zip(grads, call.inputs))


def _define() -> None:
    """In Python on every device: their schemas are not among those that a backend implements."""
    parts = (
        ("fused_linear_kd_fwd", _FORWARD, _forward, _fake_forward),
        ("fused_linear_kd_bwd", _BACKWARD, _backward, _fake_backward),
    )
    for name, schema, function, fake in parts:
        torch.library.define(f"amtml::{name}", schema)
        torch.library.register_fake(f"amtml::{name}", fake)
        for key in ("CPU", "CUDA", "XPU"):
            torch.library.impl(f"amtml::{name}", key)(function)


_define()

# The products of a chunk of rows on the CPU, float32, written into ``out``; the weight and the hidden states may be 16-bit.
# They beat torch's there, which at a hundred rows take twice as long as with all rows at once.


@define(
    "fused_linear_kd_logits_",
    "(Tensor(a!) out, Tensor hidden, Tensor weight, Tensor? bias, float scale) -> ()",
    triton=None,
    gpu=False,
)
def _(*_): ...


@define(
    "fused_linear_kd_grad_hidden_",
    "(Tensor(a!) out, Tensor grad, Tensor weight, float scale) -> ()",
    triton=None,
    gpu=False,
)
def _(*_): ...


@define(
    "fused_linear_kd_grad_weight_",
    "(Tensor(a!) out, Tensor grad, Tensor hidden, float scale, bool add) -> ()",
    triton=None,
    gpu=False,
)
def _(*_): ...


# --- chunk by chunk

_MIB = 2**20
CPU_BYTES, GPU_BYTES = 56 * _MIB, 1024 * _MIB  # of a chunk's logits
BLOCK = 4 * _MIB  # bytes of a weight that are converted at a time
HALF_SCALE = 256.0  # of logit gradients in float16, most of which are small


class _Call:
    """One call of a raw op."""

    def __init__(
        self,
        grad_loss: Tensor | None,  # [N]: given in a backward of "none"
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weights: Tensor | None,
        alphas: Tensor | None,
        labels: Tensor | None,
        index: Tensor | None,
        temperatures: Tensor | None,
        teachers: Sequence[Tensor],
        kinds: list[str],
        *others: Any,
    ):
        count = len(Settings._fields)
        self.set = Settings(*others[:count])
        *self.needs, self.need_stats = others[count:]
        self.grad_loss, self.hidden, self.weight, self.bias = grad_loss, hidden, weight, bias
        self.weights, self.alphas, self.labels, self.index = weights, alphas, labels, index
        self.temperatures = temperatures
        self.inputs = hidden, weight, bias, weights, alphas
        self.kinds, self.teachers = list(kinds), []
        at = 0
        for kind in kinds:
            self.teachers.append(teachers[at : at + TENSORS[kind]])
            at += TENSORS[kind]
        self.wide = wide_dtype(hidden, weight, bias, weights, *teachers)
        self.rows, self.classes = hidden.shape[0], weight.shape[0]
        self.on_cpu = _reads_free(hidden)
        self.buffers: dict[str, Tensor] = {}

    def outputs(self) -> tuple[Tensor, ...]:
        """Loss, gradients and statistics, not filled in."""
        n, t, set, wide, like = self.rows, len(self.kinds), self.set, self.wide, self.hidden
        sum_dtype = torch.bfloat16 if set.narrow_sum else wide
        shapes = self.hidden.shape, self.weight.shape, (self.classes,), (n, t), (n,)
        dtypes = wide, sum_dtype, wide, wide, wide
        return (
            like.new_empty((n,) if set.reduction == "none" else (), dtype=wide),
            *(empty(like, *each) for each in zip(self.needs, shapes, dtypes)),
            empty(like, self.need_stats, (n, 4 + t), wide),
        )

    # --- rows

    def segments(self) -> list[tuple[Tensor | None, int, list[int]]]:
        """Rows that are taken together: their numbers (None: all of them), how many, and their teachers."""
        everyone = list(range(len(self.kinds)))
        valid = None if self.labels is None else self.labels != self.set.ignore_index
        if self.index is None:
            if valid is None or not self.on_cpu or bool(valid.all()):
                return [(None, self.rows, everyone)]
            rows = valid.nonzero().squeeze(1)
            return [(rows, rows.shape[0], everyone)]
        key = self.index if valid is None else torch.where(valid, self.index, len(everyone))
        key, order = key.sort(stable=True)
        starts = torch.searchsorted(
            key, torch.arange(len(everyone) + 2, dtype=key.dtype, device=key.device)
        ).tolist()  # the one sync
        if starts[0] > 0 or starts[-1] < self.rows:
            low, high = int(key[0]), int(key[-1])
            raise ValueError(f"{_NAME}: teacher_index must be in [0, {len(everyone)}), got values in [{low}, {high}]")
        return [(order[a:b], b - a, [t]) for t, (a, b) in enumerate(itertools.pairwise(starts[:-1])) if b > a]

    def chunk_rows(self, rows: int, only: list[int], grads: bool, gathered: bool) -> int:
        """How many rows at a time."""
        if self.set.chunk_size:
            return min(self.set.chunk_size, rows)
        size = self.wide.itemsize
        made = 0 if self.set.row_kernel == "topk_kd" else sum(gathered or self.kinds[t] != "logits" for t in only)
        each = self.classes * (size * (1 + made + grads) + (2 if self.narrow and grads else 0))
        # A chunk's products read the whole weight: with a larger one larger chunks pay.
        whole, step = self.weight.numel() * size, 1 if self.on_cpu else 128
        budget = max(CPU_BYTES, whole // 2) if self.on_cpu else max(GPU_BYTES, whole)
        most = max(budget // each // step * step, step)
        even = -(-rows // -(-rows // most))  # chunks of about one size
        return -(-even // step) * step

    def take(self, x: Tensor, rows: Tensor | slice, name: str = "") -> Tensor:
        if isinstance(rows, slice):
            return x[rows]
        if not name:
            return x.index_select(0, rows)
        return torch.index_select(x, 0, rows, out=self.buffer(name, (rows.shape[0], x.shape[1]), x.dtype))

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Scratch memory under this name, which all chunks use."""
        count = math.prod(shape)
        have = self.buffers.get(name)
        if have is None or have.numel() < count:
            self.buffers.pop(name, None)
            have = self.buffers[name] = self.hidden.new_empty(count, dtype=dtype or self.wide)
        return have[:count].view(shape)

    # --- products

    @property
    def narrow(self) -> bool:
        """Whether the student's products are made of its 16-bit numbers as they are."""
        return _narrow(self.hidden, self.weight, self.wide)

    @property
    def own_products(self) -> bool:
        """Whether the products are those of csrc/cpu."""
        return self.set.backend == "cpp" and self.wide == torch.float32

    def blocks(self, weight: Tensor) -> Any:
        """A weight of another dtype, some classes at a time: where they are, and they in the wide dtype."""
        classes, width = weight.shape
        step = max(BLOCK // (width * self.wide.itemsize), 1)
        for start in range(0, classes, step):
            some = weight[start : start + step]
            yield (
                slice(start, start + some.shape[0]),
                self.buffer("block", (some.shape[0], width)).copy_(some),
            )

    def logits(self, name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``cap(logit_scale * (hidden @ weight.T + bias))``, in the wide dtype."""
        out, scale, cap = self.buffer(name, (hidden.shape[0], self.classes)), self.set.logit_scale, self.set.softcap
        if cap:
            scale = scale / cap
        bias = None if bias is None else bias.to(self.wide)
        if self.own_products:
            torch.ops.amtml.fused_linear_kd_logits_.default(out, hidden, weight, bias, scale)
        elif _narrow(hidden, weight, self.wide):
            _narrow_product(hidden, weight.t(), out)
            if bias is not None:
                out.add_(bias)
            if scale != 1:
                out.mul_(scale)
        elif weight.dtype == self.wide:
            _product(hidden.to(self.wide), weight.t(), bias, scale, out)
        else:
            hidden = hidden.to(self.wide)
            for some, wide in self.blocks(weight):
                _product(hidden, wide.t(), None if bias is None else bias[some], scale, out[:, some])
        return out.tanh_().mul_(cap) if cap else out

    def add_grads(self, grad: Tensor, hidden: Tensor, by: Tensor | None, scale: float, first: bool) -> Tensor | None:
        """Adds a chunk's share to the gradients of weight and bias, and returns that of its hidden states, from the gradient of
        its logits before ``logit_scale``, times ``by`` and ``scale``."""
        need_hidden, need_weight, need_bias = self.needs[:3]
        narrow = self.narrow and (by is None or hidden.dtype == torch.bfloat16)
        ones = grad.new_ones(1)
        if narrow:
            rounded = self.buffer("rounded", tuple(grad.shape), hidden.dtype)
            if hidden.dtype == torch.float16:
                torch.mul(grad, HALF_SCALE, out=rounded)
                scale /= HALF_SCALE
            elif by is None:
                rounded.copy_(grad)
            else:
                torch.mul(grad, by, out=rounded)
                ones = by.reshape(-1)
        elif by is not None:
            grad.mul_(by)
        if need_bias:
            at_once = scale * (HALF_SCALE if narrow and hidden.dtype == torch.float16 else 1.0)
            self.grad_bias.addmv_(grad.t(), ones.expand(grad.shape[0]), beta=0.0 if first else 1.0, alpha=at_once)
        if need_weight:
            self.add_weight_grad(rounded if narrow else grad, hidden, scale, 0.0 if first else 1.0)
        if not need_hidden:
            return None
        out = self.buffer("grad_hidden", tuple(hidden.shape))
        if self.own_products:
            torch.ops.amtml.fused_linear_kd_grad_hidden_.default(out, grad, self.weight, scale)
            return out
        if narrow:
            _narrow_product(rounded, self.weight, out)
            return out.mul_(scale) if scale != 1 else out
        if self.weight.dtype == self.wide:
            return torch.addmm(out, grad, self.weight, beta=0, alpha=scale, out=out)
        for i, (some, wide) in enumerate(self.blocks(self.weight)):
            torch.addmm(out, grad[:, some], wide, beta=min(i, 1), alpha=scale, out=out)
        return out

    def add_weight_grad(self, grad: Tensor, hidden: Tensor, scale: float, beta: float) -> None:
        out, narrow = self.grad_weight, grad.dtype != self.wide
        if self.own_products and out.dtype == self.wide:
            torch.ops.amtml.fused_linear_kd_grad_weight_.default(out, grad, hidden, scale, beta != 0)
            return
        if not narrow:
            hidden = hidden.to(self.wide)
        if out.dtype == grad.dtype:
            torch.addmm(out, grad.t(), hidden, beta=beta, alpha=scale, out=out)
        elif narrow and out.dtype == self.wide and _adds_to_float32(out.device, grad.dtype):
            torch.addmm(out, grad.t(), hidden, out_dtype=self.wide, beta=beta, alpha=scale, out=out)
        else:
            step = max(BLOCK // (hidden.shape[1] * self.wide.itemsize), 1)
            for start in range(0, self.classes, step):
                some = grad[:, start : start + step]
                made = self.buffer("block", (some.shape[1], hidden.shape[1]))
                if narrow:
                    _narrow_product(some.t(), hidden, made)
                    made.mul_(scale)
                else:
                    torch.addmm(made, some.t(), hidden, beta=0, alpha=scale, out=made)
                if beta == 0:
                    out[start : start + step].copy_(made)
                else:
                    out[start : start + step].add_(made)

    # --- teachers

    def teacher(self, t: int, rows: Tensor | slice, keep: Tensor | None) -> Tensor:
        """The logits of teacher t in these rows."""
        kind, tensors = self.kinds[t], self.teachers[t]
        if kind == "logits":
            return self.take(tensors[0], rows, f"teacher{t}")
        name = f"teacher{t}" if self.index is None else "teacher"
        if kind != "topk":
            hidden = _kept(self.take(tensors[0], rows), keep)
            return self.logits(name, hidden, tensors[1], tensors[2] if kind == "linear_bias" else None)
        # Where p is the softmax of x / tau, x is tau log p.
        index, log_probs = self.take(tensors[0], rows), self.take(tensors[1], rows).to(self.wide)
        out = self.buffer(name, (index.shape[0], self.classes)).fill_(-torch.inf)
        tau: Any = self.set.temperature
        if self.set.teacher_temperatures:
            tau = self.set.teacher_temperatures[t]
        elif self.temperatures is not None:
            tau = self.take(self.temperatures, rows).unsqueeze(1)
        index, log_probs = _together(_kept(index.long(), keep), log_probs)
        return out.scatter_(1, index, log_probs * tau)

    # --- the loss

    def run(self) -> tuple[Tensor, ...]:
        with torch.no_grad(), torch.autocast(self.hidden.device.type, enabled=False):
            return self.run_chunks()

    def run_chunks(self) -> tuple[Tensor, ...]:
        set, outputs = self.set, self.outputs()
        _, grad_hidden, self.grad_weight, self.grad_bias, grad_weights, grad_alpha, stats = outputs
        segments = self.segments()
        losses = self.hidden.new_zeros(self.rows, dtype=self.wide)
        if sum(count for _, count, _ in segments) < self.rows:
            for x in (grad_hidden, grad_weights, grad_alpha, stats):
                x.zero_()
        elif self.index is not None:
            for x in (grad_weights, stats):  # a row's other teachers
                x.zero_()
        divisor = self.divisor(segments)
        first = True
        grads = any(self.needs[:3])
        for numbers, count, only in segments:
            step = self.chunk_rows(count, only, grads, numbers is not None) if count else 1
            for start in range(0, count, step):
                rows: Any = slice(start, min(start + step, count))
                rows = rows if numbers is None else numbers[rows]
                self.chunk(rows, only, divisor, first, losses, grad_hidden, grad_weights, grad_alpha, stats)
                first = False
        if first:  # no row counts
            for x in (self.grad_weight, self.grad_bias):
                x.zero_()
        if divisor is not None and self.late(divisor):
            for x in (grad_hidden, self.grad_weight, self.grad_bias):
                x.div_(divisor)
        if set.reduction == "none":
            loss = losses
        else:
            loss = losses.sum() if divisor is None else losses.sum() / divisor
        return loss, grad_hidden, self.grad_weight, self.grad_bias, grad_weights, grad_alpha, stats

    def divisor(self, segments: list[tuple[Tensor | None, int, list[int]]]) -> float | Tensor | None:
        """Of the sum over rows: the rows that count, a number wherever it is known without a sync."""
        if self.set.reduction not in ("mean", "batchmean"):
            return None
        if self.labels is None or self.index is not None or self.on_cpu:
            return max(sum(count for _, count, _ in segments), 1)  # rows that do not count are left out
        return (self.labels != self.set.ignore_index).sum().clamp(min=1).to(self.wide)

    def late(self, divisor: float | Tensor | None) -> bool:
        """Whether sums are divided at the end: earlier, float16 would round small gradients to 0."""
        half = self.narrow and self.hidden.dtype == torch.float16
        return half and isinstance(divisor, Tensor) and self.set.reduction == "batchmean"

    def chunk(
        self,
        rows: Tensor | slice,
        only: list[int],
        divisor: float | Tensor | None,
        first: bool,
        losses: Tensor,
        grad_hidden: Tensor,
        grad_weights: Tensor,
        grad_alpha: Tensor,
        stats: Tensor,
    ) -> None:
        set, take = self.set, self.take
        need_student, (need_weights, need_alpha) = any(self.needs[:3]), self.needs[3:]
        labels = None if self.labels is None else take(self.labels, rows)
        keep = None  # rows that count, where others are among them: what these hold must not get into a product
        if labels is not None and not self.on_cpu and isinstance(rows, slice):
            keep = labels != set.ignore_index
        hidden = _kept(take(self.hidden, rows), keep)
        student = self.logits("student", hidden, self.weight, self.bias)
        weights = None if self.weights is None else take(self.weights, rows)
        # "mean" divides D by the classes, and by the rows of this chunk, which is taken back.
        mean = set.reduction == "mean"
        loss, grad, made_weights, made_alpha, made_stats = self.row_kernel(
            student,
            only,
            rows,
            weights,
            labels,
            keep,
            "mean" if mean else "none",
            need_student,
            need_weights,
            need_alpha,
        )
        by: Any = 1.0 if divisor is None else 1.0 / divisor
        if mean:
            counted: Any = student.shape[0] if keep is None else keep.sum().clamp(min=1)
            by = by * counted
            loss = (loss * (counted / student.shape[0])).expand(student.shape[0])
        if self.grad_loss is not None:
            by = take(self.grad_loss, rows).to(self.wide).unsqueeze(1)
        _put(losses, rows, loss)
        if self.need_stats:
            if self.index is None:
                _put(stats, rows, made_stats)
            else:
                _put(stats[:, :4], rows, made_stats[:, :4])
                _put(stats[:, 4 + only[0]], rows, made_stats[:, 4])
        if need_weights:
            _put(grad_weights, rows, made_weights * by)
        if need_alpha:
            _put(grad_alpha, rows, made_alpha * (by.squeeze(1) if self.grad_loss is not None else by))
        if not need_student:
            return
        if set.softcap:  # times 1 - tanh^2
            student.div_(set.softcap)
            torch.ops.aten.tanh_backward.grad_input(grad, student, grad_input=grad)
        if self.late(divisor):
            by = 1.0
        on_device = isinstance(by, Tensor)
        scale = set.logit_scale * (1.0 if on_device else by)
        made = self.add_grads(grad, hidden, by if on_device else None, scale, first)
        if made is not None:
            _put(grad_hidden, rows, made)

    def row_kernel(
        self,
        student: Tensor,
        only: list[int],
        rows: Tensor | slice,
        weights: Tensor | None,
        labels: Tensor | None,
        keep: Tensor | None,
        reduction: str,
        need_student: bool,
        need_weights: bool,
        need_alpha: bool,
    ) -> tuple[Tensor, ...]:
        """Losses of the rows (or their mean), and the gradients to logits, weights and alpha and the statistics, or empty ones."""
        set, ops, none = self.set, kernels(self.set.backend), student.new_empty(0)
        shared = reduction, set.ignore_index, set.label_smoothing
        kl_scale = set.temperature**2 if set.t2_scale else 1.0
        eq8 = set.temperature, set.ce_weight, set.kl_weight, kl_scale
        if set.row_kernel == "topk_kd":
            tensors = [[self.take(x, rows) for x in self.teachers[t]] for t in only]
            index, log_probs = (torch.cat(x, 1) for x in zip(*tensors))
            sizes = [x[0].shape[1] for x in tensors]
            loss, _, grad, of_weights = ops.topk_kd_fwd.default(
                student, index.long(), log_probs.to(self.wide), sizes, weights, labels, *eq8, "renormalize", *shared,
                need_student, need_weights,
            )  # fmt: skip
            return loss, grad, of_weights, none, none
        given = [self.teacher(t, rows, keep) for t in only]
        if set.row_kernel == "multi_teacher_kd":
            out = ops.multi_teacher_kd_fwd.default(
                student, given, weights, labels, *eq8, set.mode, *shared, need_student, need_weights, False
            )
            return out[0], out[6], out[7], none, none
        taus = [set.teacher_temperatures[t] for t in only] if set.teacher_temperatures else []
        alphas, temperatures = (None if x is None else self.take(x, rows) for x in (self.alphas, self.temperatures))
        return ops.divergence_fwd.default(
            student, given, weights, labels, alphas, temperatures, set.divergence, set.beta, set.mode, taus, set.temperature,
            set.t2_scale, set.ce_weight, set.kl_weight, *shared, need_student, need_weights, need_alpha, self.need_stats,
        )  # fmt: skip


def _reads_free(hidden: Tensor) -> bool:
    """Whether looking at values costs no sync."""
    return hidden.device.type == "cpu"


def _narrow(hidden: Tensor, weight: Tensor, wide: torch.dtype) -> bool:
    """Whether torch multiplies these 16-bit numbers into float32 as they are."""
    return hidden.device.type == "cuda" and hidden.dtype == weight.dtype != wide == torch.float32


def _narrow_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``a @ b`` of 16-bit numbers, summed and given in float32."""
    torch.mm(a, b, out_dtype=torch.float32, out=out)


@functools.cache
def _adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds such a product to a float32 matrix; some versions want a matrix of the factors' dtype."""
    one = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.ones(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, one, one, out_dtype=torch.float32, out=total)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, out: Tensor) -> None:
    """``scale * (hidden @ weight + bias)`` of one dtype."""
    if bias is None:
        torch.addmm(out, hidden, weight, beta=0, alpha=scale, out=out)
    else:
        torch.addmm(bias, hidden, weight, beta=scale, alpha=scale, out=out)


def _kept(x: Tensor, keep: Tensor | None) -> Tensor:
    """0 in rows that do not count."""
    return x if keep is None else x.masked_fill(~keep.unsqueeze(1), 0)


def _put(out: Tensor, rows: Tensor | slice, values: Tensor) -> None:
    if isinstance(rows, slice):
        out[rows] = values
    else:
        out.index_copy_(0, rows, values.to(out.dtype))


def _together(index: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, k] classes and log-probabilities, sorted by class; a class that is named twice has the sum of both in all places."""
    index, order = index.sort(1)
    log_probs = log_probs.gather(1, order)
    run = torch.zeros_like(index)
    run[:, 1:] = (index[:, 1:] != index[:, :-1]).cumsum(1)  # which of the classes that are named
    most = torch.full_like(log_probs, -torch.inf).scatter_reduce_(1, run, log_probs, "amax")
    share = (log_probs - most.gather(1, run)).masked_fill_(log_probs == -torch.inf, -torch.inf).exp_()
    total = torch.zeros_like(share).scatter_add_(1, run, share).log_().add_(most)
    return index, total.gather(1, run)
