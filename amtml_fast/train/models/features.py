"""Feature maps from inside a model, by dotted module path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..names import near_names
from .networks import WRAPPER_PREFIXES


class FeatureExtractor(nn.Module):
    """A model together with the outputs of the modules at `paths` (name -> dotted path), caught by forward hooks.

    forward(x) -> (the model's output, {name: that module's output tensor}). A module that runs twice in one forward
    gives its last output. `paths` may be written with or without the prefixes of DDP and torch.compile ("module.",
    "_orig_mod.").

    A map is what its module returned, also where a later layer overwrites it (`relu_(bn(x))`): it is copied when it is
    caught. After `probe` only maps that are overwritten are copied. Compiled code loses nothing by the copies: the compiler
    takes those out that are not needed.

    `.model` is the bare model; its state dict knows nothing of this class. Wrap the extractor, not the model, in DDP or
    torch.compile. A model that was compiled before is taken back to the plain module, for its compiled code would run
    without the hooks; a model inside DDP is an error, for its gradients would no longer be synchronized.

    Raises ValueError: a path that names no module; in forward, RuntimeError: a module that did not run (or one inside a
    part of the model that was wrapped in torch.compile), or one whose map is overwritten, but was not in the probe;
    TypeError: a module whose output is not one tensor.
    """

    def __init__(self, model: nn.Module, paths: Mapping[str, str]) -> None:
        super().__init__()
        self.model = _bare(model)
        self.paths = dict(paths)
        self._caught: dict[str, Any] = {}
        self._versions: dict[str, int] = {}  # of what was caught without a copy: each write counts one up
        self._copied = set(self.paths)
        self._probed = False
        modules = dict(self.model.named_modules(remove_duplicate=False))
        del modules[""]
        for name, path in self.paths.items():
            # A partial, not a closure: a deep copy of the extractor then catches into its own dict.
            _find(modules, name, path).register_forward_hook(
                partial(_catch, self._caught, self._versions, self._copied, name)
            )

    def forward(self, x: Tensor) -> tuple[Any, dict[str, Tensor]]:
        output, features = self._run(x)
        if not torch.compiler.is_compiling() and (overwritten := self._overwritten(features)):
            name = overwritten[0]
            raise RuntimeError(
                f"features: the output of {name}={self.paths[name]!r} is overwritten by a later layer, but was not when the "
                "network was probed: call probe(x) again as it runs here, or name a module behind the one that overwrites it"
            )
        return output, features

    def probe(self, x: Tensor, *, training: bool = False) -> tuple[Any, dict[str, Tensor]]:
        """forward(x) in training mode, or in evaluation mode without gradients, once: from then on those maps alone are copied
        that were overwritten in this probe, or in one before. Mode and buffers stay as they were."""
        known = set(self._copied) if self._probed else set()
        self._copied.clear()
        with restoring_state(self), torch.set_grad_enabled(training):
            output, features = self.train(training)._run(x)
        self._copied.update(known, self._overwritten(features))
        self._probed = True
        return output, features

    def _run(self, x: Tensor) -> tuple[Any, dict[str, Tensor]]:
        self._caught.clear()
        self._versions.clear()
        output = self.model(x)
        features = {}
        for name in self.paths:
            if name not in self._caught:
                raise RuntimeError(self._did_not_run(name))
            if not isinstance(self._caught[name], Tensor):
                kind = type(self._caught[name]).__name__
                raise TypeError(
                    f"features: the module at {name}={self.paths[name]!r} must return one tensor, got {kind}"
                )
            features[name] = self._caught[name]
        self._caught.clear()  # hold no graph longer than the caller does
        return output, features

    def _overwritten(self, features: Mapping[str, Tensor]) -> list[str]:
        return [name for name, version in self._versions.items() if features[name]._version != version]

    def _did_not_run(self, name: str) -> str:
        path = self.paths[name]
        others = [other for other, _ in self.model.named_modules() if other and _plain(other) != _plain(path)]
        return (
            f"features: the module at {name}={path!r} did not run in this forward, so it has no output (inside a part "
            f"that torch.compile made it would not be seen: compile the extractor instead); "
            f"near names: {near_names(path, others)}"
        )


def _catch(
    caught: dict[str, Any],
    versions: dict[str, int],
    copied: set[str],
    name: str,
    module: nn.Module,
    args: Any,
    output: Any,
) -> None:
    if isinstance(output, fx.Proxy):  # a tracer's: kept, it would make torch.compile compile twice
        return
    if not isinstance(output, Tensor):
        caught[name] = output
    elif torch.compiler.is_compiling() or name in copied:
        caught[name] = output.clone()
    else:
        caught[name] = output
        if not output.is_inference():  # those are not counted
            versions[name] = output._version


@contextmanager
def restoring_state(module: nn.Module) -> Iterator[None]:
    """Puts mode and buffers (the statistics of a BatchNorm) back at the end."""
    training, buffers = module.training, {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        yield
    finally:
        module.train(training)
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(buffers[name])


def _bare(model: nn.Module) -> nn.Module:
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise ValueError(f"features: wrap the FeatureExtractor in {type(model).__name__}, not the model inside it")
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, nn.Module):
        return _bare(inner)
    for module in model.modules():
        module._compiled_call_impl = None  # what model.compile() sets
    return model


def _plain(path: str) -> str:
    """The dotted path without the wrappers' parts, wherever they stand in it."""
    wrappers = [prefix.rstrip(".") for prefix in WRAPPER_PREFIXES]
    return ".".join(part for part in path.split(".") if part not in wrappers)


def _find(modules: Mapping[str, nn.Module], name: str, path: str) -> nn.Module:
    if path in modules:
        return modules[path]
    for other, module in modules.items():
        if _plain(path) and _plain(other) == _plain(path):
            return module
    near = near_names(_plain(path), modules)
    raise ValueError(f"features: the model has no module {name}={path!r}; near names: {near}")
