"""Makes Triton's interpreter right and fast enough for tests."""

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
