"""What all operators share: how a raw op is defined, how its kernels are reached, and the tools of its autograd.Function.

Raw ops are in two namespaces with the same schemas: ``amtml``, which csrc/cpu and csrc/cuda implement, and ``amtml_triton``,
which kernels/ implements. They have no default arguments: autograd.Function would drop trailing ones. An output that is not
asked for is an empty tensor of shape [0].

The losses' forward kernels write float32 and float64 gradients next to the value, and backward only multiplies them: in place
where the graph is not kept, so that a second backward still finds what it needs. A 16-bit gradient must be rounded once, after the
incoming gradient (and a loss scale with it) has been applied: backward makes it from saved row statistics. Of bfloat16,
multi_teacher_kd writes gradients too, and backward makes them again unless the incoming gradient is a power of two; float16 has
too small a range for that.
"""

import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from amtml_fast import backend

# --- raw ops

SCHEMAS: dict[str, str] = {}
TRITON: dict[str, str] = {}  # schema -> its file in kernels/
CPU_ONLY: set[str] = set()
GPU_ONLY: set[str] = set()


def operator(stem: str) -> None:
    """Registers an operator, for which every backend has kernels."""
    backend.OPS.append(stem)
    for ops in backend.KERNELS.values():
        ops.append(stem)


def define(
    name: str, schema: str, *, triton: str | None = "", cpu: bool = True, gpu: bool = True
) -> Callable[[Callable], None]:
    """Defines a raw op on the function that is its fake: the shapes and dtypes of its outputs, which torch.compile asks for.

    triton: the file in kernels/ that has its launcher, by default the one named like the fake's own file; None: there is none.
    cpu, gpu: whether csrc/cpu and csrc/cuda implement it.
    """

    def register(fake: Callable) -> None:
        SCHEMAS[name] = schema
        if not gpu:
            CPU_ONLY.add(name)
        if not cpu:
            GPU_ONLY.add(name)
        torch.library.define(f"amtml::{name}", schema)
        torch.library.register_fake(f"amtml::{name}", fake)
        if triton is None:
            return
        TRITON[name] = triton or fake.__module__.rpartition(".")[2]
        torch.library.define(f"amtml_triton::{name}", schema)
        torch.library.register_fake(f"amtml_triton::{name}", fake)
        for key in ("CPU", "CUDA", "XPU"):
            torch.library.impl(f"amtml_triton::{name}", key)(functools.partial(_launch, name))

    return register


@functools.cache
def _launcher(name: str) -> Callable:
    """Imported late: Triton is optional."""
    return getattr(importlib.import_module(f"amtml_fast.kernels.{TRITON[name]}"), name)


def _launch(name: str, *args: Any) -> Any:
    """The Triton kernel, on the device of its tensors."""
    device = next(a for a in args if isinstance(a, Tensor)).device
    if device.type == "cpu":  # the interpreter
        return _launcher(name)(*args)
    module = torch.get_device_module(device)
    if device.index == module.current_device():
        return _launcher(name)(*args)
    with module.device(device):
        return _launcher(name)(*args)


def empty(like: Tensor, wanted: bool, shape: tuple, dtype: torch.dtype) -> Tensor:
    """For fakes: an output of this shape, or [0] if it is not wanted."""
    return like.new_empty(shape if wanted else (0,), dtype=dtype)


_PLAIN = {Tensor, torch.nn.Parameter, type(None), float, int, bool, str, list, tuple}


def _negated(args: Iterable) -> bool:
    """Whether a tensor stands for the negative of what is in its memory, as the imaginary part of a conjugate does."""
    for a in args:
        kind = type(a)
        if kind is Tensor or kind is torch.nn.Parameter:
            if a.is_neg():
                return True
        elif (kind is list or kind is tuple) and _negated(a):
            return True
    return False


class _Direct:
    """The Triton launchers under the names of their raw ops. They are called without torch's dispatcher, which takes as long as two
    or three launches; arguments that only the dispatcher can handle still go through it."""

    def __getattr__(self, name: str) -> Any:
        def default(*args: Any) -> Any:
            if _PLAIN.issuperset(map(type, args)) and not _negated(args):
                return _launch(name, *args)
            return getattr(torch.ops.amtml_triton, name).default(*args)

        op = type("Op", (), {"default": staticmethod(default)})
        setattr(self, name, op)
        return op


_DIRECT = _Direct()
_dispatch_modes, _profiled = torch._C._len_torch_dispatch_stack, torch._C._autograd._profiler_enabled


def kernels(backend_name: str) -> Any:
    """The raw ops of a backend. Those of ``amtml`` go by the device of their tensors."""
    if backend_name != "triton":
        return torch.ops.amtml
    # Whoever traces, watches or profiles is to see an op.
    if torch.compiler.is_compiling() or _dispatch_modes() or _profiled():
        return torch.ops.amtml_triton
    return _DIRECT


