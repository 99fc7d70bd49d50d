"""What a configuration's errors say: which key, what was wanted, and the nearest valid name."""

import re
from collections.abc import Iterable
from typing import Any

from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from ..names import nearest
from . import fields, yaml_text
from .schema import ConfigError


class errors:
    """Turns OmegaConf's and the reading's exceptions into ConfigError with the key, the nearest key and the wanted type."""

    def __init__(self, of: type, prefix: str, source: str = "") -> None:
        self.schema, self.prefix, self.source = of, prefix, source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        place = f" (in {self.source})" if self.source else ""
        if isinstance(error, yaml_text.Ambiguous):
            raise ConfigError(f"config: {error}{place}") from None
        if not isinstance(error, OmegaConfBaseException):
            return
        key = re.sub(r"\[(\d+)\]", r".\1", str(getattr(error, "full_key", "") or "")).strip(".")
        shown = ".".join(part for part in (self.prefix, key) if part) or "config"
        if isinstance(error, (ConfigKeyError, ConfigAttributeError)):
            names = fields.keys(self.schema)
            near = nearest(re.sub(r"\.\d+(?=\.)", "", key), names)
            raise ConfigError(f"config: {shown}: no such key{near}{place}") from None
        wanted = fields.wanted(self.schema, key) if isinstance(error, ValidationError) else ""
        came = str(error).splitlines()[0]
        raise ConfigError(f"config: {shown}{f' must be {wanted}' if wanted else ''}: {came}{place}") from None


def bad_choice(key: str, value: Any, choices: Iterable[str | bool | None]) -> str:
    yaml = {None: "null", True: "true", False: "false"}
    names = [choice if isinstance(choice, str) else yaml[choice] for choice in choices]
    return f"config: {key} must be one of {', '.join(names)}, got {value!r}{nearest(str(value), names)}"
