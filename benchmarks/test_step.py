"""Images a second of a whole training step: the trainer's with our losses, the same with plain ones, and a loop as published code
has it. ResNet20 learns from ResNet32, 56 and 110 on 32 x 32 images. The quick run has smaller networks."""

import itertools
from collections.abc import Callable

import pytest
import torch

import amtml_fast as af

from . import memory
from .machine import DEVICE, seconds
from .paper_loop import Images, PaperLoss, batches
from .workloads import Workload

pytest.importorskip("accelerate", reason='the trainer needs "amtml-fast[train]"')

from amtml_fast.train import config as configs
from amtml_fast.train import data as datasets
from amtml_fast.train import jobs, loop
from amtml_fast.train import teachers as frozen
from amtml_fast.train.features import FeatureExtractor
from amtml_fast.train.models import build

GROUPS = {"low": "stage1", "mid": "stage2", "high": "stage3"}
OURS = "our losses"
PLAIN = "the same with plain losses"
PAPER = "a loop as published"


class Setting:
    """Networks with random weights, and random images on the device."""

    def __init__(self, student: int, teachers: tuple[int, ...], batch: int) -> None:
        torch.manual_seed(0)
        images = torch.randint(0, 256, (2 * batch + 8, 3, 32, 32), dtype=torch.uint8)
        whole = datasets.ImageSet(images, torch.randint(0, 100, (len(images),)))
        part = datasets.ImageSet(images[:8], whole.labels[:8])
        names = tuple(map(str, range(100)))
        self.data = datasets.ImageData("random", whole, part, part, names, (0.5,) * 3, (0.25,) * 3).to(DEVICE)
        self.batch, self.depths = batch, teachers
        self.config = configs.Config(
            student=configs.StudentConfig(factory="resnet", args={"depth": student}, features="stage3", groups=GROUPS),
            distill=configs.TrainConfig(batch_size=batch),
        )
        self.job = jobs.student_job(self.config, "amtml_kd", 0)
        models = [
            FeatureExtractor(
                build("resnet", {"depth": d}, num_classes=100, in_channels=3, weights=None), {"hint": "stage3"}
            )
            for d in teachers
        ]
        ready = [m.to(DEVICE).eval().requires_grad_(False) for m in models]
        self.teachers = frozen.assemble([f"resnet{d}" for d in teachers], ready, self.data)

    def trainer_step(self, backend: str) -> tuple[Callable[[], object], Callable[[], object]]:
        """The trainer's step, and its losses alone."""
        module = jobs.make_distiller(self.job, self.data, self.teachers).to(DEVICE)
        optimizer = loop.make_optimizer(self.config.distill, module)
        loader = datasets.Loader(
            self.data.train, self.data, self.batch, shuffle=True, augment=True, drop_last=True, seed=0
        )
        stream, sums = itertools.chain.from_iterable(itertools.repeat(loader)), loop.Sums(DEVICE)

        def step() -> None:
            batch = next(stream)
            taught = self.teachers.outputs(batch)
            with af.use_backend(backend):
                out, logits = module(batch.images, batch.labels, taught.logits, taught.maps)
                out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            sums.add(out, logits, batch.labels)

        batch = next(stream)
        taught = self.teachers.outputs(batch)
        logits, maps = module.student(batch.images)
        leaves = [logits.detach().requires_grad_(), {k: x.detach().requires_grad_() for k, x in maps.items()}]

        def losses() -> None:
            with af.use_backend(backend):
                module.objective(*leaves, batch.labels, taught.logits, taught.maps).loss.backward()

        return step, losses

    def paper_step(self) -> Callable[[], object]:
        student = jobs.make_distiller(self.job, self.data, self.teachers).student.to(DEVICE)
        widths = {"low": 16, "mid": 32, "high": 64}
        loss = PaperLoss(64, len(self.depths), [(widths[g], c) for g, c in zip(GROUPS, self.teachers.channels)]).to(
            DEVICE
        )
        optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], lr=0.1, momentum=0.9)
        cpu = self.data.to("cpu")
        stream = batches(Images(cpu.train.images, cpu.train.labels, cpu.mean, cpu.std), self.batch)
        total = {"loss": 0.0, "correct": 0}

        def step() -> None:
            images, labels = (x.to(DEVICE) for x in next(stream))
            taught, hints = [], []
            for teacher in self.teachers.models:
                with torch.no_grad():
                    out, caught = teacher(images)
                taught.append(out)
                hints.append(caught["hint"])
            logits, maps = student(images)
            value = loss(logits, maps[jobs.FEATURES], [maps[g] for g in GROUPS], labels, taught, hints)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            total["loss"] += value.item()
            total["correct"] += (logits.argmax(1) == labels).sum().item()

        return step


PUBLISHED, SMALL = (20, (32, 56, 110)), (8, (8, 14))


@pytest.mark.parametrize("provider", [OURS, PLAIN, PAPER])
@pytest.mark.parametrize(
    ("nets", "batch"),
    [pytest.param(SMALL, 64, marks=pytest.mark.quick), (PUBLISHED, 128), (PUBLISHED, 1024)],
    ids=["small-64", "published-128", "published-1024"],
)
def test_step(
    nets: tuple[int, tuple[int, ...]], batch: int, provider: str, timed: Callable, refuse_too_large: Callable
) -> None:
    group = f"step, ResNet{nets[0]} from ResNet{'/'.join(map(str, nets[1]))}, batch {batch}"
    plain_angle = memory.predicted(Workload("angle", (batch, 100)), "eager")
    refuse_too_large(0 if provider == OURS else plain_angle, group, provider)
    setting = Setting(*nets, batch)
    facts: dict[str, float] = {"images": batch}
    if provider == PAPER:
        step = setting.paper_step()
    else:
        step, losses = setting.trainer_step("auto" if provider == OURS else "reference")
        losses()
        facts["losses_seconds"] = min(seconds(losses) for _ in range(3))
    timed(step, group, provider, **facts)
