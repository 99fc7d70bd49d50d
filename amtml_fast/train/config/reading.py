"""Configurations from YAML files and `key=value` overrides, and back to YAML.

`load` checks every key against the classes of schema.py: an unknown key, an ill-typed value or an unknown choice is a
`ConfigError` that names the key, the nearest valid one and what was wanted.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..names import nearest
from . import environment, fields, yaml_text
from .checks import check_names, check_values
from .messages import bad_choice, errors
from .presets import PRESETS
from .schema import TEACHERS, Config, ConfigError, File

CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "configs"


def packaged() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))


def find(source: str | Path) -> Path:
    """The YAML file that `source` means: a file, a run folder holding config.yaml, or a packaged name."""
    path = Path(source)
    if path.is_file():
        return path
    if (path / "config.yaml").is_file():
        return path / "config.yaml"
    if str(source) in packaged():
        return CONFIG_FOLDER / f"{source}.yaml"
    raise ConfigError(
        f"config: {str(source)!r} is neither a YAML file, nor a run folder with a config.yaml, "
        f"nor a packaged name ({', '.join(packaged())}){nearest(str(source), packaged())}"
    )


def load(source: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The configuration in `source` (file, run folder, packaged name, or one of several in a file, regimes:few) with `key=value`
    overrides applied."""
    found = load_all(source, overrides)
    if len(found) > 1:
        names = ", ".join(f"{source}:{Path(config.name).name}" for config in found)
        raise ConfigError(f"config: must be one configuration for this command ({names}), got all of {source}")
    return found[0]


def load_all(source: str | Path, overrides: Iterable[str] = ()) -> list[Config]:
    """The same, and all configurations of a file with `regimes`."""
    place, chosen = str(source), None
    if ":" in Path(source).name and not Path(source).exists():
        place, _, chosen = place.rpartition(":")
    path, overrides = find(place), list(overrides)
    written = _read(path)
    regimes = written.pop("regimes", None)
    if regimes is None:
        if chosen is not None:
            raise ConfigError(f"config: {place} must have regimes to choose {chosen!r} from, got none")
        return [_finished(written, overrides, str(path))]
    check_regimes(regimes, str(path))
    if chosen is not None and chosen not in regimes:
        raise ConfigError(f"config: {place} must be followed by one of {', '.join(regimes)}, got {chosen!r}")
    given = [word.partition("=")[2] for word in overrides if word.partition("=")[0].strip() == "name"]
    name = given[-1] if given else str(written.get("name", path.stem))
    overrides = [word for word in overrides if word.partition("=")[0].strip() != "name"]
    found = []
    for one in regimes if chosen is None else [chosen]:
        whole = _over(written, OmegaConf.merge(regimes[one] or {}, {"name": f"{name}/{one}"}))
        config = _finished(whole, overrides, f"{path}:{one}")
        if config.teachers_folder is None:
            config.teachers_folder = str(config.folder.parent / TEACHERS)
        found.append(config)
    return found


def check_regimes(regimes: Any, source: str) -> None:
    """ConfigError unless it is a mapping of names to mappings, none of which says where its runs go."""
    if not OmegaConf.is_dict(regimes) or not regimes:
        what = "none" if OmegaConf.is_dict(regimes) else type(regimes).__name__
        raise ConfigError(f"config: regimes must be a mapping of names to keys, got {what} (in {source})")
    check_names("regimes", [str(one) for one in regimes])
    for one, keys in regimes.items():
        if keys is not None and not OmegaConf.is_dict(keys):
            raise ConfigError(f"config: regimes.{one} must be a mapping of keys, got {keys} (in {source})")
        placed = [key for key in ("name", "out", "teachers_folder", "base", "regimes") if key in (keys or {})]
        if placed or one == TEACHERS:
            got = f"{placed[0]} in {one}" if placed else f"the name {one!r}, where their teachers go"
            raise ConfigError(
                f"config: regimes must share name, out, teachers_folder and base, got {got} (in {source})"
            )


def _finished(written: Any, overrides: list[str], path: str) -> Config:
    plain = _merge({}, written, overrides, path)
    if plain.preset not in PRESETS:
        raise ConfigError(bad_choice("preset", plain.preset, tuple(PRESETS)))
    preset = PRESETS[plain.preset](plain)
    config = _merge(preset, written, overrides, path) if preset else plain
    _expand(config)
    check_values(config)
    if config.engine.precision == "auto":
        config.engine.mixed_precision = environment.fastest(config.engine)
    return config


def parse(written: Mapping[str, Any], source: str) -> Config:
    """The configuration that `asdict` made a mapping of; `source` is named in errors."""
    config = _merge({}, written, [], source)
    _expand(config)
    check_values(config)
    return config


def _read(path: Path, inner: tuple[Path, ...] = ()) -> Any:
    """What a file says, over what the file that its `base` names says."""
    if path in inner:
        raise ConfigError(f"config: base must not lead back to itself, got {' -> '.join(map(str, (*inner, path)))}")
    try:
        with errors(Config, "", str(path)):
            found = yaml_text.read(path.read_text(encoding="utf-8"), File)
            if not isinstance(found, dict | types.NoneType):
                raise ConfigError(f"config: {path} must hold a mapping of keys, got {type(found).__name__}")
            written = OmegaConf.create(found or {})
    except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError) as error:
        raise ConfigError(f"config: {path} is not readable YAML: {error}") from None
    if "base" not in written:
        return written
    base = str(written.pop("base"))
    beside = path.parent / base
    return _over(_read(beside if beside.is_file() else find(base), (*inner, path)), written)


