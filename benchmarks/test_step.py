"""Images a second of a whole training step, and its parts: the trainer's, with its switches, with plain losses, and a loop as published
code has it. ResNet20 learns from ResNet32, 56 and 110 on 32 x 32 images. The quick run has smaller networks."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import amtml_fast as af

from . import memory
from .machine import DEVICE
from .paper_loop import Images, PaperLoss, batches
from .workloads import Workload

pytest.importorskip("accelerate", reason='the trainer needs "amtml-fast[train]"')

from amtml_fast.train.config import environment
from amtml_fast.train.config.schema import (
    CacheConfig,
    Config,
    DataConfig,
    EngineConfig,
    ModelConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from amtml_fast.train.data.images import ImageData, ImageSet, Loader
from amtml_fast.train.models.features import FeatureExtractor
from amtml_fast.train.models.networks import build
from amtml_fast.train.progress import Display
from amtml_fast.train.run.folder import Run
from amtml_fast.train.run.job import FEATURES, student_job
from amtml_fast.train.run.prepare import load_teachers, make_accelerator
from amtml_fast.train.run.trainer import Trainer
from amtml_fast.train.teachers.frozen import weights_file

GROUPS = {"low": "stage1", "mid": "stage2", "high": "stage3"}


@dataclass(frozen=True)
class Switches:
    """How the trainer runs."""

    channels_last: bool | str = "auto"
    compile: bool = False
    cached: bool = False
    losses: str = "auto"  # a backend
    graphs: bool | str = "auto"
    precision: str | None = None
    method: str = "amtml_kd"


PAPER = "a loop as published"
PROVIDERS: dict[str, Switches | None] = {
    "the trainer": Switches(),
    "channels_last off": Switches(channels_last=False),
    "compiled": Switches(compile=True),
    "precision=auto": Switches(precision="auto"),
    "precision=auto, compiled": Switches(precision="auto", compile=True),
    "cached teachers": Switches(cached=True),
    "cached and compiled": Switches(cached=True, compile=True),
    "the trainer, plain losses": Switches(losses="reference"),
    "Gated KD": Switches(method="gated_kd"),
    "AvgMKD": Switches(method="avg_mkd"),
    PAPER: None,
}


class Setting:
    """Networks with random weights, and random images on the device."""

    def __init__(self, student: int, teachers: tuple[int, ...], batch: int) -> None:
        torch.manual_seed(0)
        images = torch.randint(0, 256, (2 * batch + 8, 3, 32, 32), dtype=torch.uint8)
        whole = ImageSet(images, torch.randint(0, 100, (len(images),)))
        part = ImageSet(images[:8], whole.labels[:8])
        names = tuple(map(str, range(100)))
        self.data = ImageData("random", whole, part, part, names, (0.5,) * 3, (0.25,) * 3).to(DEVICE)
        self.batch, self.depths = batch, teachers
        self.student = StudentConfig(factory="resnet", args={"depth": student}, features="stage3", groups=GROUPS)
        self.teachers = [
            TeacherConfig(f"resnet{d}", ModelConfig("resnet", {"depth": d}), hint="stage3") for d in teachers
        ]

    def config(self, switches: Switches, folder: Path) -> Config:
        """One for `amtml-fast distill`, with teachers of random weights in `folder`."""
        engine = EngineConfig(
            channels_last=switches.channels_last,
            compile=switches.compile,
            cuda_graphs=switches.graphs,
            precision=switches.precision,
        )
        engine.mixed_precision = "no" if engine.precision is None else environment.fastest(engine)
        config = Config(
            data=DataConfig(augment=not switches.cached),
            teachers=self.teachers,
            student=self.student,
            distill=TrainConfig(batch_size=self.batch),
            engine=engine,
            cache=CacheConfig(teachers="always" if switches.cached else "never"),
            out=str(folder),
        )
        for depth, teacher in zip(self.depths, self.teachers):
            net = build("resnet", {"depth": depth}, num_classes=100, in_channels=3, weights=None)
            path = config.folder / "teachers" / teacher.name / "model.safetensors"
            path.parent.mkdir(parents=True)
            save_file(net.state_dict(), path)
        return config

    def trainer_of(self, config: Config, method: str = "amtml_kd") -> Trainer:
        """As `amtml-fast distill` makes it."""
        display = Display(quiet=True)
        job = student_job(config, method, 0)
        accelerator = make_accelerator(config.engine, job.folder)
        teachers = load_teachers(config, self.data, [job], display)
        return Trainer(job, Run(job.folder), accelerator, self.data, teachers, display)

    def trainer_step(
        self, switches: Switches, folder: Path
    ) -> tuple[Callable[[], None], Callable[[int], dict[str, float]]]:
        """The trainer's step, and the seconds of its parts, mean over so many steps."""
        trainer = self.trainer_of(self.config(switches, folder), switches.method)
        timer, rates = trainer.whole_step.timer, [0.1] * len(trainer.optimizer.param_groups)
        stream = itertools.chain.from_iterable(trainer.loader.draws() for _ in itertools.count())

        def step() -> None:
            with af.use_backend(switches.losses):
                trainer.learn([next(stream)], rates)

        def parts(steps: int) -> dict[str, float]:
            timer.read()
            for _ in range(steps):
                step()
            return {part: seconds / steps for part, seconds in timer.read().items()}

        timer.start()  # before a graph is captured, which then holds its events
        return step, parts

    def paper_step(self, folder: Path, *, compiled: str | None = None) -> Callable[[], object]:
        """compiled: a mode of torch.compile for the networks and the loss."""

        def net(depth: int, paths: Mapping[str, str], weights: Path | None = None) -> FeatureExtractor:
            bare = build("resnet", {"depth": depth}, num_classes=100, in_channels=3, weights=weights)
            return FeatureExtractor(bare, paths).to(DEVICE)

        config = self.config(Switches(), folder)
        files = [weights_file(config, teacher) for teacher in self.teachers]
        teachers = [net(depth, {"hint": "stage3"}, file).eval() for depth, file in zip(self.depths, files)]
        student = net(self.student.args["depth"], {FEATURES: "stage3", **GROUPS})
        two = next(iter(Loader(self.data.val, self.data, 2))).images
        student.probe(two, training=True)
        for teacher in teachers:
            teacher.probe(two)
        widths = {"low": 16, "mid": 32, "high": 64}
        loss = PaperLoss(64, len(teachers), [(width, 64) for width in widths.values()][: len(teachers)]).to(DEVICE)
        if compiled is not None:
            for module in (*teachers, student, loss):
                module.compile(dynamic=False, mode=compiled)
        optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], lr=0.1, momentum=0.9)
        cpu = self.data.to("cpu")
        stream = batches(Images(cpu.train.images, cpu.train.labels, cpu.mean, cpu.std), self.batch)
        total = {"loss": 0.0, "correct": 0}

        def step() -> None:
            torch.compiler.cudagraph_mark_step_begin()
            images, labels = (x.to(DEVICE) for x in next(stream))
            taught, hints = [], []
            for teacher in teachers:
                with torch.no_grad():
                    out, caught = teacher(images)
                taught.append(out)
                hints.append(caught["hint"])
            logits, maps = student(images)
            value = loss(logits, maps[FEATURES], [maps[g] for g in GROUPS], labels, taught, hints)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            total["loss"] += value.item()
            total["correct"] += (logits.argmax(1) == labels).sum().item()

        return step


PUBLISHED, SMALL = (20, (32, 56, 110)), (8, (8, 14))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    ("nets", "batch"),
    [pytest.param(SMALL, 64, marks=pytest.mark.quick), (PUBLISHED, 128), (PUBLISHED, 1024)],
    ids=["small-64", "published-128", "published-1024"],
)
def test_step(
    nets: tuple[int, tuple[int, ...]],
    batch: int,
    provider: str,
    timed: Callable,
    refuse_too_large: Callable,
    tmp_path: Path,
) -> None:
    group = f"step, ResNet{nets[0]} from ResNet{'/'.join(map(str, nets[1]))}, batch {batch}"
    switches = PROVIDERS[provider]
    plain_angle = memory.predicted(Workload("angle", (batch, 100)), "eager")
    refuse_too_large(plain_angle if switches is None or switches.losses != "auto" else 0, group, provider)

    def prepare() -> tuple:
        setting = Setting(*nets, batch)
        if switches is None:
            return setting.paper_step(tmp_path), {"images": batch}
        step, parts = setting.trainer_step(switches, tmp_path)
        step()
        return step, {"images": batch, "parts": parts(5 if batch < 1024 else 1)}

    timed(prepare, group, provider)
