"""Argument checks shared by all operators: each raises before anything runs, and names the function and the argument.

Messages read ``function: argument must be ..., got ...``. Checks of values look only where that costs no device sync.
At small batches checks cost a noticeable share of a loss, so they test first and build the message only on failure.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

INT64 = 2**63  # the first int above what operators take


def shape(t: Tensor) -> list[int]:
    return list(t.shape)


def is_any(size: torch.Size, allowed: Sequence[Sequence[int]]) -> bool:
    """``size in allowed``, one by one: in compiled code ``in`` takes a number that is symbolic for another than its equal
    (findings/compiled_in_of_sizes.sh)."""
    for wanted in allowed:
        if size == torch.Size(wanted):
            return True
    return False


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(function: str, name: str, value: object) -> Tensor:
    """A dense floating-point tensor of a dtype the kernels take."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{function}: {name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    _dense(function, name, value)
    return value


def _dense(function: str, name: str, value: Tensor) -> None:
    if value.is_nested:
        raise TypeError(f"{function}: {name} must be a dense tensor, as to_padded_tensor() makes it, got a nested one")
    if value.layout is not torch.strided:
        raise TypeError(f"{function}: {name} must be a dense tensor, as to_dense() makes it, got {value.layout}")


def two_dimensional(function: str, name: str, logits: Tensor, where: str = "") -> None:
    """Logits [N, C]; ``where``: in which case, for the message."""
    tensor(function, name, logits)
    if logits.dim() != 2:
        raise ValueError(f"{function}: {name} must be [N, C]{where}, got {shape(logits)}")


def one_of(function: str, name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{function}: {name} must be one of {', '.join(allowed)}, got {value!r}")


# Bounds of numbers that have none of their own: a square of theirs is a float32 number.
POSITIVE, NOT_NEGATIVE = (1e-18, 1e18), (0, 1e18)


def number(function: str, name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    """A real in [low, high], or in (low, high] with ``above``."""
    if type(value) is float and low <= value <= high and not (above and value == low):
        return
    wanted = f"a number in {'(' if above else '['}{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{function}: {name} must be {wanted}, got {value!r}")
    if not low <= value <= high or (above and value == low):  # NaN fails, too
        raise ValueError(f"{function}: {name} must be {wanted}, got {value}")


def count(function: str, name: str, value: object) -> None:
    """How many there are: an int of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{function}: {name} must be an int >= 1, got {value!r}")


def ignore_index(function: str, value: object) -> None:
    """An int that labels can hold."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{function}: ignore_index must be an int, got {value!r}")
    if not -INT64 <= value < INT64:
        raise ValueError(f"{function}: ignore_index must be in [-2**63, 2**63), got {value}")


def same_device(function: str, name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{function}: {name} must be on {like.device} like {like_name}, got {value.device}")


def same_shape(function: str, name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.shape != like.shape:
        raise ValueError(f"{function}: {name} must be {shape(like)} like {like_name}, got {shape(value)}")


def integers(function: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32):
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{function}: {name} must be an int64 or int32 tensor, got {got}")
    _dense(function, name, value)


def values_are_free(t: Tensor) -> bool:
    """Whether reading the values of ``t`` costs no sync: an ordinary CPU tensor, or a subclass that keeps torch's own dispatch, outside
    of tracing and transforms. Fake tensors, DTensors and the like have their own."""
    return (
        not torch.compiler.is_compiling()
        and t.device.type == "cpu"
        and not torch._C._are_functorch_transforms_active()
        and type(t).__torch_dispatch__ is Tensor.__torch_dispatch__
        and not torch._C._len_torch_dispatch_stack()  # whoever traces or watches, as make_fx does
    )
