"""The trainer's configuration: dataclasses with defaults, filled from a YAML file and `key=value` overrides.

`load` checks every key against these classes: an unknown key, an ill-typed value or an unknown choice is a
`ConfigError` that names the key, the nearest valid one and what was wanted.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from . import schema, yaml_text
from .schema import COUNT, FINITE, NOT_NEGATIVE, PATH, POSITIVE, SEED, SHARE, Range, keys_of, nearest, within

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs"


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which key and what was wanted."""


@dataclass
class DataConfig:
    name: str = "digits"  # a name in readers.DATASETS or package.module:factory
    root: str | None = field(default=None, metadata=PATH)
    download: bool = False  # fetch CIFAR through torchvision where its files are missing
    val_fraction: float = field(default=0.1, metadata=within(Range(0, 1, above=True, below=True)))
    augment: bool = False
    # Of students alone: this many fixed augmented versions of each image, one an epoch in turn; null: new ones every epoch.
    views: int | None = field(default=None, metadata=COUNT)
    augment_seed: int | None = field(default=None, metadata=SEED)  # what the views are drawn from; null: seed


@dataclass
class ModelConfig:
    factory: str = "small_cnn"  # a name in models.MODELS or package.module:factory
    args: dict[str, Any] = field(default_factory=dict)
    # a state dict: .safetensors, or .pt read with weights_only
    weights: str | None = field(default=None, metadata=PATH)
    # What its training images were normalised by, for weights from elsewhere; null: what the net says, else as the data.
    mean: list[float] | None = field(default=None, metadata=FINITE)
    std: list[float] | None = field(default=None, metadata=POSITIVE)


@dataclass
class TrainConfig:
    epochs: int = field(default=30, metadata=COUNT)
    # images per optimiser step, over all processes and accumulation steps
    batch_size: int = field(default=128, metadata=COUNT)
    optimizer: str = "sgd"
    lr: float = field(default=0.1, metadata=NOT_NEGATIVE)
    momentum: float = field(default=0.9, metadata=SHARE)
    nesterov: bool = False
    weight_decay: float = field(default=5e-4, metadata=NOT_NEGATIVE)
    schedule: str = "onecycle"
    warmup: float = field(default=0.0, metadata=NOT_NEGATIVE)  # epochs of linear warm-up; onecycle has its own
    # epochs after which `step` multiplies lr by gamma
    milestones: list[int] = field(default_factory=list, metadata=NOT_NEGATIVE)
    gamma: float = field(default=0.1, metadata=NOT_NEGATIVE)


@dataclass
class TeacherConfig:
    name: str = "teacher"
    model: ModelConfig = field(default_factory=ModelConfig)
    hint: str | None = None  # dotted path of the module whose output is the hint map u_t
    # a specialist: trained on the images of these classes alone; null: on all
    classes: list[int] | None = field(default=None, metadata=NOT_NEGATIVE)
    # this teacher's overrides of `teach`
    train: dict[str, Any] = field(default_factory=dict, metadata=keys_of(TrainConfig))


@dataclass
class StudentConfig:
    name: str = "student"
    factory: str = "small_cnn"
    args: dict[str, Any] = field(default_factory=dict)
    weights: str | None = field(default=None, metadata=PATH)
    features: str | None = None  # the adapter's input: dotted path of the last convolutional map
    groups: dict[str, str] = field(default_factory=dict)  # layer groups, low to high: name -> dotted path