# --- autograd


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a gradient to one of these is wanted. Asked before ``run``: inside ``forward`` grad mode is always off."""
    if torch.is_grad_enabled():
        for t in tensors:  # a loop: any() over a generator takes twice as long
            if t is not None and t.requires_grad:
                return True
    return False


class _NoContext:
    """Stands in for an autograd context where there is nothing to differentiate."""

    def save_for_backward(self, *_: Tensor | None) -> None: ...
    def mark_non_differentiable(self, *_: Tensor) -> None: ...
    def set_materialize_grads(self, _: bool) -> None: ...


def run(function: type[torch.autograd.Function], with_grad: bool, *args: Any) -> Any:
    """``function.apply(*args)``, or its forward alone where nothing requires grad.

    That is cheaper, and torch.compile (2.13) misplaces the arguments of an ``apply`` without a gradient.
    """
    return function.apply(*args) if with_grad else function.forward(_NoContext(), *args)


_NO_SECOND = (
    "the fused backends have no second derivative; "
    'compute this part under amtml_fast.use_backend("reference"), which has one'
)


class _NoSecondDerivative(torch.autograd.Function):
    """Identity on a gradient whose own backward raises: never a silently missing second derivative.

    ``inputs`` are what the gradient depends on, so that whoever asks for their second derivative gets here.
    """

    @staticmethod
    def forward(ctx: Any, error: str, grad: Tensor, *inputs: Tensor) -> Tensor:
        ctx.error = error
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(ctx.error)


def first_order(op: str, why: str = _NO_SECOND) -> Callable:
    """Decorates ``backward``: no graph inside it, and a clear error if someone differentiates it again. Incoming gradients
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
                raise RuntimeError(f"{op}: {why}")
            if torch.compiler.is_compiling():
                with torch.no_grad():
                    return backward(ctx, *grads)
            ctx.held = kept = ctx.saved_tensors
            try:
                with torch.no_grad():
                    out = backward(ctx, *grads)
            finally:
                ctx.held = None
            inputs = [t for t in (*kept, *grads) if t is not None and t.requires_grad]
            return tuple(
                _NoSecondDerivative.apply(f"{op}: {why}", g, *inputs) if isinstance(g, Tensor) else g for g in out
            )

        return wrapped

    return decorate


_LEVELS = 64  # of vmap that torch can nest
_is_batched, _is_legacy_batched = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor


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


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """save_for_backward that also takes inference tensors (a teacher's): autograd may not save those, nor need it."""
    ctx.inference = None
    if not torch.compiler.is_compiling() and any(map(_is_inference, [t for t in tensors if t is not None])):
        ctx.inference = {i: t for i, t in enumerate(tensors) if t is not None and t.is_inference()}
        tensors = tuple(None if i in ctx.inference else t for i, t in enumerate(tensors))
    ctx.save_for_backward(*tensors)


def saved_tensors(ctx: Any) -> tuple[Any, ...]:
    """``ctx.saved_tensors``, which a checkpoint gives but once."""
    return getattr(ctx, "held", None) or ctx.saved_tensors


def saved(ctx: Any) -> tuple[Any, ...]:
    """What ``save`` was given."""
    if not ctx.inference:
        return saved_tensors(ctx)
    return tuple(ctx.inference.get(i, t) for i, t in enumerate(saved_tensors(ctx)))


def asked(grad: Tensor | None, needed: bool) -> Tensor | None:
    return grad if needed else None


def in_dtypes(ctx: Any, grads: Iterable[Any]) -> list[Tensor | None]:
    """Each gradient in the dtype of its input, where it is needed."""
    return [g.to(dtype) if needed else None for g, dtype, needed in zip(grads, ctx.dtypes, ctx.needs)]


def scaled(ctx: Any, grads: Iterable[Tensor | None], by: Tensor) -> list[Any]:
    """``grad * by`` of gradients that forward has saved, without a second buffer where no second backward can come."""
    if not may_overwrite_saved(ctx):
        return [None if g is None else g * by for g in grads]
    # Whoever traces or watches is to see the product; a value that is read would be a constant.
    if type(by) is Tensor and by.dim() == 0 and by.is_cpu and not _dispatch_modes() and by.item() == 1:
        return list(grads)
    return [None if g is None else g.mul_(by) for g in grads]


def may_overwrite_saved(ctx: Any) -> bool:
    """Whether nobody asks for the saved tensors again, so that they may be overwritten."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._autograd._get_current_graph_task_keep_graph()
        or getattr(ctx, "keep", False)
    )


def save_grads(ctx: Any, grads: Iterable[Tensor], inputs: Iterable[Tensor | None], needs: tuple[bool, ...]) -> None:
    """Gradients that forward has made, and what they belong to; None for what needs none."""
    # What needs a gradient cannot be an inference tensor.
    ctx.save_for_backward(*map(asked, grads, needs), *map(asked, inputs, needs))


def scaled_rows(ctx: Any, grad_loss: Tensor, count: int = 2) -> list[Any]:
    """The gradients of ``save_grads``, so many, from that of the loss, which may have one value a row."""
    grads = saved_tensors(ctx)[:count]
    if ctx.backend != "cpp" and may_overwrite_saved(ctx):
        for g in grads:
            if g is not None:
                kernels(ctx.backend).scale_rows_.default(g, grad_loss)
        return list(grads)
    if grad_loss.dim() == 0:
        return scaled(ctx, grads, grad_loss)
    rows, others = grads[:2], grads[2:]  # [N, ...] and [N]
    return scaled(ctx, rows, grad_loss.unsqueeze(-1)) + scaled(ctx, others, grad_loss)


# rows [N, ...] float32 times by, [N] or [], in place; where that is 1, nothing is read or written
@define("scale_rows_", "(Tensor(a!) rows, Tensor by) -> ()", triton="scale_rows", cpu=False)
def _(rows, by): ...
