"""Every operator's schema and fake implementation: the only file that talks to ``torch.library``.

Two namespaces with the same schemas: ``amtml``, which csrc/cpu and csrc/cuda implement, and ``amtml_triton``, which
kernels/ implements. So every backend has these signatures. There are no default arguments: autograd.Function would drop
trailing ones. Outputs not asked for are empty tensors of shape [0].
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from amtml_fast.reference import wide_dtype

_KD_SETTINGS = (
    "float temperature, float ce_weight, float kl_weight, float kl_scale, str mode, str reduction, "
    "int ignore_index, float label_smoothing"
)
# (rescale_ names the mode kl_of: torch.compile keeps the name for itself in operators that write into their arguments.)
_TOPK_SETTINGS = _KD_SETTINGS.replace("mode", "tail")

SCHEMAS = {
    # weights [N, T], pooled [N, d], index [N, d] int32 position of the maximum in its plane
    "teacher_weights_fwd": "(Tensor features, Tensor theta, Tensor v, bool max_pool) -> (Tensor, Tensor, Tensor)",
    "teacher_weights_bwd": "(Tensor grad, Tensor features, Tensor theta, Tensor v, Tensor pooled, "
    "Tensor index, bool max_pool, bool need_features, bool need_parameters) -> (Tensor, Tensor, Tensor)",
    # loss, ce, kl (scalars, or [N] for "none"), student_probs and soft_targets [N, C], stats [N, 3 + 2T], grad_student,
    # grad_weights
    "multi_teacher_kd_fwd": "(Tensor student, Tensor[] teachers, Tensor? weights, Tensor? labels, "
    f"{_KD_SETTINGS}, bool need_student_grad, bool need_weights_grad, bool need_probs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "multi_teacher_kd_bwd": "(Tensor grad_loss, Tensor? grad_probs, Tensor? grad_targets, Tensor student, "
    f"Tensor[] teachers, Tensor? weights, Tensor? labels, Tensor stats, {_KD_SETTINGS}, "
    "bool need_student_grad, bool need_weights_grad) -> (Tensor, Tensor)",
    # The gradients that forward has made of a bfloat16 student, and of its weights, for an incoming gradient of 1: made
    # those for grad_loss, in place
    "multi_teacher_kd_rescale_": "(Tensor(a!) grad_student, Tensor(b!) grad_weights, Tensor grad_loss, Tensor student, "
    f"Tensor[] teachers, Tensor? weights, Tensor? labels, Tensor stats, {_KD_SETTINGS.replace('mode', 'kl_of')}) -> ()",
    # All teachers' entries of a row side by side: indices (int64) and log_probs [N, K], of teacher t the next sizes[t].
    # loss (scalar, or [N] for "none"), stats [N, 3], grad_student, grad_weights
    "topk_kd_fwd": "(Tensor student, Tensor indices, Tensor log_probs, int[] sizes, Tensor? weights, Tensor? labels, "
    f"{_TOPK_SETTINGS}, bool need_student_grad, bool need_weights_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    "topk_kd_bwd": "(Tensor grad_loss, Tensor student, Tensor indices, Tensor log_probs, int[] sizes, Tensor? weights, "
    f"Tensor? labels, Tensor stats, {_TOPK_SETTINGS}, bool need_student_grad, bool need_weights_grad) "
    "-> (Tensor, Tensor)",
    # loss, and unless the reduction is "none" its gradients
    "angle_fwd": "(Tensor student, Tensor teacher, Tensor? row_mask, float delta, float eps, str reduction, "
    "bool need_student_grad, bool need_teacher_grad) -> (Tensor, Tensor, Tensor)",
    "angle_bwd": "(Tensor grad_loss, Tensor student, Tensor teacher, Tensor? row_mask, float delta, float eps, "
    "bool need_student_grad, bool need_teacher_grad) -> (Tensor, Tensor)",
    # loss and its gradients
    "distance_fwd": "(Tensor student, Tensor teacher, float delta, float eps, str reduction, "
    "bool need_student_grad, bool need_teacher_grad) -> (Tensor, Tensor, Tensor)",
    # Teacher weights (of features, theta and v, or given), distillation, angle and regulariser in one. loss; terms [6]:
    # kd, ce, kl, angle, 0 for the hint, regulariser; weights (unless given), pooled and index as above; stats; what the
    # angle loss sends back
    "whole_loss_fwd": "(Tensor? features, Tensor? theta, Tensor? v, Tensor? weights, Tensor student, Tensor[] teachers, "
    f"Tensor? labels, Tensor? divisor, {_KD_SETTINGS}, bool max_pool, float angle_weight, float delta, float eps, "
    "float regularizer_weight, bool need_student_grad, bool need_targets_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # gradients to student, given weights, features, theta, v
    "whole_loss_bwd": "(Tensor grad, Tensor? features, Tensor? theta, Tensor? v, Tensor weights, Tensor pooled, "
    "Tensor index, Tensor student, Tensor[] teachers, Tensor? labels, Tensor stats, Tensor grad_probs, "
    f"Tensor grad_targets, Tensor? divisor, {_KD_SETTINGS}, bool max_pool, float angle_weight, "
    "float regularizer_weight, bool need_student, bool need_weights, bool need_features, bool need_parameters) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    # pooled [N, c, height, width], norms [N, H, W] (if normalised)
    "hint_pool_fwd": "(Tensor feature_map, int height, int width, bool normalize) -> (Tensor, Tensor)",
    "hint_pool_bwd": "(Tensor grad, Tensor feature_map, Tensor norms, bool normalize) -> Tensor",
    # loss of maps of the same height and width, and its gradients
    "hint_fwd": "(Tensor student, Tensor teacher, Tensor weight, bool need_student_grad, bool need_teacher_grad, "
    "bool need_weight_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    # loss, d loss / d prediction = -d loss / d target
    "hint_mse_fwd": "(Tensor prediction, Tensor target, bool need_grad) -> (Tensor, Tensor)",
    # rows [N, ...] float32 times by, [N] or [], in place; where that is 1, nothing is read or written
    "scale_rows_": "(Tensor(a!) rows, Tensor by) -> ()",
    # scores [B, R, K]. result; the softmax over R, in the wide dtype; maxima and sums of the softmax over K [B, R, 2]
    "dual_softmax_fwd": "(Tensor scores, str mode) -> (Tensor, Tensor, Tensor)",
    "dual_softmax_bwd": "(Tensor grad, Tensor scores, Tensor first, Tensor row_stats, str mode) -> Tensor",
}

CPU_ONLY = ("hint_fwd",)  # on GPUs the convolution is torch's, and hint_mse_fwd follows
GPU_ONLY = ("multi_teacher_kd_rescale_", "scale_rows_")

TRITON = {  # schema -> its file in kernels/
    name: next(
        op
        for op in (
            "teacher_weights",
            "multi_teacher_kd",
            "topk_kd",
            "angle",
            "distance",
            "hint",
            "dual_softmax",
            "scale_rows",
        )
        if name.startswith(op)
    )
    for name in SCHEMAS
    if not name.startswith("whole_loss") and name not in CPU_ONLY
}


def _launch(name: str, *args: Any) -> Any:
    """The Triton kernel, on the device of its tensors. Imported here: Triton is optional."""
    launcher = getattr(importlib.import_module(f"amtml_fast.kernels.{TRITON[name]}"), name)
    device = args[0].device
    if device.type == "cpu":  # the interpreter
        return launcher(*args)
    with torch.get_device_module(device).device(device):
        return launcher(*args)


for _name, _schema in SCHEMAS.items():
    torch.library.define(f"amtml::{_name}", _schema)
    if _name in TRITON:
        torch.library.define(f"amtml_triton::{_name}", _schema)
        for _key in ("CPU", "CUDA", "XPU"):
            torch.library.impl(f"amtml_triton::{_name}", _key)(functools.partial(_launch, _name))


def _fake(name: str) -> Callable:
    def register(function: Callable) -> Callable:
        torch.library.register_fake(f"amtml::{name}", function)
        if name in TRITON:
            torch.library.register_fake(f"amtml_triton::{name}", function)
        return function

    return register


def _empty(like: Tensor, wanted: bool, shape: tuple, dtype: torch.dtype) -> Tensor:
    return like.new_empty(shape if wanted else (0,), dtype=dtype)


@_fake("teacher_weights_fwd")
def _(features, theta, v, max_pool):
    n, d, wide = features.shape[0], features.shape[1], wide_dtype(features, theta)
    index = _empty(features, max_pool, (n, d), torch.int32)
    return features.new_empty(n, theta.shape[0], dtype=wide), features.new_empty(n, d, dtype=wide), index


@_fake("teacher_weights_bwd")
def _(grad, features, theta, v, pooled, index, max_pool, need_features, need_parameters):
    grad_features = torch.empty_like(features) if need_features else features.new_empty(0)
    return (
        grad_features,
        _empty(theta, need_parameters, theta.shape, theta.dtype),
        _empty(v, need_parameters, v.shape, v.dtype),
    )


@_fake("multi_teacher_kd_fwd")
def _(student, teachers, weights, labels, *settings):
    reduction = settings[5]
    need_student_grad, need_weights_grad, need_probs = settings[-3:]
    wide = wide_dtype(student, *teachers, weights)
    n, c = student.shape
    value = [student.new_empty((n,) if reduction == "none" else (), dtype=wide) for _ in range(3)]
    probs = [_empty(student, need_probs, (n, c), wide) for _ in range(2)]
    stats = student.new_empty(n, 3 + 2 * len(teachers), dtype=wide)
    made = torch.bfloat16 if need_student_grad and student.dtype == torch.bfloat16 else wide
    grad_student = _empty(student, need_student_grad, (n, c), made)
    grad_weights = _empty(student, need_weights_grad, (n, len(teachers)), wide)
    return *value, *probs, stats, grad_student, grad_weights


@_fake("multi_teacher_kd_bwd")
def _(grad_loss, grad_probs, grad_targets, student, teachers, weights, labels, stats, *settings):
    need_student_grad, need_weights_grad = settings[-2:]
    return (
        _empty(student, need_student_grad, student.shape, student.dtype),
        _empty(student, need_weights_grad, (student.shape[0], len(teachers)), stats.dtype),
    )


@_fake("multi_teacher_kd_rescale_")
def _(*_): ...


@_fake("scale_rows_")
def _(rows, by): ...


@_fake("topk_kd_fwd")
def _(student, indices, log_probs, sizes, weights, labels, *settings):
    reduction = settings[5]
    need_student_grad, need_weights_grad = settings[-2:]
    wide, n = wide_dtype(student, log_probs, weights), student.shape[0]
    return (
        student.new_empty((n,) if reduction == "none" else (), dtype=wide),
        student.new_empty(n, 3, dtype=wide),
        _empty(student, need_student_grad, student.shape, wide),
        _empty(student, need_weights_grad, (n, len(sizes)), wide),
    )


@_fake("topk_kd_bwd")
def _(grad_loss, student, indices, log_probs, sizes, weights, labels, stats, *settings):
    need_student_grad, need_weights_grad = settings[-2:]
    return (
        _empty(student, need_student_grad, student.shape, student.dtype),
        _empty(student, need_weights_grad, (student.shape[0], len(sizes)), stats.dtype),
    )


def _pair_grads(student, teacher, need_student_grad, need_teacher_grad):
    wide = wide_dtype(student, teacher)
    return (
        _empty(student, need_student_grad, student.shape, wide),
        _empty(teacher, need_teacher_grad, teacher.shape, wide),
    )


@_fake("angle_fwd")
def _(student, teacher, row_mask, delta, eps, reduction, need_student_grad, need_teacher_grad):
    none = reduction == "none"
    loss = student.new_empty(student.shape[:1] if none else (), dtype=wide_dtype(student, teacher))
    return loss, *_pair_grads(student, teacher, need_student_grad and not none, need_teacher_grad and not none)


@_fake("angle_bwd")
def _(grad_loss, student, teacher, row_mask, delta, eps, need_student_grad, need_teacher_grad):
    return _pair_grads(student, teacher, need_student_grad, need_teacher_grad)


@_fake("distance_fwd")
def _(student, teacher, delta, eps, reduction, need_student_grad, need_teacher_grad):
    loss = student.new_empty((), dtype=wide_dtype(student, teacher))
    return loss, *_pair_grads(student, teacher, need_student_grad, need_teacher_grad)


@_fake("whole_loss_fwd")
def _(features, theta, v, weights, student, teachers, labels, divisor, *settings):
    max_pool, angle_weight, *_, need_student_grad, need_targets_grad = settings[8:]
    n, c = student.shape
    made = [student.new_empty(0, dtype=torch.float32) for _ in range(3)]
    if features is not None:
        wide, d = wide_dtype(features, theta, v), features.shape[1]
        weights = features.new_empty(n, theta.shape[0], dtype=wide)
        index = _empty(features, max_pool, (n, d), torch.int32)
        made = [weights, features.new_empty(n, d, dtype=wide), index]
    wide = wide_dtype(student, *teachers, weights)
    back = [
        student.new_empty((n, c) if needed else (0,), dtype=wide if angle_weight != 0 else torch.float32)
        for needed in (need_student_grad and angle_weight != 0, need_targets_grad and angle_weight != 0)
    ]
    stats = student.new_empty(n, 3 + 2 * len(teachers), dtype=wide)
    return student.new_empty((), dtype=wide), student.new_empty(6, dtype=wide), *made, stats, *back


@_fake("whole_loss_bwd")
def _(grad, features, theta, v, weights, pooled, index, student, teachers, *settings):
    need_student, need_weights, need_features, need_parameters = settings[-4:]
    given = features is None
    grad_student = _empty(student, need_student, student.shape, student.dtype)
    grads = [student.new_empty(0, dtype=torch.float32) for _ in range(4)]
    if given:
        grads[0] = _empty(weights, need_weights, weights.shape, weights.dtype)
    elif need_weights:
        grads[1] = torch.empty_like(features) if need_features else features.new_empty(0)
        for i, t in ((2, theta), (3, v)):
            grads[i] = t.new_empty(t.shape) if need_parameters else t.new_empty(0, dtype=pooled.dtype)
    return grad_student, *grads


@_fake("hint_pool_fwd")
def _(feature_map, height, width, normalize):
    n, c, h, w = feature_map.shape
    wide = wide_dtype(feature_map)
    return feature_map.new_empty(n, c, height, width, dtype=wide), _empty(feature_map, normalize, (n, h, w), wide)


@_fake("hint_pool_bwd")
def _(grad, feature_map, norms, normalize):
    return torch.empty_like(feature_map, memory_format=_map_layout(feature_map))


@_fake("hint_fwd")
def _(student, teacher, weight, *needs):
    inputs = student, teacher, weight
    wide, layouts = wide_dtype(*inputs), (_map_layout(student), _map_layout(teacher), torch.contiguous_format)
    grads = (
        torch.empty_like(t, dtype=wide, memory_format=layout) if needed else student.new_empty(0, dtype=wide)
        for t, needed, layout in zip(inputs, needs, layouts)
    )
    return student.new_empty((), dtype=wide), *grads


def _map_layout(feature_map: Tensor) -> torch.memory_format:
    """Of a gradient to it: on the CPU its own."""
    last = feature_map.device.type == "cpu" and feature_map.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not feature_map.is_contiguous() else torch.contiguous_format


@_fake("hint_mse_fwd")
def _(prediction, target, need_grad):
    wide = wide_dtype(prediction, target)
    return prediction.new_empty((), dtype=wide), _empty(prediction, need_grad, prediction.shape, wide)


@_fake("dual_softmax_fwd")
def _(scores, mode):
    b, r, k = scores.shape
    wide = wide_dtype(scores)
    return scores.new_empty(b, r, k), scores.new_empty(b, r, k, dtype=wide), scores.new_empty(b, r, 2, dtype=wide)


@_fake("dual_softmax_bwd")
def _(grad, scores, first, row_stats, mode):
    return torch.empty_like(scores, memory_format=torch.contiguous_format)
