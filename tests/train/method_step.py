"""One batch for the training methods' tests, and a method's objective as the trainer builds it."""

from __future__ import annotations

import types

import torch
from torch import Tensor, nn

from amtml_fast.train.config import reading
from amtml_fast.train.config.schema import Config, LossConfig, StudentConfig, TeacherConfig
from amtml_fast.train.methods.base import Context, Method, Objective, Step
from amtml_fast.train.methods.registry import chosen

N, C, T, D = 12, 5, 3, 6
CHANNELS = {"low": 3, "mid": 4, "high": D}
TEACHER_CHANNELS = (7, 8, 9)


class Peer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, C)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))


def make_step(seed: int = 0, teachers: int = T) -> Step:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    maps = {"low": draw(N, 3, 8, 8), "mid": draw(N, 4, 4, 4), "high": draw(N, D, 2, 2)}
    maps = {name: x.requires_grad_() for name, x in maps.items()}
    logits = (2 * draw(N, C)).requires_grad_()
    labels = torch.randint(C, (N,), generator=g)
    return Step(
        logits,
        maps,
        labels,
        [3 * draw(N, C) for _ in range(teachers)],
        [draw(N, c, 4, 4).relu() for c in TEACHER_CHANNELS[:teachers]],
        draw(N, 1, 2, 4),
        maps["high"],
        student=Peer(),
    )


def make_config(**loss: object) -> Config:
    return Config(
        teachers=[TeacherConfig(name=f"t{i}") for i in range(T)],
        student=StudentConfig(groups={"low": "a", "mid": "b", "high": "c"}),
        loss=LossConfig(**loss),  # type: ignore[arg-type]
    )


def count_of(method: Method) -> int:
    """The teachers that it is given of T."""
    return 1 if method.teachers == "best" or method.teacher is not None else T


def objective(
    method: str | Method,
    teachers: int | None = None,
    seed: int = 0,
    hidden_labels: bool = False,
    processes: int = 1,
    **loss: object,
) -> Objective:
    """As the trainer builds it: the method sees the keys that it says it reads, and no others."""
    torch.manual_seed(seed)
    whole = make_config(**loss)
    made = chosen(whole, [method])[0] if isinstance(method, str) else method
    settings = reading.changed(whole, made.settings(whole), "a test")
    teachers = teachers or count_of(made)
    context = Context(
        loss=types.SimpleNamespace(**made.loss(settings)),  # type: ignore[arg-type]
        classes=C,
        image_shape=(1, 2, 4),
        feature_channels=D,
        student_channels=CHANNELS,
        teacher_channels=TEACHER_CHANNELS[:teachers],
        teacher_names=[f"t{i}" for i in range(teachers)],
        teacher_scores=[0.7, 0.9, 0.8][:teachers],
        processes=processes,
        peers=teachers,
        hidden_labels=hidden_labels,
        new_student=Peer,
    )
    return made.build(context)


def seen(method: Method) -> Step:
    """The step with what the trainer gives to this method."""
    step = make_step(teachers=0 if method.teachers == "none" else count_of(method))
    return step if method.hints(LossConfig()) else step._replace(teacher_maps=[])


def kl(p: Tensor, q_logits: Tensor, tau: float) -> Tensor:
    """tau^2 KL(p || softmax(q / tau)), one value a row."""
    return tau**2 * (p * (p.log() - (q_logits / tau).log_softmax(-1))).sum(-1)
