"""Names in a configuration: the nearest valid ones for an error message, and what "package.module:name" stands for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

LIBRARIES = ("pytorchcv", "timm")  # factories that may bring weights: models/zoo.py


def near_names(name: str, known: Iterable[str]) -> str:
    """The known names nearest to `name`, nearest first, as text for an error message; some of them if none is near."""
    known = list(known)
    return ", ".join(difflib.get_close_matches(name, known, n=5, cutoff=0.4) or known[:8]) or "(none)"


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean ...?` for the closest of `names`, by the whole dotted key first, by its last part second."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not close:
        last = {full.rpartition(".")[2]: full for full in names}
        close = [last[match] for match in difflib.get_close_matches(name.rpartition(".")[2], last, n=1, cutoff=0.6)]
    return f"; did you mean {close[0]!r}?" if close else ""


def import_factory(path: str, what: str) -> Callable[..., Any]:
    """The callable at "package.module:name"; `what` opens the error message ("model.factory")."""
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"{what} must be 'package.module:factory', got {path!r}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        raise ValueError(f"{what}: {path!r} names the module {error.name!r}, which cannot be found") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        near = near_names(attribute, [name for name in vars(module) if callable(getattr(module, name))])
        raise ValueError(f"{what}: {module_name} has no callable {attribute!r}; near names: {near}")
    return factory


def pretrained(factory: str, args: Mapping[str, Any]) -> bool:
    """Whether `factory` makes a net that brings its weights: for another factory than the zoo's, its own matter."""
    return factory in LIBRARIES and bool(args.get("pretrained"))