@dataclass
class LossConfig:
    temperature: float = field(default=4.0, metadata=POSITIVE)
    alpha: float = field(default=0.7, metadata=SHARE)
    mode: str = "mixture"
    reduction: str = "batchmean"  # batchmean | mean: the KL is also divided by the number of classes
    kl_scale: float = field(default=1.0, metadata=POSITIVE)  # on the KL term alone
    label_smoothing: float = field(default=0.0, metadata=SHARE)
    # The adapter
    adapter: str = "learned"  # learned | uniform: the same weight for every teacher
    init_scale: float | None = field(default=None, metadata=NOT_NEGATIVE)
    adapter_seed: int | None = field(default=None, metadata=SEED)  # draws theta and v from a seed of their own
    pool: str = "max"
    regularizer_weight: float = field(default=1e-3, metadata=NOT_NEGATIVE)
    kl_trains_weights: bool = True  # false: the KL takes the teachers' weights as they are
    # on -log of the true class's probability in the mixture
    adapter_label_weight: float = field(default=0.0, metadata=NOT_NEGATIVE)
    # The angle loss
    angle_weight: float = field(default=1.0, metadata=NOT_NEGATIVE)
    delta: float = field(default=1.0, metadata=POSITIVE)
    angle_trains_weights: bool = False
    angle_on: str = "probabilities"  # probabilities | logits: the student's side of angle and distance
    distance_weight: float = field(default=0.0, metadata=NOT_NEGATIVE)  # of RKD's distance loss beside the angle loss
    # The hints
    hint_weight: float = field(default=1.0, metadata=NOT_NEGATIVE)
    mapping: Any = "best_high"  # best_high | best_low | random | {teacher name: group name}
    normalize_hints: bool = False
    pool_teacher_hints: bool = False  # each teacher's map is its mean over the positions
    hint_bound: float | None = field(default=None, metadata=POSITIVE)  # the projections F_t start as U(-bound, bound)
    train_hints: bool = True
    # Other methods
    fitnet_weight: float = field(default=1.0, metadata=NOT_NEGATIVE)
    at_weight: float = field(default=1000.0, metadata=NOT_NEGATIVE)
    rkd_distance_weight: float = field(default=25.0, metadata=NOT_NEGATIVE)
    rkd_angle_weight: float = field(default=50.0, metadata=NOT_NEGATIVE)
    aekd_gradients: str = "mean"  # mean | rows: the teachers' gradients are averaged over the batch first, or not
    # the largest weight of a teacher; 1: any
    aekd_bound: float = field(default=0.6, metadata=within(Range(0, 1, above=True)))


@dataclass
class StagesConfig:
    # the adapter is frozen after this many epochs; null: never
    adapter_epochs: int | None = field(default=None, metadata=NOT_NEGATIVE)
    # the adapter's own constant learning rate; null: the student's
    adapter_lr: float | None = field(default=None, metadata=NOT_NEGATIVE)
    # epochs after which it is multiplied by 0.1
    adapter_milestones: list[int] = field(default_factory=list, metadata=NOT_NEGATIVE)


@dataclass
class VariantConfig:
    """A method of one's own: another method with other values of `loss` and `stages`."""

    method: str = "amtml_kd"
    label: str | None = None
    loss: dict[str, Any] = field(default_factory=dict, metadata=keys_of(LossConfig))
    stages: dict[str, Any] = field(default_factory=dict, metadata=keys_of(StagesConfig))


