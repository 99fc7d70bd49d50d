"""What a configuration's errors say: which key, what was wanted, and the nearest valid name."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from ..names import nearest
from . import fields, yaml_text
from .schema import ConfigError


@contextmanager
def errors(schema: type, prefix: str, source: str = "") -> Iterator[None]:
    """Turns OmegaConf's and the reading's exceptions into ConfigError with the key, the nearest key and the wanted type."""
    place = f" (in {source})" if source else ""
    try:
        yield
    except yaml_text.Ambiguous as error:
        raise ConfigError(f"config: {error}{place}") from None
    except OmegaConfBaseException as error:
        key = re.sub(r"\[(\d+)\]", r".\1", str(getattr(error, "full_key", "") or "")).strip(".")
        shown = ".".join(part for part in (prefix, key) if part) or "config"
        if isinstance(error, (ConfigKeyError, ConfigAttributeError)):
            near = nearest(re.sub(r"\.\d+(?=\.)", "", key), fields.keys(schema))
            raise ConfigError(f"config: {shown}: no such key{near}{place}") from None
        wanted = fields.wanted(schema, key) if isinstance(error, ValidationError) else ""
        came = str(error).splitlines()[0]
        raise ConfigError(f"config: {shown}{f' must be {wanted}' if wanted else ''}: {came}{place}") from None


def bad_choice(key: str, value: Any, choices: Iterable[str | bool | None]) -> str:
    yaml = {None: "null", True: "true", False: "false"}
    names = [choice if isinstance(choice, str) else yaml[choice] for choice in choices]
    return f"config: {key} must be one of {', '.join(names)}, got {value!r}{nearest(str(value), names)}"
