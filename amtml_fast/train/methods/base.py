"""What a method is: what it needs, and how it builds its objective."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ... import MultiTeacherKDLoss
from ...amtml import GatherRows
from ..config.schema import Config, LossConfig
from ..data.parts import IGNORED

ALL, BEST, NONE = "all", "best", "none"
EQ8 = ("temperature", "alpha", "mode")  # the keys of Eq 8
KD = (*EQ8, "alpha_end")  # those of KDLoss


class Step(NamedTuple):
    """One batch, as an objective sees it."""

    logits: Tensor  # [N, C] of the student
    maps: dict[str, Tensor]  # of the student's layer groups, [N, c, h, w] each; empty for methods without
    labels: Tensor  # [N] int64; IGNORED where it is hidden
    teacher_logits: list[Tensor]  # T x [N, C]
    teacher_maps: list[Tensor]  # T x [N, c_t, h_t, w_t]; empty for methods without hints
    images: Tensor  # [N, c, H, W], normalized
    # the student's last convolutional map, [N, d, h, w]; empty for methods without
    features: Tensor = torch.empty(0, dtype=torch.float32, device="cpu")
    hidden: bool = False  # labels may be
    truth: Tensor | None = None  # [N] every label, for an oracle alone
    progress: Tensor = torch.zeros((), dtype=torch.float32, device="cpu")  # how much of the training is over
    student: nn.Module | None = None  # images -> logits, for methods that ask what it would say after another step


class StepLoss(NamedTuple):
    """What an objective returns for one batch."""

    loss: Tensor  # scalar, with gradient
    terms: dict[str, Tensor]  # detached scalars by their metrics.jsonl name: kd, ce, kl, angle, hint, regularizer
    weights: Tensor | None = None  # [N, T] detached teacher weights, for methods that have them


class Objective(nn.Module):
    """What turns one batch's outputs into a loss, called once a step. Its parameters are trained with the student.

    adapter: the module that gives the teachers their weights, if it learns them. It gets no weight decay, its own rate where
    `stages` has one, and after `stages.adapter_epochs` it is frozen.
    peers: further networks that train here, compiled where the student is.
    """

    adapter: nn.Module | None
    peers: Iterable[nn.Module]

    def __init__(self) -> None:
        super().__init__()
        # Not on the class: nn.Module finds its submodules only where Python finds no other attribute of that name.
        self.adapter, self.peers = None, ()

    def fit(self, teacher_logits: list[Tensor], labels: Tensor) -> None:
        """Called once before the training where the method says `fits`: T x [n, C], [n] for a sample of its images, IGNORED
        where the label is hidden."""

    def weigh(self, features: Tensor | None, teacher_logits: list[Tensor]) -> Tensor:
        """The learned weights [N, T] of images whose label nobody knows: from the student's features, or where the method
        `fits` from the teachers' logits."""
        if self.adapter is None or features is None:
            raise ValueError(f"{type(self).__name__} must have learned weights, got none")
        return cast(Tensor, self.adapter(features))

    def forward(self, step: Step) -> StepLoss:
        raise NotImplementedError(f"{type(self).__name__}: an objective must say how a step's loss is made")


def no_model() -> nn.Module:
    raise RuntimeError("Context.new_student: given by the trainer only")


@dataclass(frozen=True)
class Context:
    """What a method may need to build its objective."""

    loss: LossConfig
    classes: int
    image_shape: Sequence[int] = ()  # [c, H, W]
    feature_channels: int = 0  # d of the student's last map
    student_channels: Mapping[str, int] = field(default_factory=dict)  # layer groups, low to high
    teacher_channels: Sequence[int] = ()
    teacher_names: Sequence[str] = ()
    teacher_scores: Sequence[float] = ()  # validation accuracies
    processes: int = 1
    hidden_labels: bool = False  # data.labeled_share
    peers: int = 0  # how many teachers there are, also for a method that asks none of them
    new_student: Callable[[], nn.Module] = no_model  # another network of the student's kind, freshly initialized


@dataclass(frozen=True)
class Method:
    """A way to train a student. `build` makes its objective."""

    name: str
    label: str  # as printed in tables and figures
    build: Callable[[Context], Objective]
    teachers: str = ALL  # ALL of them, the BEST one on the validation split, or NONE
    teacher: str | None = None  # this one alone
    features: bool = False  # the student's last convolutional map, Step.features
    pooled: bool = False  # its features may be [N, d], too
    hints: Callable[[LossConfig], bool] = lambda loss: False  # the teachers' hint maps, Step.teacher_maps
    groups: Callable[[LossConfig], bool] = lambda loss: False  # the maps of the student's layer groups
    # The keys of `loss` that it depends on, beside label_smoothing, each by name: it is shown no others, and a new key
    # of another method leaves its finished runs what they are.
    reads: tuple[str, ...] = ()
    fits: bool = False  # its objective looks at the teachers' outputs before the training
    peers: bool = False  # trains as many peers as there are teachers
    labels: Callable[[LossConfig], bool] = lambda loss: False  # labels decide about the teachers' weights
    base: str = ""  # the method of which this is a variant or an ablation
    settings: Callable[[Config], Mapping[str, Any]] = lambda config: {}  # what it changes in the configuration

    @property
    def needs_teachers(self) -> bool:
        return self.teachers != NONE

    def loss(self, config: Config) -> dict[str, Any]:
        """The part of `loss` that this method depends on: with the other parts it trains the same student."""
        return {key: getattr(config.loss, key) for key in (*self.reads, "label_smoothing")}

    def needs(self, loss: LossConfig) -> list[str]:
        """In words, for listings and errors."""
        teachers = {ALL: "teachers", BEST: "best teacher", NONE: ""}[self.teachers]
        asked = {
            "teacher" if self.teacher else teachers: self.needs_teachers,
            "student features": self.features,
            "hints": self.hints(loss),
            "student groups": self.groups(loss),
            "peers": self.peers,
            "labels for the weights": self.labels(loss),
        }
        return [name for name, needed in asked.items() if needed]


