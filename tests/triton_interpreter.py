"""Makes Triton's interpreter right, like a GPU, and fast enough for tests."""

import operator
from types import SimpleNamespace

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def round_to_bfloat16() -> None:
    """float32 to the nearest, as GPUs do; the interpreter cuts the last 16 bits off."""
    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self, source, target):
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, target.scalar)

    interpreter.InterpreterBuilder.cast_impl = cast_impl


def stay_in_the_language() -> None:
    """The language's functions are the interpreter's from now on. It replaces hundreds of them at each launch and at each call of
    one jitted function by another, which takes a third of its time."""
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()


def look_for_overflow_in_numpy() -> None:
    """32-bit integers that overflow are an error, as in the interpreter, which looks for it by ten operations of its own."""

    def check(self, a, b, operation):
        kind = a.type.scalar
        if kind.int_bitwidth < 64:
            right = getattr(operator, operation.__name__)(
                a.handle.data.astype(np.int64), b.handle.data.astype(np.int64)
            )
            fits = right.min() >= kind.get_int_min_value() and right.max() <= kind.get_int_max_value()
            assert fits, f"int{kind.int_bitwidth} overflow in {operation.__name__}"

    type(interpreter.interpreter_semantic).binary_op_sanitize_overflow_impl = check


def compute_as_a_gpu() -> None:
    """A product becomes part of the addition behind it, which is rounded once (so the difference of two equal products is their
    rounding, and not 0), unless the launch forbids it. Of float32, exp, exp2 and / may be a unit of the last digit off, which tl.div_rn is
    not, and exponentials below the least normal number are 0."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    multiply, add, subtract = builder.create_fmul, builder.create_fadd, builder.create_fsub
    negate = getattr(builder, "create_fneg", None)  # Triton 3.6 has none: there it is a difference from 0
    divide, exp, exp2, run = builder.create_fdiv, builder.create_exp, builder.create_exp2, executor.__call__
    fuse = True

    def launch(self, *args, **options):
        nonlocal fuse
        fuse = options.get("enable_fp_fusion", True)
        return run(self, *args, **options)

    def product(self, a, b):
        out = multiply(self, a, b)
        if fuse and out.dtype in (tl.float32, tl.float64):
            out.factors = a.data, b.data
        return out

    def fused(a, b, c, dtype):
        wide = np.float64 if dtype == tl.float32 else np.longdouble
        with np.errstate(all="ignore"):
            total = a.astype(wide) * b.astype(wide) + c.astype(wide)
            return interpreter.TensorHandle(total.astype(c.dtype), dtype)

    def addition(self, a, b):
        for x, y in ((a, b), (b, a)):
            if hasattr(x, "factors"):
                return fused(*x.factors, y.data, x.dtype)
        return add(self, a, b)

    def difference(self, a, b):
        if hasattr(a, "factors"):
            return fused(*a.factors, -b.data, a.dtype)
        if hasattr(b, "factors"):
            return fused(-b.factors[0], b.factors[1], a.data, b.dtype)
        return subtract(self, a, b)

    def negative(self, x):
        out = negate(self, x)
        if hasattr(x, "factors"):
            out.factors = -x.factors[0], x.factors[1]
        return out

    def nearly(exact, told_by):
        """float32 of ``exact``, a unit up or down or none, which the bits of ``told_by`` tell."""
        near = exact.astype(np.float32)
        bits = np.ascontiguousarray(told_by, np.float32).view(np.uint32) * np.uint32(2654435761)
        off = np.take(np.array([0, 1, -1, 0], np.float32), bits >> np.uint32(30)) * np.spacing(np.abs(near))
        free = np.isfinite(near) & (np.abs(near) >= 2.0**-126) & (near != exact)
        return np.where(free, near + off, near).astype(np.float32)

    def quotient(self, a, b):
        if a.dtype != tl.float32:
            return divide(self, a, b)
        with np.errstate(all="ignore"):
            exact = a.data.astype(np.float64) / b.data.astype(np.float64)
            return interpreter.TensorHandle(nearly(exact, np.broadcast_to(b.data, exact.shape)), a.dtype)

    def power(x):
        with np.errstate(all="ignore"):
            y = nearly(np.exp2(x.astype(np.float64)), x)
            return np.where(y < 2.0**-126, np.float32(0), y)  # NaN stays NaN

    def power_of_two(self, x):
        return interpreter.TensorHandle(power(x.data), x.dtype) if x.dtype == tl.float32 else exp2(self, x)

    def exponential(self, x):
        if x.dtype != tl.float32:
            return exp(self, x)
        with np.errstate(all="ignore"):
            return interpreter.TensorHandle(power(x.data * np.float32(1.44269504)), x.dtype)

    executor.__call__ = launch
    builder.create_fmul, builder.create_fadd, builder.create_fsub = product, addition, difference
    if negate is not None:
        builder.create_fneg = negative
    builder.create_fdiv, builder.create_exp2, builder.create_exp = quotient, power_of_two, exponential