def _over(lower: Any, upper: Any) -> Any:
    """Sections are merged. A mapping of free keys (args, groups, loss.mapping) is replaced whole: those of another network do not
    count."""
    merged = OmegaConf.merge(lower, upper)
    _replace(merged, OmegaConf.to_container(upper) if OmegaConf.is_config(upper) else upper, File)
    return merged


def _replace(merged: Any, written: Any, schema: type, key: str = "") -> None:
    """Puts the mappings of free keys of what is written for a section of this class in the place of those at `key` in `merged`."""
    for one in dataclasses.fields(schema):
        value, hint = written.get(one.name), fields.hints(schema)[one.name]
        if not isinstance(value, Mapping):
            continue
        section = one.metadata.get(fields.KEYS_OF, hint)
        of_each = typing.get_args(hint)[-1] if typing.get_origin(hint) is dict else None
        if dataclasses.is_dataclass(section):
            _replace(merged, value, typing.cast(type, section), f"{key}{one.name}.")
        elif dataclasses.is_dataclass(of_each):  # variants and regimes, by their names
            for name, each in value.items():
                if isinstance(each, Mapping):
                    _replace(merged, each, typing.cast(type, of_each), f"{key}{one.name}.{name}.")
        else:
            OmegaConf.update(merged, f"{key}{one.name}", dict(value), merge=False)


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that `load` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def changed(config: Config, settings: Mapping[str, Any], source: str) -> Config:
    """The configuration with a method's own values in it, checked like a file; `source` is named in errors."""
    if not settings:
        return config
    with errors(Config, "", source):
        merged = OmegaConf.merge(OmegaConf.structured(config), dict(settings))
        if isinstance(mapping := settings.get("loss", {}).get("mapping"), Mapping):
            OmegaConf.update(merged, "loss.mapping", dict(mapping), merge=False)
        result = typing.cast(Config, OmegaConf.to_object(merged))
    check_values(result)
    return result


def _make_sections(merged: Any, key: str) -> None:
    """Those on the way to a dotted key that are not there yet (a new variant): OmegaConf would make plain mappings."""
    parts = key.split(".")
    for place in (".".join(parts[: n + 1]) for n in range(len(parts))):
        hint = fields.hint_at(Config, place)
        if dataclasses.is_dataclass(hint) and OmegaConf.select(merged, place) is None:
            OmegaConf.update(merged, place, OmegaConf.structured(hint))


@functools.cache
def _schema() -> Any:
    """What a merge begins with: it is copied, never changed."""
    return OmegaConf.structured(Config)


def _merge(preset: dict[str, Any], written: Any, overrides: list[str], source: str) -> Config:
    with errors(Config, "", source):
        merged = _over(OmegaConf.merge(_schema(), preset), written)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"config: an override must be key=value, got {override!r}")
        with errors(Config, "", f"the override {override!r}"):
            try:
                _set(merged, key.strip(), value)
            except (IndexError, TypeError, ValueError) as error:
                if isinstance(error, (OmegaConfBaseException, yaml_text.Ambiguous)):
                    raise
                raise ConfigError(f"config: {key}: {error} (in the override {override!r})") from None
    with errors(Config, "", source):
        return typing.cast(Config, OmegaConf.to_object(merged))


def _set(merged: Any, key: str, value: str) -> None:
    """As in `_over`: a mapping of free keys is replaced whole; a section (distill={...}) is merged into."""
    hint = fields.hint_at(Config, key)
    parts = fields.parts(key)
    for i, part in enumerate(parts[1:], 1):
        whole = ".".join(parts[:i])
        if not part.isdigit() and typing.get_origin(fields.required(fields.hint_at(Config, whole))) is list:
            raise ValueError(f"{whole} is a list, whose entries have numbers, as {whole}[0], got {part!r}")
    new = yaml_text.value(value, fields.hint_at(Config, key, free=True), key)
    if isinstance(new, list) and dataclasses.is_dataclass(fields.inner(hint)):
        new = [OmegaConf.merge(OmegaConf.structured(fields.inner(hint)), item) for item in new]
    section = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else None
    if isinstance(new, dict) and dataclasses.is_dataclass(section):
        new = {name: OmegaConf.merge(OmegaConf.structured(section), one) for name, one in new.items()}
    _make_sections(merged, key)
    OmegaConf.update(merged, key, new, merge=dataclasses.is_dataclass(hint))
    if isinstance(new, dict) and dataclasses.is_dataclass(hint):
        _replace(merged, new, typing.cast(type, hint), f"{key}.")


def _expand(config: Config) -> None:
    """Puts the home folder in place of ~ in every path."""
    for key, value, section, one in fields.leaves(config):
        if value is not None and fields.HOME in one.metadata and value.startswith("~"):
            try:
                setattr(section, one.name, str(Path(value).expanduser()))
            except RuntimeError:
                raise ConfigError(
                    f"config: {key} must be a path, with the home folder of a known user for ~, got {value!r}"
                ) from None
