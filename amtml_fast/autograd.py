"""One autograd.Function per operator, and one for the whole loss, over the raw ops: the cheapest route to ``backward``.

Float32 and float64 gradients are written by the forward kernel, next to the value, and only multiplied in backward: in
place where the graph is not kept, so that a second backward still finds what it needs. 16-bit gradients are to be rounded
once, after the incoming gradient (and a loss scale with it) has been applied: backward makes them from saved row
statistics. On GPUs forward writes those of bfloat16 too, and backward makes them again unless the incoming gradient is a
power of two; float16 has too small a range for that.

Arguments ``need_*`` are decided by the caller: inside ``forward`` grad mode is always off.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

ops, triton_ops = torch.ops.amtml, torch.ops.amtml_triton


def _kernels(backend: str) -> Any:
    """The operators of a backend; those of ``amtml`` go by the device of their tensors."""
    return triton_ops if backend == "triton" else ops


class _NoContext:
    """Stands in for an autograd context where there is nothing to differentiate."""

    def save_for_backward(self, *_: Tensor | None) -> None: ...
    def mark_non_differentiable(self, *_: Tensor) -> None: ...
    def set_materialize_grads(self, _: bool) -> None: ...


def run(function: type[torch.autograd.Function], needs_grad: bool, *args: Any) -> Any:
    """``function.apply(*args)``, or its forward alone where nothing requires grad.

    That is cheaper, and torch.compile (2.13) misplaces the arguments of an ``apply`` without a gradient.
    """
    return function.apply(*args) if needs_grad else function.forward(_NoContext(), *args)


_NO_SECOND = (
    "{}: the fused backends have no second derivative; "
    'compute this part under amtml_fast.use_backend("reference"), which has'
)
_LEVELS = 64  # of vmap that torch can nest
_is_batched, _is_legacy_batched = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor


class _NoSecondDerivative(torch.autograd.Function):
    """Identity on a gradient whose own backward raises: never a silently missing second derivative.

    ``inputs`` are what the gradient depends on, so that whoever asks for their second derivative gets here.
    """

    @staticmethod
    def forward(ctx: Any, op: str, grad: Tensor, *inputs: Tensor) -> Tensor:
        ctx.op = op
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(_NO_SECOND.format(ctx.op))


def _first_order(op: str) -> Callable:
    """Decorate ``backward``: no graph inside it, and a clear error if someone differentiates it again. Incoming gradients
    that vmap has stacked (``is_grads_batched``) come one at a time.

    Every differentiable input must be among the saved tensors, whether or not ``backward`` reads it.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def wrapped(ctx: Any, *grads: Tensor) -> Any:
            stacked = None if torch.compiler.is_compiling() else _stacked(grads)
            if not torch.is_grad_enabled():  # always, unless a graph of this backward is asked for
                return backward(ctx, *grads) if stacked is None else _one_by_one(wrapped, ctx, grads, stacked)
            if stacked is not None:
                raise RuntimeError(_NO_SECOND.format(op))
            with torch.no_grad():
                out = backward(ctx, *grads)
            if torch.compiler.is_compiling():
                return out
            inputs = [t for t in (*ctx.saved_tensors, *grads) if t is not None and t.requires_grad]
            return tuple(_NoSecondDerivative.apply(op, g, *inputs) if isinstance(g, Tensor) else g for g in out)

        return wrapped

    return decorate


def _stacked(grads: tuple) -> Tensor | None:
    """The first of the gradients that vmap has stacked."""
    for g in grads:
        if g is not None and (_is_legacy_batched(g) or _is_batched(g)):
            return g
    return None


def _one_by_one(backward: Callable, ctx: Any, grads: tuple, stacked: Tensor) -> tuple:
    """``backward`` of each of the gradients that one level of vmap has stacked; kernels know no stacks."""
    vmap: Any
    if _is_batched(stacked):
        vmap, level = torch._C._functorch, torch._C._functorch.maybe_get_level(stacked)
    else:  # autograd's is_grads_batched has a vmap of its own, and a GPU's backward a thread that does not count levels
        vmap, level = (
            torch,
            next(k for k in range(_LEVELS, 0, -1) if torch._remove_batch_dim(stacked, k, 0, 0).shape[0]),
        )
    size = vmap._remove_batch_dim(stacked, level, 0, 0).shape[0]
    ctx.keep = True
    each = [None if g is None else vmap._remove_batch_dim(g, level, size, 0).unbind() for g in grads]
    outs = [backward(ctx, *(None if g is None else g[i] for g in each)) for i in range(size)]
    return tuple(
        vmap._add_batch_dim(torch.stack(out), 0, level) if isinstance(out[0], Tensor) else None for out in zip(*outs)
    )


