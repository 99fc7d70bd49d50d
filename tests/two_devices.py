"""Shows on the CPU that tests and library leave no tensor behind on another device: "cpu:0" stands for a GPU, and what was made
there does not meet what was made on "cpu", as on a machine that has both. Entered by conftest.py for AMTML_TEST_BACKENDS=emulated."""

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

GPU, HOST = torch.device("cpu:0"), torch.device("cpu")
DEVICES = ("cpu:0", "cpu")
MEET = {"to", "copy_", "set_"}  # functions that take tensors of two devices


def _device(x: object) -> torch.device | None:
    """Where a tensor was made; None: by C++ behind Python's back, as autograd makes gradients."""
    return getattr(x, "made_on", None)


class TwoDevices(TorchFunctionMode):
    unknown = HOST  # what a tensor says that nobody saw being made

    def __enter__(self):
        make = Parameter.__new__

        def make_there(cls, data=None, requires_grad=True):
            made = make(cls, data, requires_grad)  # which no mode sees
            if _device(data) is not None:
                made.made_on = data.made_on
            return made

        Parameter.__new__ = staticmethod(make_there)
        return super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        name, leaves = func.__name__, tree_leaves((args, kwargs))
        given = [x for x in leaves if isinstance(x, Tensor)]
        if any(type(x) not in (Tensor, Parameter) for x in given):  # a tracer's
            return func(*args, **kwargs)
        if func == Tensor.device.__get__:
            real = func(*args, **kwargs)
            return _device(args[0]) or self.unknown if real.type == "cpu" else real
        if name in ("numpy", "__array__") and _device(args[0]) == GPU:
            raise TypeError(f"{name}: can't convert {list(args[0].shape)} on {GPU} to numpy")
        # A number of the host goes anywhere.
        found = {_device(x) for x in given if x.dim() > 0 or _device(x) == GPU} - {None}
        takes_both = name in MEET or (name in ("__getitem__", "__setitem__") and _device(args[0]) == GPU)
        if len(found) > 1 and not takes_both:
            raise RuntimeError(f"{name}: two devices: {', '.join(f'{list(x.shape)} on {_device(x)}' for x in given)}")
        out = func(*args, **kwargs)
        named = [
            torch.device(x) for x in leaves if isinstance(x, torch.device) or (isinstance(x, str) and x in DEVICES)
        ]
        if name in ("copy_", "set_"):
            where = _device(given[0])
        elif name == "cpu":
            where = HOST
        elif named:
            where = named[0]
        elif name == "to" and len(given) > 1:
            where = _device(given[1])
        elif given:
            where = GPU if GPU in found else HOST if found else _device(given[0])
        else:
            where = HOST
        if given and out is given[0] and name in ("to", "cpu") and where != _device(out):
            out = out.clone()  # as from one device to another
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and _device(x) is None and where is not None:
                x.made_on = where
        return out
