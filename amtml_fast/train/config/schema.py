"""The trainer's configuration: dataclasses with defaults, one a section of the YAML file."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..names import pretrained
from .fields import COUNT, FINITE, NOT_NEGATIVE, PATH, POSITIVE, SEED, SHARE, WHOLE, Range, keys_of, within

TEACHERS = "teachers"  # the folder of a comparison's, or of what several share


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which key and what was wanted."""


@dataclass
class DataConfig:
    name: str = "digits"  # a name in DATASETS (data/readers.py) or package.module:factory
    root: str | None = field(default=None, metadata=PATH)
    download: bool = False  # fetch CIFAR through torchvision where its files are missing
    val_fraction: float = field(default=0.1, metadata=within(Range(0, 1, above=True, below=True)))
    augment: bool = False
    # Of students alone: this many fixed augmented versions of each image, one an epoch in turn; null: new ones every epoch.
    views: int | None = field(default=None, metadata=COUNT)
    augment_seed: int | None = field(default=None, metadata=SEED)  # what the views are drawn from; null: seed
    # Who trains on what (data/parts.py), in shares of every class; null: all
    share: float | None = field(default=None, metadata=within(Range(0, 1, above=True, below=True)))  # all that is used
    # of these images the students'; teachers train on all
    student_share: float | None = field(default=None, metadata=within(Range(0, 1, above=True, below=True)))
    # of the students' images those whose labels they may use, drawn by each run's seed
    labeled_share: float | None = field(default=None, metadata=within(Range(0, 1, above=True, below=True)))
    # upright, rotated, inverted, noisy: the images of a split go round them; empty: as they are
    domains: list[str] = field(default_factory=list)


@dataclass
class ModelConfig:
    factory: str = "small_cnn"  # a name in MODELS (models/networks.py) or package.module:factory
    args: dict[str, Any] = field(default_factory=dict)
    # a state dict: .safetensors, or .pt read with weights_only
    weights: str | None = field(default=None, metadata=PATH)
    # What its training images were normalized by, for weights from elsewhere; null: what the net says, else as the data.
    mean: list[float] | None = field(default=None, metadata=FINITE)
    std: list[float] | None = field(default=None, metadata=POSITIVE)

    @property
    def brings_weights(self) -> bool:
        """Whether a teacher needs no training here: it has a weights file, or it is a pretrained net of a library."""
        return self.weights is not None or pretrained(self.factory, self.args)


@dataclass
class TrainConfig:
    epochs: int = field(default=30, metadata=COUNT)
    # images per optimizer step, over all processes and accumulation steps
    batch_size: int = field(default=128, metadata=COUNT)
    optimizer: str = "sgd"
    lr: float = field(default=0.1, metadata=NOT_NEGATIVE)
    momentum: float = field(default=0.9, metadata=SHARE)
    nesterov: bool = False  # of sgd with momentum
    weight_decay: float = field(default=5e-4, metadata=NOT_NEGATIVE)
    schedule: str = "onecycle"
    warmup: float = field(default=0.0, metadata=NOT_NEGATIVE)  # epochs of linear warm-up; onecycle has its own
    # epochs after which `step` multiplies lr by gamma
    milestones: list[int] = field(default_factory=list, metadata=WHOLE)
    gamma: float = field(default=0.1, metadata=NOT_NEGATIVE)


@dataclass
class TeacherConfig:
    name: str = "teacher"
    model: ModelConfig = field(default_factory=ModelConfig)
    hint: str | None = None  # dotted path of the module whose output is the hint map u_t
    # a specialist: trained on the images of these classes alone; null: on all
    classes: list[int] | None = field(default=None, metadata=WHOLE)
    domain: str | None = None  # trained on the images of this one of data.domains alone; null: of all
    shuffled_labels: bool = False  # trained on the labels of other images: a teacher that knows nothing
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
    # what alpha falls to, linearly over the training, for examples with a label; null: alpha, or what the method says
    alpha_end: float | None = field(default=None, metadata=SHARE)
    mode: str = "mixture"
    reduction: str = "batchmean"  # batchmean | mean: the KL is also divided by the number of classes
    kl_scale: float = field(default=1.0, metadata=POSITIVE)  # on the KL term alone
    # of every cross-entropy with the labels, in the teachers' own training too
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
    adapter_epochs: int | None = field(default=None, metadata=WHOLE)
    # the adapter's own constant learning rate; null: the student's
    adapter_lr: float | None = field(default=None, metadata=NOT_NEGATIVE)
    # epochs after which it is multiplied by 0.1
    adapter_milestones: list[int] = field(default_factory=list, metadata=WHOLE)


@dataclass
class VariantConfig:
    """A method of one's own: another method with other values of `loss` and `stages`."""

    method: str = "amtml_kd"
    label: str | None = None
    loss: dict[str, Any] = field(default_factory=dict, metadata=keys_of(LossConfig))
    stages: dict[str, Any] = field(default_factory=dict, metadata=keys_of(StagesConfig))


@dataclass
class CompareConfig:
    methods: list[str] = field(default_factory=lambda: ["student", "avg_mkd", "amtml_kd", "gated_kd"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata=SEED)
    # numbers of teachers: the first n of them; empty: all
    teachers: list[int] = field(default_factory=list, metadata=COUNT)
    students: list[StudentConfig] = field(default_factory=list)  # further students, beside `student`
    split: str = "test"  # test | validation: where the tables' accuracies are measured; choose settings on validation
    workers: int | None = field(default=None, metadata=COUNT)  # trainings side by side; null: one a GPU, else one


@dataclass
class EngineConfig:
    mixed_precision: str = "no"
    # null: as mixed_precision says | auto: the fastest here, bf16 on a GPU or CPU that computes with it, else no
    precision: str | None = None
    gradient_accumulation_steps: int = field(default=1, metadata=COUNT)
    compile: bool = False  # torch.compile for teachers and student
    # auto | true | false: on a GPU the whole step is one CUDA graph; auto: where that is possible, else as much as is
    cuda_graphs: Any = "auto"
    fsdp: bool = False  # several processes share parameters and optimizer state (FSDP2); false: each has all (DDP)
    # auto | true | false: channels adjacent in memory; auto: for images of 16 x 16 and more
    channels_last: Any = "auto"
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
    # where the teachers are, so that several comparisons can share them; null: teachers in the run's folder
    teachers_folder: str | None = field(default=None, metadata=PATH)

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name

    def teacher_folder(self, teacher: str) -> Path:
        return (self.folder / TEACHERS if self.teachers_folder is None else Path(self.teachers_folder)) / teacher

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
    # several configurations, by name: what each says over the rest of the file. They share their teachers.
    regimes: dict[str, Config] = field(default_factory=dict)