_is_inference = torch.Tensor.is_inference


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    """save_for_backward that also takes inference tensors (a teacher's): autograd may not save those, nor need it."""
    ctx.inference = None
    if not torch.compiler.is_compiling() and any(map(_is_inference, [t for t in tensors if t is not None])):
        ctx.inference = {i: t for i, t in enumerate(tensors) if t is not None and t.is_inference()}
        tensors = tuple(None if i in ctx.inference else t for i, t in enumerate(tensors))
    ctx.save_for_backward(*tensors)


def _saved(ctx: Any) -> tuple[Any, ...]:
    if not ctx.inference:
        return ctx.saved_tensors
    return tuple(ctx.inference.get(i, t) for i, t in enumerate(ctx.saved_tensors))


def _asked(grad: Tensor | None, needed: bool) -> Tensor | None:
    return grad if needed else None


def _scaled(ctx: Any, grads: Iterable[Tensor | None], by: Tensor) -> list[Any]:
    """``grad * by`` of gradients that forward has saved, without a second buffer where no second backward can come."""
    if not _for_the_last_time(ctx):
        return [None if g is None else g * by for g in grads]
    if type(by) is Tensor and by.dim() == 0 and by.is_cpu and by.item() == 1:
        return list(grads)
    return [None if g is None else g.mul_(by) for g in grads]