@dataclass
class CompareConfig:
    methods: list[str] = field(default_factory=lambda: ["student", "avg_mkd", "amtml_kd"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata=SEED)
    # numbers of teachers: the first n of them; empty: all
    teachers: list[int] = field(default_factory=list, metadata=COUNT)
    students: list[StudentConfig] = field(default_factory=list)  # further students, beside `student`
    split: str = "test"  # test | validation: where the tables' accuracies are measured; choose settings on validation
    workers: int | None = field(default=None, metadata=COUNT)  # trainings side by side; null: one a GPU, else one


@dataclass
class EngineConfig:
    mixed_precision: str = "no"
    gradient_accumulation_steps: int = field(default=1, metadata=COUNT)
    compile: bool = False  # torch.compile for teachers and student
    cuda_graphs: bool = False  # with compile, on a GPU: the student's step is replayed as CUDA graphs
    fsdp: bool = False  # several processes share parameters and optimiser state (FSDP2); false: each has all (DDP)
    channels_last: bool = False
    # a checkpoint after so many steps of an epoch, too; null: after each epoch
    checkpoint_steps: int | None = field(default=None, metadata=COUNT)
    device: str = "auto"  # auto | cpu
    # torch.set_num_threads; null: torch's own choice
    threads: int | None = field(default=None, metadata=within(Range(1, 4096)))


@dataclass
class CacheConfig:
    """The teachers' outputs for the training images, kept on the disk; docs/cache.md."""

    teachers: str = "auto"  # auto: where images are fixed and there is room | always | never
    # null: teacher-cache in `out`, shared by all that is trained there
    folder: str | None = field(default=None, metadata=PATH)
    logits: Any = "float32"  # float32 | float16 | k: the k largest log-probabilities and the mass of the others
    hints: str = "float32"  # float32 | float16 | never: methods with hints then run the teachers in each step


@dataclass
class Config:
    name: str = "run"
    seed: int = field(default=0, metadata=SEED)
    preset: str = "default"
    data: DataConfig = field(default_factory=DataConfig)
    teachers: list[TeacherConfig] = field(default_factory=list)
    student: StudentConfig = field(default_factory=StudentConfig)
    teach: TrainConfig = field(default_factory=TrainConfig)
    distill: TrainConfig = field(default_factory=TrainConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)
    variants: dict[str, VariantConfig] = field(default_factory=dict)
    compare: CompareConfig = field(default_factory=CompareConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    out: str = field(default="runs", metadata=PATH)

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name

    @property
    def cache_folder(self) -> Path:
        return Path(self.cache.folder) if self.cache.folder is not None else Path(self.out) / "teacher-cache"

    @property
    def augment_seed(self) -> int:
        return self.seed if self.data.augment_seed is None else self.data.augment_seed


@dataclass
class File(Config):
    """What a file may say."""

    base: str | None = None  # another file, over which this one is read


def two_stage(config: Config) -> dict[str, Any]:
    """Adapter and student together, then the adapter frozen: after 80 of 280 epochs with the authors."""
    return {"stages": {"adapter_epochs": max(1, round(config.distill.epochs * 80 / 280))}}


def paper_code(config: Config) -> dict[str, Any]:
    """What the authors' notebooks do, as far as it differs; docs/method.md has the list. 280 epochs with them, of which
    80 train the adapter; other numbers of epochs are scaled."""

    def scaled(epoch: int) -> int:
        return max(1, round(config.distill.epochs * epoch / 280))

    groups = list(config.student.groups)
    return {
        "loss": {
            "reduction": "mean",
            "kl_scale": 2.0,
            "alpha": 0.7,
            "temperature": 5.0,
            "pool": "avg",
            "init_scale": 1.0,
            "adapter_seed": 1,
            "regularizer_weight": 0.1,
            "angle_on": "logits",
            "distance_weight": 1.0,
            "normalize_hints": True,
            "pool_teacher_hints": True,
            "hint_bound": 0.005,
            "train_hints": False,
            # Of three teachers the first two give hints.
            "mapping": {t.name: g for t, g in list(zip(config.teachers, groups, strict=False))[:2]} or "best_high",
        },
        "stages": {
            "adapter_epochs": scaled(80),
            "adapter_lr": 0.1,
            "adapter_milestones": [scaled(40), scaled(50)],
        },
        "distill": {
            "optimizer": "sgd",
            "lr": 0.1,
            "momentum": 0.9,
            "nesterov": False,
            "weight_decay": 5e-4,
            "schedule": "step",
            "warmup": 0.0,
            "milestones": [scaled(180), scaled(230)],
            "gamma": 0.1,
        },
    }


# A preset sees the configuration without it and returns the values that it sets; an explicit key beats it.
PRESETS: dict[str, Callable[[Config], dict[str, Any]]] = {
    "default": lambda config: {},
    "two_stage": two_stage,
    "paper_code": paper_code,
}

CHOICES = {
    "preset": tuple(PRESETS),
    "loss.mode": ("mixture", "sum"),
    "loss.pool": ("max", "avg"),
    "loss.reduction": ("batchmean", "mean"),
    "loss.adapter": ("learned", "uniform"),
    "loss.angle_on": ("probabilities", "logits"),
    "loss.aekd_gradients": ("mean", "rows"),
    "compare.split": ("test", "validation"),
    "engine.mixed_precision": ("no", "fp16", "bf16"),
    "engine.device": ("auto", "cpu"),
    "cache.teachers": ("auto", "always", "never"),
    "cache.hints": ("float32", "float16", "never"),
}
MAPPINGS = ("best_high", "best_low", "random")
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("onecycle", "step", "cosine", "constant")


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
    """The configuration in `source` (file, run folder or packaged name) with `key=value` overrides applied."""
    path, overrides = find(source), list(overrides)
    written = _read(path)
    plain = _merge({}, written, overrides, str(path))
    if plain.preset not in PRESETS:
        raise ConfigError(_bad_choice("preset", plain.preset, tuple(PRESETS)))
    config = _merge(PRESETS[plain.preset](plain), written, overrides, str(path))
    _expand(config)
    _check(config)
    return config


def parse(written: Mapping[str, Any], source: str) -> Config:
    """The configuration that `to_dict` made a mapping of; `source` is named in errors."""
    config = _merge({}, written, [], source)
    _expand(config)
    _check(config)
    return config


def _read(path: Path, inner: tuple[Path, ...] = ()) -> Any:
    """What a file says, over what the file that its `base` names says."""
    if path in inner:
        raise ConfigError(f"config: base: files that name each other: {' -> '.join(map(str, (*inner, path)))}")
    try:
        with _errors(Config, "", str(path)):
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
    return OmegaConf.merge(_read(beside if beside.is_file() else find(base), (*inner, path)), written)


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that `load` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: Any) -> dict[str, Any]:
    """Plain containers, for JSON."""
    return dataclasses.asdict(config)


def changed(config: Config, settings: Mapping[str, Any], source: str) -> Config:
    """The configuration with a method's own values in it, checked like a file; `source` is named in errors."""
    with _errors(Config, "", source):
        merged = OmegaConf.merge(OmegaConf.structured(config), dict(settings))
        if isinstance(mapping := settings.get("loss", {}).get("mapping"), Mapping):
            OmegaConf.update(merged, "loss.mapping", dict(mapping), merge=False)
        result = typing.cast(Config, OmegaConf.to_object(merged))
    _check_values(result)
    return result


def _make_sections(merged: Any, key: str) -> None:
    """Those on the way to a dotted key that are not there yet (a new variant): OmegaConf would make plain mappings."""
    parts = key.split(".")
    for place in (".".join(parts[: n + 1]) for n in range(len(parts))):
        hint = schema.hint_at(Config, place)
        if dataclasses.is_dataclass(hint) and OmegaConf.select(merged, place) is None:
            OmegaConf.update(merged, place, OmegaConf.structured(hint))


def teacher_train(config: Config, teacher: TeacherConfig) -> TrainConfig:
    """`teach` with this teacher's own `train` keys over it."""
    where = f"teachers.{teacher.name}.train"
    with _errors(TrainConfig, where):
        merged = OmegaConf.merge(OmegaConf.structured(config.teach), teacher.train)
        return typing.cast(TrainConfig, OmegaConf.to_object(merged))


def _merge(preset: dict[str, Any], written: Any, overrides: list[str], source: str) -> Config:
    with _errors(Config, "", source):
        merged = OmegaConf.merge(OmegaConf.structured(Config), preset, written)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"config: an override is key=value, got {override!r}")
        with _errors(Config, "", f"the override {override!r}"):
            try:
                # A mapping of free keys (args, groups) is replaced whole; a section (distill={...}) is merged into.
                hint, free = (schema.hint_at(Config, key.strip(), free=free) for free in (False, True))
                new = yaml_text.value(value, free, key.strip())
                if isinstance(new, list) and dataclasses.is_dataclass(schema.inner(hint)):
                    new = [OmegaConf.merge(OmegaConf.structured(schema.inner(hint)), item) for item in new]
                section = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else None
                if isinstance(new, dict) and dataclasses.is_dataclass(section):
                    new = {name: OmegaConf.merge(OmegaConf.structured(section), one) for name, one in new.items()}
                _make_sections(merged, key.strip())
                OmegaConf.update(merged, key.strip(), new, merge=dataclasses.is_dataclass(hint))
            except (IndexError, TypeError, ValueError) as error:
                if isinstance(error, (OmegaConfBaseException, yaml_text.Ambiguous)):
                    raise
                raise ConfigError(f"config: {key}: {error} (in the override {override!r})") from None
    with _errors(Config, "", source):
        return typing.cast(Config, OmegaConf.to_object(merged))


