"""What types do not say about a configuration's values: choices, ranges, and what does not go together."""

import re
import typing
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path

from omegaconf import OmegaConf

from . import fields
from .messages import bad_choice, errors
from .presets import PRESETS
from .schema import Config, ConfigError, ModelConfig, TeacherConfig, TrainConfig

CHOICES: dict[str, tuple[str | bool | None, ...]] = {
    "preset": tuple(PRESETS),
    "loss.mode": ("mixture", "sum"),
    "loss.pool": ("max", "avg"),
    "loss.reduction": ("batchmean", "mean"),
    "loss.adapter": ("learned", "uniform"),
    "loss.angle_on": ("probabilities", "logits"),
    "loss.aekd_gradients": ("mean", "rows"),
    "compare.split": ("test", "validation"),
    "engine.mixed_precision": ("no", "fp16", "bf16"),
    "engine.precision": (None, "auto"),
    "engine.cuda_graphs": ("auto", True, False),
    "engine.channels_last": ("auto", True, False),
    "engine.device": ("auto", "cpu"),
    "cache.teachers": ("auto", "always", "never"),
    "cache.hints": ("float32", "float16", "never"),
}
MAPPINGS = ("best_high", "best_low", "random")
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("onecycle", "step", "cosine", "constant")


def check_values(config: Config) -> None:
    if out := fields.out_of_range(config):
        raise ConfigError(f"config: {out}")
    for key, choices in CHOICES.items():
        value = attrgetter(key)(config)
        if (type(value), value) not in [(type(choice), choice) for choice in choices]:  # 0 is not false
            raise ConfigError(bad_choice(key, value, choices))
    _check_place(config.name)
    if config.folder == config.cache_folder:
        raise ConfigError(
            f"config: name must be another folder than that of the teachers' kept outputs, got {config.name!r} for {config.folder}"
        )
    if not isinstance(config.loss.mapping, Mapping) and config.loss.mapping not in MAPPINGS:
        raise ConfigError(bad_choice("loss.mapping", config.loss.mapping, MAPPINGS) + " (or teacher: group pairs)")
    logits = config.cache.logits
    if logits not in ("float32", "float16") and not (type(logits) is int and logits >= 1):
        raise ConfigError(f"config: cache.logits must be float32, float16 or a number k of 1 or more, got {logits!r}")
    if config.data.views is not None and not config.data.augment:
        raise ConfigError(f"config: data.views must be null with data.augment=false, got {config.data.views}")
    if config.cache.teachers == "always" and config.data.augment and config.data.views is None:
        raise ConfigError(
            "config: with cache.teachers=always, data.views must be a number of fixed versions of each image or data.augment "
            "false, got random augmentation each epoch"
        )
    _check_train("teach", config.teach)
    _check_train("distill", config.distill)
    check_names("teachers.name", [teacher.name for teacher in config.teachers])
    for teacher in config.teachers:
        _check_teacher(config, teacher)
    _check_loss(config)
    engine = config.engine
    if engine.cuda_graphs is True and engine.device == "cpu":
        raise ConfigError("config: engine.cuda_graphs must be auto or false with engine.device=cpu, got true")
    if engine.fsdp and engine.mixed_precision == "fp16":
        raise ConfigError("config: engine.mixed_precision must be no or bf16 with engine.fsdp=true, got fp16")


def _check_place(name: str) -> None:
    """ConfigError unless runs of this name would be inside `out`."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
        raise ConfigError(f"config: name must be a folder's name, below out, got {name!r}")


def check_names(key: str, names: list[str]) -> None:
    """ConfigError unless these are unique and can be parts of folder names."""
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*", name) or names.count(name) > 1:
            raise ConfigError(f"config: {key} must be unique names of letters, digits, ., - and _, got {names}")


def _check_teacher(config: Config, teacher: TeacherConfig) -> None:
    where = f"teachers.{teacher.name}"
    _check_train(f"{where}.train", teacher_train(config, teacher))
    _check_statistics(f"{where}.model", teacher.model)
    if teacher.model.brings_weights and (teacher.domain is not None or teacher.shuffled_labels):
        raise ConfigError(
            f"config: {where} must be trained here for domain and shuffled_labels, got one that brings its weights"
        )
    if teacher.domain is not None and teacher.domain not in config.data.domains:
        known = ", ".join(config.data.domains) or "(none)"
        raise ConfigError(f"config: {where}.domain must be one of data.domains, {known}, got {teacher.domain!r}")


def _check_loss(config: Config) -> None:
    loss = config.loss
    if config.data.labeled_share is not None and loss.alpha == 0.0:
        raise ConfigError(
            "config: loss.alpha must be above 0 with data.labeled_share (images without a label learn from the teachers alone), "
            "got 0.0"
        )
    if loss.adapter == "learned" and not loss.kl_trains_weights:
        if loss.adapter_label_weight == 0.0:
            raise ConfigError("config: loss.adapter_label_weight must be above 0 with kl_trains_weights=false, got 0.0")
        if loss.angle_trains_weights:
            raise ConfigError(
                "config: loss.angle_trains_weights must be false with kl_trains_weights=false, got true: the weights would "
                "be fixed for the angle loss, too"
            )


def _check_statistics(where: str, model: ModelConfig) -> None:
    """A teacher's own mean and std, which only make sense beside weights that were trained elsewhere."""
    if model.mean is None and model.std is None:
        return
    if not model.mean or not model.std or len(model.mean) != len(model.std):
        raise ConfigError(
            f"config: {where}: mean and std must be of equal length, got mean={model.mean}, std={model.std}"
        )
    if not model.brings_weights:
        raise ConfigError(
            f"config: {where}.mean must go with weights from elsewhere (weights, or a pretrained net), got none: "
            "what teach trains sees images normalized by the data's own mean and std"
        )


def _check_train(where: str, train: TrainConfig) -> None:
    if train.optimizer not in OPTIMIZERS:
        raise ConfigError(bad_choice(f"{where}.optimizer", train.optimizer, OPTIMIZERS))
    if train.schedule not in SCHEDULES:
        raise ConfigError(bad_choice(f"{where}.schedule", train.schedule, SCHEDULES))
    if out := fields.out_of_range(train, where):
        raise ConfigError(f"config: {out}")


def teacher_train(config: Config, teacher: TeacherConfig) -> TrainConfig:
    """`teach` with this teacher's own `train` keys over it."""
    where = f"teachers.{teacher.name}.train"
    with errors(TrainConfig, where):
        merged = OmegaConf.merge(OmegaConf.structured(config.teach), teacher.train)
        return typing.cast(TrainConfig, OmegaConf.to_object(merged))
