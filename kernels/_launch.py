"""Launches without Triton's binding of arguments, which takes most of the host's time where kernels are short.

``JITFunction.run`` binds all arguments by name, looks at each of them and prints its options, at every call. A ``Launch`` has all
numbers of a launch from the start and is given its tensors at every call. Then only what may differ between two calls is looked at:
which tensors there are, their dtypes, and whether 16 divides their addresses. What launches a kernel keeps one ``Launch`` for
everything that its numbers are made of: shapes, strides and settings.
"""

import functools
from typing import Any

import triton
from torch import Tensor
from triton.compiler import CompiledKernel

# How a compiled kernel is run differs between versions of Triton, but not between these.
KNOWN = (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)
by_hand = KNOWN and not triton.knobs.runtime.interpret

# Of a function that makes a Launch from shapes, strides and settings. The least recently used is made again.
kept = functools.lru_cache(maxsize=256)


def _watched(kernel: Any) -> Any:
    """Whether somebody (a profiler, a debugger) hears of launches, or has kernels compiled in another way."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook  # chains, None, or what was put in their place
    return (
        (enter is not None and getattr(enter, "calls", True))
        or (leave is not None and getattr(leave, "calls", True))
        or runtime.debug
        or triton.knobs.compilation.instrumentation_mode
        or getattr(runtime, "add_stages_inspection_hook", None)
        or kernel.pre_run_hooks
    )


def _key(tensors: tuple, device: int) -> tuple:
    """All that Triton compiles anew for, beside a Launch's own numbers, on NVIDIA's devices."""
    key: list[Any] = [device]
    addresses = 0
    for t in tensors:
        if t is None:
            key.append(None)
        elif type(t) is tuple:
            key.append(_key(t, device))
        else:
            key.append(t.dtype)
            addresses |= t.data_ptr()
    if addresses % 16:  # of some
        key.extend([t.data_ptr() % 16 == 0 for t in tensors if isinstance(t, Tensor)])
    return tuple(key)


def _understood(options: dict) -> dict:
    """The options that this device's compiler knows: a most of registers is NVIDIA's, and elsewhere an error."""
    if "maxnreg" not in options or triton.knobs.runtime.interpret:
        return options
    if triton.runtime.driver.active.get_current_target().backend == "cuda":
        return options
    return {name: value for name, value in options.items() if name != "maxnreg"}


class Launch:
    """``kernel[grid](...)`` again and again, with the same numbers.

    arguments: by name, every argument that is no tensor, and options such as ``num_warps``. A call takes the rest in the kernel's
    order: tensors, tuples of tensors, and None for what there is not.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], **arguments: Any):
        self.kernel, self.grid = kernel, (*grid, 1, 1)[:3]
        self.places = [i for i, name in enumerate(kernel.arg_names) if name not in arguments]
        self.arguments = [arguments.pop(name, None) for name in kernel.arg_names]
        self.options = arguments
        self.compiled: dict[tuple, tuple] = {}

    def __call__(self, *tensors: Tensor | tuple[Tensor, ...] | None) -> None:
        arguments = self.arguments.copy()
        for place, t in zip(self.places, tensors, strict=True):
            arguments[place] = t
        if not by_hand or _watched(self.kernel):
            self.kernel[self.grid](*arguments, **_understood(self.options))
            return
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        key = _key(tensors, device)
        if found := self.compiled.get(key):
            run, function, metadata, _ = found
            run(*self.grid, driver.get_current_stream(device), function, metadata, None, None, None, *arguments)
            return
        kernel = self.kernel[self.grid](*arguments, **_understood(self.options))
        # Others than NVIDIA's look at more, as at the size of a tensor's memory.
        if isinstance(kernel, CompiledKernel) and kernel.metadata.target.backend == "cuda":
            # The kernel itself is there to be kept alive.
            self.compiled[key] = kernel.run, kernel.function, kernel.packed_metadata, kernel