class _errors:
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
            names = schema.keys(self.schema)
            near = nearest(re.sub(r"\.\d+(?=\.)", "", key), names)
            raise ConfigError(f"config: {shown}: no such key{near}{place}") from None
        wanted = schema.wanted(self.schema, key) if isinstance(error, ValidationError) else ""
        came = str(error).splitlines()[0]
        raise ConfigError(f"config: {shown}: {f'{wanted} wanted: ' if wanted else ''}{came}{place}") from None


def _expand(config: Config) -> None:
    """Puts the home folder in place of ~ in every path."""
    for key, value, section, one in schema.leaves(config):
        if value is not None and schema.HOME in one.metadata and value.startswith("~"):
            try:
                setattr(section, one.name, str(Path(value).expanduser()))
            except RuntimeError:
                raise ConfigError(
                    f"config: {key} must be a path, with the home folder of a known user for ~, got {value!r}"
                ) from None


def _bad_choice(key: str, value: Any, choices: Iterable[str]) -> str:
    choices = list(choices)
    return f"config: {key}: one of {', '.join(choices)} wanted, got {value!r}{nearest(str(value), choices)}"


def _check(config: Config) -> None:
    """Everything that types do not say."""
    _check_values(config)
    _check_compare(config)


def _check_values(config: Config) -> None:
    if out := schema.out_of_range(config):
        raise ConfigError(f"config: {out}")
    for key, choices in CHOICES.items():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        if value not in choices:
            raise ConfigError(_bad_choice(key, value, choices))
    _check_place(config.name)
    if not isinstance(config.loss.mapping, Mapping) and config.loss.mapping not in MAPPINGS:
        raise ConfigError(_bad_choice("loss.mapping", config.loss.mapping, MAPPINGS) + " (or teacher: group pairs)")
    logits = config.cache.logits
    if logits not in ("float32", "float16") and not (type(logits) is int and logits >= 1):
        raise ConfigError(f"config: cache.logits: float32, float16 or a number k of 1 or more wanted, got {logits!r}")
    if config.data.views is not None and not config.data.augment:
        raise ConfigError(f"config: data.views must be null with data.augment=false, got {config.data.views}")
    if config.cache.teachers == "always" and config.data.augment and config.data.views is None:
        raise ConfigError(
            "config: cache.teachers=always: data.views (a number of fixed versions of each image) or data.augment=false "
            "wanted, got images that are drawn anew every epoch"
        )
    _check_train("teach", config.teach)
    _check_train("distill", config.distill)
    _check_names("teachers.name", [teacher.name for teacher in config.teachers])
    for teacher in config.teachers:
        _check_train(f"teachers.{teacher.name}.train", teacher_train(config, teacher))
        _check_statistics(f"teachers.{teacher.name}.model", teacher.model)
    loss = config.loss
    if loss.adapter == "learned" and not loss.kl_trains_weights:
        if loss.adapter_label_weight == 0.0:
            raise ConfigError(
                "config: loss.adapter_label_weight: above 0 wanted where kl_trains_weights=false, got 0.0"
            )
        if loss.angle_trains_weights:
            raise ConfigError(
                "config: loss.angle_trains_weights: false wanted where kl_trains_weights=false, got true: the weights would "
                "be fixed for the angle loss, too"
            )
    engine = config.engine
    if engine.cuda_graphs and not engine.compile:
        raise ConfigError("config: engine.cuda_graphs: engine.compile=true wanted beside it, got false")
    if engine.fsdp and engine.mixed_precision == "fp16":
        raise ConfigError("config: engine.mixed_precision: no or bf16 wanted with engine.fsdp=true, got fp16")


