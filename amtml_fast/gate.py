"""How far to trust each teacher with an example, learned from what the teachers say about examples whose label is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from amtml_fast import checks
from amtml_fast.ops._kd import check_labels
from amtml_fast.terms import wide_dtype, without_autocast

FLOOR = -10.0  # log-probabilities are cut off there: how certainly a class is out does not matter
ITERATIONS = 60


class TeacherGate(nn.Module):
    """Teacher weights [N, T] from the teachers' logits, fitted once and then fixed: no training, no student.

        u = concat_t max(log p_t, -10), standardized    g = softmax(W u + b)

    A mixture of experts whose experts are given. ``fit`` finds the most probable W [T, T C] and b [T] of the labels,

        sum_i log sum_t g_t(x_i) p_t(y_i | x_i)  -  (|W|^2 + |b|^2) / 2

    which a few dozen labels determine: without any the weights are uniform. p_t are probabilities at temperature 1.

    Args:
        num_teachers: T.
        classes: C.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, num_teachers: int, classes: int):
        super().__init__()
        for name, value in (("num_teachers", num_teachers), ("classes", classes)):
            checks.count("TeacherGate", name, value)
        self.num_teachers, self.classes = num_teachers, classes
        wide = num_teachers * classes
        sizes = {"mean": (wide,), "scale": (wide,), "weight": (num_teachers, wide), "bias": (num_teachers,)}
        with torch.inference_mode(False):  # inference tensors could not be fitted again
            for name, size in sizes.items():
                self.register_buffer(name, torch.zeros(size, dtype=torch.float32, device="cpu"))

    def _apply(self, fn: Callable, recurse: bool = True) -> TeacherGate:
        """Its numbers stay wide where a model is made narrow: ``scale`` is up to 1000, and what it stands for a difference."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, now in self.named_buffers(recurse=False):
            if now.dtype in (torch.bfloat16, torch.float16):
                self._buffers[name] = before[name].to(now.device)
        return self

    def reset_parameters(self) -> None:
        """As before ``fit``, where they are: after ``to_empty()`` their memory holds anything."""
        for buffer in (self.mean, self.scale, self.weight, self.bias):
            buffer.zero_()

    def fit(
        self, teacher_logits: Tensor | Sequence[Tensor], labels: Tensor, *, ignore_index: int = -100
    ) -> TeacherGate:
        """T teachers' logits [N, C] and labels [N] of examples, ``ignore_index`` where a label is not known: such rows
        only say how the logits are distributed. In float64 on the CPU, in about a second for 8,000 labels of three teachers
        and ten classes. Returns itself.

        Raises:
            ValueError, TypeError: an argument that does not fit, or a logit of NaN; the gate stays as it was.
        """
        name = "TeacherGate.fit"
        given = self._checked(name, teacher_logits)
        checks.integers(name, "labels", labels)
        if labels.shape != given[0].shape[:1]:
            raise ValueError(f"{name}: labels must be {[len(given[0])]} like the logits, got {checks.shape(labels)}")
        checks.ignore_index(name, ignore_index)
        with torch.inference_mode(False), torch.no_grad():
            logits = [z.to("cpu", torch.float64, copy=True) for z in given]  # no inference tensors
            labels = labels.to("cpu", torch.int64, copy=True)
            check_labels(name, labels, self.classes, ignore_index)
            log_p = log_probabilities(logits)  # [N, T, C]
            if not log_p.isfinite().all():
                row, t, _ = (~log_p.isfinite()).nonzero()[0].tolist()
                raise ValueError(f"{name}: teacher_logits[{t}] must give probabilities, got NaN for row {row}")
            self._fit(log_p, labels, labels != ignore_index)
        return self

    def _fit(self, log_p: Tensor, labels: Tensor, known: Tensor) -> None:
        u = log_p.flatten(1)
        mean = u.mean(0) if len(u) else u.new_zeros(u.shape[1])
        spread = u.std(0, correction=0) if len(u) else torch.ones_like(mean)
        # A number that is nearly the same for all examples tells none apart: it is not blown up.
        scale = 1 / spread.clamp_min(1e-3)
        x, rows = ((u - mean) * scale)[known], known.nonzero()[:, 0]
        right = log_p[rows, :, labels[known]]  # [labeled, T]
        weight, bias = most_probable(x, right)
        for old, new in ((self.mean, mean), (self.scale, scale), (self.weight, weight), (self.bias, bias)):
            old.copy_(new)

    def forward(self, teacher_logits: Tensor | Sequence[Tensor]) -> Tensor:
        """T x [N, C] -> weights [N, T] float32 (float64 if a teacher's logits are), each row of sum 1."""
        logits = self._checked("TeacherGate", teacher_logits)
        for t, z in enumerate(logits):
            checks.same_device("TeacherGate", f"teacher_logits[{t}]", z, "the gate", self.mean)
        return self.log_weights(log_probabilities(logits)).exp()

    def log_weights(self, log_p: Tensor) -> Tensor:
        """The same from `log_probabilities`, as logarithms."""
        u = (log_p.flatten(1) - self.mean) * self.scale
        # In 16 bits the product would be off by more than the weights' digits.
        with without_autocast(u):
            return torch.log_softmax(u @ self.weight.to(u.dtype).T + self.bias, -1)

    def _checked(self, name: str, teacher_logits: Tensor | Sequence[Tensor]) -> list[Tensor]:
        given = (
            teacher_logits.unbind() if isinstance(teacher_logits, Tensor) and teacher_logits.dim() else teacher_logits
        )
        if not isinstance(given, (list, tuple)):
            got = checks.shape(given) if isinstance(given, Tensor) else type(given).__name__
            raise TypeError(f"{name}: teacher_logits must be a list of tensors or one [T, N, C] tensor, got {got}")
        logits = [checks.tensor(name, f"teacher_logits[{t}]", z) for t, z in enumerate(given)]
        shapes = [list(z.shape) for z in logits]
        if len(logits) != self.num_teachers or any(len(s) != 2 or s != [shapes[0][0], self.classes] for s in shapes):
            wanted = f"{self.num_teachers} of [N, {self.classes}]"
            raise ValueError(f"{name}: teacher_logits must be {wanted}, got {shapes}")
        return logits

    def extra_repr(self) -> str:
        return f"num_teachers={self.num_teachers}, classes={self.classes}"


def log_probabilities(teacher_logits: Sequence[Tensor]) -> Tensor:
    """T x [N, C] -> max(log p, FLOOR) [N, T, C], float32 or float64."""
    wide = wide_dtype(*teacher_logits)
    return torch.stack([x.to(wide).log_softmax(-1) for x in teacher_logits], 1).clamp_min(FLOOR)


def most_probable(x: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """W [T, K] and b [T] of greatest posterior for inputs [n, K] and each teacher's log-probability of the label [n, T]."""
    weight = torch.zeros(right.shape[1], x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(right.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        likelihood = torch.logsumexp(torch.log_softmax(x @ weight.T + bias, -1) + right, -1).sum()
        prior = (weight.square().sum() + bias.square().sum()) / 2
        loss = (prior - likelihood) / max(1, len(x))  # the optimizer's tolerances are about the mean
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()
