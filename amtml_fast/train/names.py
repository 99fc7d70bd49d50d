"""Names in a configuration: the nearest valid ones for an error message, and what "package.module:name" stands for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable
from typing import Any


def near_names(name: str, known: Iterable[str]) -> str:
    """The known names nearest to `name`, nearest first, as text for an error message; some of them if none is near."""
    known = list(known)
    return ", ".join(difflib.get_close_matches(name, known, n=5, cutoff=0.4) or known[:8]) or "(none)"


def import_factory(path: str, what: str) -> Callable[..., Any]:
    """The callable at "package.module:name"; `what` opens the error message ("model.factory")."""
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"{what}: wanted 'package.module:factory', got {path!r}")
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