def _check_place(name: str) -> None:
    """That runs of this name lie in `out`."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
        raise ConfigError(f"config: name must be a folder's name, below out, got {name!r}")


def _check_names(key: str, names: list[str]) -> None:
    """That these can be parts of folders' names, each of its own."""
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*", name) or names.count(name) > 1:
            raise ConfigError(f"config: {key} must be unique names of letters, digits, ., - and _, got {names}")


def _check_compare(config: Config) -> None:
    from .methods import chosen

    asked = config.compare
    compared = chosen(config, asked.methods)
    for method in chosen(config, dict.fromkeys([*asked.methods, *config.variants])):
        epochs = changed(config, method.settings(config), f"the method {method.name}").distill.epochs
        if method in compared and epochs != config.distill.epochs:
            raise ConfigError(
                f"config: {method.name}: the same {config.distill.epochs} epochs for all wanted, got {epochs}"
            )
    _check_names("variants", list(config.variants))
    for count in asked.teachers:
        if not 1 <= count <= len(config.teachers):
            raise ConfigError(
                f"config: compare.teachers: 1 to {len(config.teachers)} (the teachers) wanted, got {count}"
            )
    _check_names("compare.students.name", [config.student.name, *(student.name for student in asked.students)])


def _check_statistics(where: str, model: ModelConfig) -> None:
    """A teacher's own mean and std, which only make sense beside weights that were trained elsewhere."""
    from .zoo import brings_weights

    if model.mean is None and model.std is None:
        return
    if not model.mean or not model.std or len(model.mean) != len(model.std):
        raise ConfigError(
            f"config: {where}: mean and std of equal length wanted, got mean={model.mean}, std={model.std}"
        )
    if not brings_weights(model):
        raise ConfigError(
            f"config: {where}.mean: weights from elsewhere wanted beside it (weights, or a pretrained net), got none: "
            "what teach trains sees images normalised by the data's own mean and std"
        )


def _check_train(where: str, train: TrainConfig) -> None:
    if train.optimizer not in OPTIMIZERS:
        raise ConfigError(_bad_choice(f"{where}.optimizer", train.optimizer, OPTIMIZERS))
    if train.schedule not in SCHEDULES:
        raise ConfigError(_bad_choice(f"{where}.schedule", train.schedule, SCHEDULES))
    if out := schema.out_of_range(train, where):
        raise ConfigError(f"config: {out}")