def _for_the_last_time(ctx: Any) -> bool:
    """Whether nobody asks for the saved tensors again, so that they may be overwritten."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._autograd._get_current_graph_task_keep_graph()
        or getattr(ctx, "keep", False)
    )


def _save_grads(ctx: Any, grads: Iterable[Tensor], inputs: Iterable[Tensor | None], needs: tuple[bool, bool]) -> None:
    """Gradients that forward has made, and what they belong to; None for what needs none."""
    # What needs a gradient cannot be an inference tensor.
    ctx.save_for_backward(*map(_asked, grads, needs), *map(_asked, inputs, needs))


def _scaled_rows(ctx: Any, grad_loss: Tensor) -> list[Any]:
    """The gradients of ``_save_grads`` from that of the loss, which may have one value a row."""
    if ctx.backend != "cpp" and _for_the_last_time(ctx):
        grads = ctx.saved_tensors[:2]
        for g in grads:
            if g is not None:
                _kernels(ctx.backend).scale_rows_.default(g, grad_loss)
        return list(grads)
    return _scaled(ctx, ctx.saved_tensors[:2], grad_loss.unsqueeze(-1) if grad_loss.dim() else grad_loss)


class TeacherWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, features: Tensor, theta: Tensor, v: Tensor, max_pool: bool) -> Tensor:
        weights, pooled, index = _kernels(backend).teacher_weights_fwd.default(features, theta, v, max_pool)
        _save(ctx, features, theta, v, pooled, index)
        ctx.max_pool, ctx.backend = max_pool, backend
        return weights

    @staticmethod
    @_first_order("teacher_weights")
    def backward(ctx: Any, grad: Tensor) -> tuple:
        _, need_features, need_theta, need_v, _ = ctx.needs_input_grad
        grads = _kernels(ctx.backend).teacher_weights_bwd.default(
            grad, *_saved(ctx), ctx.max_pool, need_features, need_theta or need_v
        )
        return None, _asked(grads[0], need_features), _asked(grads[1], need_theta), _asked(grads[2], need_v), None


class MultiTeacherKD(torch.autograd.Function):
    """Returns the loss, or with ``need_terms`` what ``KDTerms`` holds: ce and kl are not differentiable, the rest is.

    ``needs``: a gradient to the student, and to the weights; ``wide``: the dtype of sums.
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        student: Tensor,
        weights: Tensor | None,
        labels: Tensor | None,
        settings: tuple,
        needs: tuple[bool, bool],
        wide: torch.dtype,
        need_terms: bool,
        *teachers: Tensor,
    ) -> Any:
        # With probabilities given out, backward has to add what comes back through them: it recomputes the rest too.
        rounded = student.dtype == torch.bfloat16 and wide == torch.float32 and backend != "cpp"
        in_forward = (student.dtype == wide or rounded) and not need_terms
        now = needs if in_forward else (False, False)
        out = _kernels(backend).multi_teacher_kd_fwd.default(
            student, teachers, weights, labels, *settings, *now, need_terms
        )
        loss, ce, kl, student_probs, soft_targets, stats, grad_student, grad_weights = out
        ctx.in_forward, ctx.settings, ctx.needs, ctx.loss_shape = in_forward, settings, needs, loss.shape
        ctx.backend, ctx.rounded = backend, rounded
        ctx.set_materialize_grads(False)
        if in_forward and rounded:
            _save(ctx, grad_student, grad_weights, student, weights, labels, stats, *teachers)
        elif in_forward:
            _save_grads(ctx, (grad_student, grad_weights), (student, weights), needs)
        else:
            _save(ctx, student, weights, labels, stats, *teachers)
        if not need_terms:
            return loss
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl, student_probs, soft_targets

    @staticmethod
    @_first_order("multi_teacher_kd_loss")
    def backward(ctx: Any, grad_loss: Tensor | None, *grads: Tensor | None) -> tuple:
        fixed = (None,) * (len(ctx.needs_input_grad) - 3)
        if ctx.in_forward:
            if grad_loss is None:
                return None, None, None, *fixed
            made = _rescaled(ctx, grad_loss) if ctx.rounded else _scaled_rows(ctx, grad_loss)
            return None, *map(_asked, made, ctx.needs), *fixed
        need_student, need_weights = ctx.needs
        student, weights, labels, stats, *teachers = _saved(ctx)
        if grad_loss is None:
            grad_loss = stats.new_zeros(ctx.loss_shape)
        through_probs = grads[2:4] or (None, None)
        grad_student, grad_weights = _kernels(ctx.backend).multi_teacher_kd_bwd.default(
            grad_loss, *through_probs, student, teachers, weights, labels, stats, *ctx.settings, *ctx.needs
        )
        return None, _asked(grad_student, need_student), _asked(grad_weights, need_weights), *fixed


def _rescaled(ctx: Any, grad_loss: Tensor) -> list[Tensor]:
    """The bfloat16 gradients of ``MultiTeacherKD`` that forward has made, for this gradient of the loss."""
    *grads, student, weights, labels, stats = _saved(ctx)[:6]
    if not _for_the_last_time(ctx):
        grads = [g.clone() for g in grads]
    _kernels(ctx.backend).multi_teacher_kd_rescale_.default(
        *grads, grad_loss, student, _saved(ctx)[6:], weights, labels, stats, *ctx.settings
    )
    return grads


