"""Every training method by its name: one file and one line of METHODS each.

A method says what it needs and builds the objective, an `nn.Module` that turns one batch's outputs into a `StepLoss`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from ..config.schema import Config, ConfigError, LossConfig, VariantConfig
from ..names import nearest
from . import aekd, amtml_kd, at, avg_mkd, ca_mkd, dml, eb_kd, fitnet, gated_kd, mmkd, mtkd_rl, oracle, rkd, student
from .avg_mkd import OKD
from .base import Method

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        student.METHOD,
        fitnet.METHOD,
        at.METHOD,
        rkd.METHOD,
        dml.METHOD,
        avg_mkd.METHOD,
        avg_mkd.SUM,
        eb_kd.METHOD,
        ca_mkd.METHOD,
        aekd.METHOD,
        mmkd.METHOD,
        mtkd_rl.METHOD,
        mtkd_rl.CODE,
        gated_kd.METHOD,
        oracle.METHOD,
        amtml_kd.METHOD,
        *amtml_kd.ABLATIONS,
        amtml_kd.PAPER_CODE,
    )
}
NAMES = tuple(key.name for key in fields(LossConfig))


def known(config: Config) -> dict[str, Method]:
    """Every method that this configuration can ask for: METHODS, one okd-<teacher> a teacher, and its variants."""
    single = [avg_mkd.of_one_teacher(teacher.name) for teacher in config.teachers]
    found = METHODS | {method.name: method for method in single}
    for name in config.variants:
        if name in (*found, OKD) or name.startswith(f"{OKD}-"):
            raise ConfigError(f"config: variants must have names of their own, got {name!r}, which is a method")
    return found | {name: variant(name, asked, found) for name, asked in config.variants.items()}


def variant(name: str, asked: VariantConfig, found: dict[str, Method]) -> Method:
    """A method of the configuration's own: another one with other values."""
    if asked.method not in found:
        near = nearest(asked.method, found)
        raise ConfigError(
            f"config: variants.{name}.method must be one of {', '.join(found)}, got {asked.method!r}{near}"
        )
    base = found[asked.method]

    def settings(config: Config) -> dict[str, Any]:
        inner = base.settings(config)
        return {
            **inner,
            "loss": {**inner.get("loss", {}), **asked.loss},
            "stages": {**inner.get("stages", {}), **asked.stages},
        }

    strangers = [key for key in asked.loss if key in NAMES and key not in (*base.reads, "label_smoothing")]
    if strangers or (asked.stages and "adapter" not in base.reads):
        what = f"loss.{strangers[0]}" if strangers else "stages"
        raise ConfigError(f"config: variants.{name} must set keys that {base.name} reads, got {what}")
    whole = asked.label or f"{base.label} ({name})"
    return replace(base, base=base.base or base.name, name=name, label=whole, settings=settings)


def chosen(config: Config, names: Iterable[str]) -> list[Method]:
    """The methods of these names, `okd` as one a teacher. ConfigError for a name that is none."""
    methods, found = dict[str, Method](), known(config)
    for name in names:
        several = [key for key in found if key.startswith(f"{OKD}-")] if name == OKD else [name]
        for each in several:
            if each not in found:
                wanted = ", ".join((OKD, *found))
                raise ConfigError(f"config: method must be one of {wanted}, got {each!r}{nearest(each, (OKD, *found))}")
            methods[each] = found[each]
    return list(methods.values())