def cross_entropy(step: Step, loss: LossConfig) -> Tensor:
    """The mean over the batch, to which examples without a label add nothing."""
    if not step.hidden:
        return F.cross_entropy(step.logits, step.labels, label_smoothing=loss.label_smoothing)
    rows = F.cross_entropy(
        step.logits, step.labels, label_smoothing=loss.label_smoothing, ignore_index=IGNORED, reduction="sum"
    )
    return rows / len(step.labels)


def all_rows(rows: Tensor, processes: int) -> Tensor:
    """The rows of all processes, of which the loader gives each the same number; with the gradient of the whole batch's loss."""
    return cast(Tensor, GatherRows.apply(rows, [len(rows)] * processes)) if processes > 1 else rows


def average(value: Tensor, processes: int) -> Tensor:
    """The mean of the processes' values; of several, without a gradient."""
    if processes > 1:
        value = value.detach() / processes
        dist.all_reduce(value)
    return value


def mean_of_known(rows: Tensor, labels: Tensor, processes: int) -> Tensor:
    """The mean over the rows whose label is not IGNORED. The average of what several processes get is that of the global batch."""
    known = labels != IGNORED
    count = average(known.sum(dtype=rows.dtype), processes).clamp_min(1 / processes)
    return rows.where(known, 0).sum() / count


def mixture(probs: Tensor, weights: Tensor) -> Tensor:
    """Eq 7: probs [N, T, C] weighted by [N, T], [N, C]."""
    return (probs * weights.unsqueeze(-1)).sum(1)


def of_label(log_p: Tensor, labels: Tensor) -> Tensor:
    """[N, T]: what log_p [N, T, C] holds for each example's label [N]."""
    return log_p.gather(2, labels[:, None, None].expand(-1, log_p.shape[1], 1))[..., 0]


def heaviest(weights: Tensor) -> Tensor:
    """[N, T]: 1 at the largest of the weights [N, T], shared where several are equal: of equal weights nobody leads."""
    most = (weights == weights.amax(1, keepdim=True)).float()
    return most / most.sum(1, keepdim=True)


def divergences(logits: Tensor, teacher_logits: Sequence[Tensor], temperature: float) -> Tensor:
    """tau^2 KL(p_t || q) of each example and teacher: [N, C], T x [N, C] -> [N, T]. In plain PyTorch, differentiable twice."""
    log_q = (logits.float() / temperature).log_softmax(-1)
    each = []
    for z in teacher_logits:
        log_p = (z.float() / temperature).log_softmax(-1)
        p = log_p.exp()
        each.append(torch.where(p > 0, p * (log_p - log_q), 0).sum(-1))
    return temperature**2 * torch.stack(each, 1)


class KDLoss(nn.Module):
    """Eq 8 with the configuration's temperature and alpha. An example without a label learns from the teachers alone; for the
    others alpha may fall over the training: teachers early, labels late."""

    def __init__(self, loss: LossConfig, mode: str | None = None, end: float | None = None) -> None:
        """end: what alpha falls to where the configuration does not say; None: it stays."""
        super().__init__()
        self.alpha, self.end = loss.alpha, end if loss.alpha_end is None else loss.alpha_end
        self.fused = MultiTeacherKDLoss(
            temperature=loss.temperature, alpha=loss.alpha, mode=mode or loss.mode, label_smoothing=loss.label_smoothing
        )

    def forward(self, step: Step, weights: Tensor | None) -> Tensor:
        if not step.hidden and self.end is None:
            return self.fused(step.logits, step.teacher_logits, weights, step.labels)
        wide = torch.float64 if step.logits.dtype == torch.float64 else torch.float32
        alpha = torch.full_like(step.labels, self.alpha, dtype=wide)
        if self.end is not None:
            alpha += (self.end - self.alpha) * step.progress
        hidden = step.labels == IGNORED
        labels, alpha = step.labels.masked_fill(hidden, 0), alpha.masked_fill(hidden, 1.0)
        return self.fused(step.logits, step.teacher_logits, weights, labels, alpha=alpha)