class TopkKD(torch.autograd.Function):
    """The loss. ``needs``: a gradient to the student, and to the weights; ``wide``: the dtype of sums."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        student: Tensor,
        weights: Tensor | None,
        labels: Tensor | None,
        indices: Tensor,
        log_probs: Tensor,
        sizes: list[int],
        settings: tuple,
        needs: tuple[bool, bool],
        wide: torch.dtype,
    ) -> Tensor:
        ctx.in_forward, ctx.sizes, ctx.settings, ctx.needs = student.dtype == wide, sizes, settings, needs
        now = needs if ctx.in_forward else (False, False)
        loss, stats, *grads = _kernels(backend).topk_kd_fwd.default(
            student, indices, log_probs, sizes, weights, labels, *settings, *now
        )
        ctx.backend = backend
        if ctx.in_forward:
            _save_grads(ctx, grads, (student, weights), needs)
        else:
            _save(ctx, student, indices, log_probs, weights, labels, stats)
        return loss

    @staticmethod
    @_first_order("topk_kd_loss")
    def backward(ctx: Any, grad_loss: Tensor) -> tuple:
        fixed = (None,) * (len(ctx.needs_input_grad) - 3)
        if ctx.in_forward:
            return None, *_scaled_rows(ctx, grad_loss), *fixed
        student, indices, log_probs, weights, labels, stats = _saved(ctx)
        grads = _kernels(ctx.backend).topk_kd_bwd.default(
            grad_loss, student, indices, log_probs, ctx.sizes, weights, labels, stats, *ctx.settings, *ctx.needs
        )
        return None, *map(_asked, grads, ctx.needs), *fixed


class Angle(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        student: Tensor,
        teacher: Tensor,
        row_mask: Tensor | None,
        delta: float,
        eps: float,
        reduction: str,
        need_student: bool,
        need_teacher: bool,
    ) -> Tensor:
        ctx.needs, ctx.backend = (need_student, need_teacher), backend
        loss, *grads = _kernels(backend).angle_fwd.default(
            student, teacher, row_mask, delta, eps, reduction, *ctx.needs
        )
        ctx.reduction, ctx.delta, ctx.eps = reduction, delta, eps
        ctx.dtypes = student.dtype, teacher.dtype
        if reduction == "none":  # the gradient depends on each vertex' incoming gradient
            _save(ctx, student, teacher, row_mask)
        else:
            _save(ctx, *grads, student, teacher)
        return loss

    @staticmethod
    @_first_order("angle_loss")
    def backward(ctx: Any, grad_loss: Tensor) -> tuple:
        if ctx.reduction == "none":
            student, teacher, row_mask = _saved(ctx)
            grads = _kernels(ctx.backend).angle_bwd.default(
                grad_loss, student, teacher, row_mask, ctx.delta, ctx.eps, *ctx.needs
            )
        else:
            grads = _scaled(ctx, map(_asked, _saved(ctx), ctx.needs), grad_loss)
        out = [g.to(dtype) if needed else None for g, dtype, needed in zip(grads, ctx.dtypes, ctx.needs)]
        return None, *out, None, None, None, None, None, None


class Distance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        student: Tensor,
        teacher: Tensor,
        delta: float,
        eps: float,
        reduction: str,
        need_student: bool,
        need_teacher: bool,
    ) -> Tensor:
        ctx.needs, ctx.backend = (need_student, need_teacher), backend
        loss, *grads = _kernels(backend).distance_fwd.default(student, teacher, delta, eps, reduction, *ctx.needs)
        ctx.dtypes = student.dtype, teacher.dtype
        _save(ctx, *grads, student, teacher)
        return loss

    @staticmethod
    @_first_order("rkd_distance_loss")
    def backward(ctx: Any, grad_loss: Tensor) -> tuple:
        grads = _scaled(ctx, map(_asked, _saved(ctx), ctx.needs), grad_loss)
        out = [g.to(dtype) if needed else None for g, dtype, needed in zip(grads, ctx.dtypes, ctx.needs)]
        return None, *out, None, None, None, None, None


class Objective(NamedTuple):
    """What ``WholeLoss`` adds up; ``kd`` are the settings of ``multi_teacher_kd_fwd`` after its tensors."""

    kd: tuple
    max_pool: bool
    angle_weight: float
    delta: float
    eps: float
    angle_trains_weights: bool
    regularizer_weight: float
    needs: tuple[bool, bool]  # a gradient to the student, and to whatever makes the weights


class WholeLoss(torch.autograd.Function):
    """Teacher weights, distillation, angle loss and regulariser as one node of the graph.

    The weights come from ``features``, ``theta`` and ``v``, or are given (then those three are None, and so is the
    regulariser). ``divisor`` divides the kd term. Returns loss, terms [6] (kd, ce, kl, angle, 0 for the hint,
    regulariser) and weights (empty if they were given): the loss alone is differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor | None,
        theta: Tensor | None,
        v: Tensor | None,
        weights: Tensor | None,
        student: Tensor,
        labels: Tensor | None,
        divisor: Tensor | None,
        objective: Objective,
        *teachers: Tensor,
    ) -> tuple[Tensor, ...]:
        kd, max_pool, angle_weight, delta, eps, trains, regularizer_weight, (need_student, need_weights) = objective
        loss, terms, made, *saved = ops.whole_loss_fwd.default(
            features, theta, v, weights, student, teachers, labels, divisor, *kd, max_pool, angle_weight, delta, eps,
            regularizer_weight, need_student, need_weights and trains,
        )  # fmt: skip
        ctx.objective = objective
        ctx.mark_non_differentiable(terms, made)
        ctx.set_materialize_grads(False)
        _save(
            ctx, features, theta, v, made if weights is None else weights, student, labels, divisor, *saved, *teachers
        )
        return loss, terms, made

    @staticmethod
    @_first_order("AMTMLLoss")
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple:
        fixed = (None,) * (len(ctx.needs_input_grad) - 5)
        if grad is None:
            return None, None, None, None, None, *fixed
        features, theta, v, weights, student, labels, divisor, *rest = _saved(ctx)
        pooled, index, stats, grad_probs, grad_targets, *teachers = rest
        kd, max_pool, angle_weight, _, _, _, regularizer_weight, (need_student, need_weights) = ctx.objective
        need_features, need_theta, need_v = ctx.needs_input_grad[:3]
        grads = ops.whole_loss_bwd.default(
            grad, features, theta, v, weights, pooled, index, student, teachers, labels, stats, grad_probs,
            grad_targets, divisor, *kd, max_pool, angle_weight, regularizer_weight, need_student, need_weights,
            need_features, need_theta or need_v,
        )  # fmt: skip
        grad_student, grad_weights, grad_features, grad_theta, grad_v = grads
        out = (grad_features, grad_theta, grad_v, grad_weights, grad_student)
        return *map(_asked, out, ctx.needs_input_grad), *fixed


class HintPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, feature_map: Tensor, height: int, width: int, normalize: bool) -> Tensor:
        pooled, norms = _kernels(backend).hint_pool_fwd.default(feature_map, height, width, normalize)
        _save(ctx, feature_map, norms)
        ctx.normalize, ctx.backend = normalize, backend
        return pooled

    @staticmethod
    @_first_order("hint_loss")
    def backward(ctx: Any, grad: Tensor) -> tuple:
        grad = _kernels(ctx.backend).hint_pool_bwd.default(grad, *_saved(ctx), ctx.normalize)
        return None, grad, None, None, None


class Hint(torch.autograd.Function):
    """On maps of the same height and width; ``needs``: a gradient to student, teacher and weight. On the CPU alone."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]) -> Tensor:
        loss, *grads = ops.hint_fwd.default(student, teacher, weight, *needs)
        ctx.needs, ctx.dtypes = needs, (student.dtype, teacher.dtype, weight.dtype)
        _save(ctx, *grads, student, teacher, weight)
        return loss

    @staticmethod
    @_first_order("hint_loss")
    def backward(ctx: Any, grad_loss: Tensor) -> tuple:
        grads = _scaled(ctx, map(_asked, _saved(ctx), ctx.needs), grad_loss)
        return *(g.to(dtype) if needed else None for g, dtype, needed in zip(grads, ctx.dtypes, ctx.needs)), None


class HintMSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, prediction: Tensor, target: Tensor, need_grad: bool) -> Tensor:
        loss, difference = _kernels(backend).hint_mse_fwd.default(prediction, target, need_grad)
        _save(ctx, difference, prediction, target)
        ctx.dtypes = prediction.dtype, target.dtype
        return loss

    @staticmethod
    @_first_order("hint_loss")
    def backward(ctx: Any, grad_loss: Tensor) -> tuple:
        difference, *_ = _saved(ctx)
        (grad,) = _scaled(ctx, [difference], grad_loss)
        _, need_prediction, need_target, _ = ctx.needs_input_grad
        return (
            None,
            grad.to(ctx.dtypes[0]) if need_prediction else None,
            grad.neg().to(ctx.dtypes[1]) if need_target else None,
            None,
        )


class DualSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, scores: Tensor, mode: str) -> Tensor:
        out, first, row_stats = _kernels(backend).dual_softmax_fwd.default(scores, mode)
        _save(ctx, scores, first, row_stats)
        ctx.mode, ctx.backend = mode, backend
        return out

    @staticmethod
    @_first_order("dual_softmax")
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return None, _kernels(ctx.backend).dual_softmax_bwd.default(grad, *_saved(ctx), ctx.mode), None
