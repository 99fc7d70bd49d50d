"""The work of ``fused_linear_kd``: one call of a raw operator, chunk by chunk.

Of a chunk of rows a product makes the logits, a row kernel the loss and its gradient to them, and two products the gradients to
the hidden states and the weight. No more than (2 + T) chunks of logits are held at a time.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amtml_fast.ops._base import empty, kernels
from amtml_fast.terms import wide_dtype

NAME = "fused_linear_kd_loss"
TENSORS = {"logits": 1, "topk": 2, "linear": 2, "linear_bias": 3}  # kind of a teacher -> how many tensors it has


Segments = list[tuple[Tensor | None, int, list[int]]]  # row numbers (None: all rows), how many, their teachers


class Settings(NamedTuple):
    """What is no tensor, as the raw ops take it."""

    backend: str
    row_kernel: str
    divergence: str
    beta: float
    mode: str
    teacher_temperatures: list[float]  # none: the student's
    temperature: float
    t2_scale: bool
    ce_weight: float
    kl_weight: float
    reduction: str
    ignore_index: int
    label_smoothing: float
    logit_scale: float
    softcap: float  # 0: none
    chunk_size: int  # 0: chosen here
    narrow_sum: bool  # accumulate="bf16"


class Outputs(NamedTuple):
    """What the raw ops give; what nobody asks for is empty."""

    loss: Tensor  # scalar, or [N] for "none"
    grad_hidden: Tensor
    grad_weight: Tensor
    grad_bias: Tensor
    grad_weights: Tensor  # [N, T]
    grad_alpha: Tensor  # [N]
    stats: Tensor  # [N, 4 + T]


_MIB = 2**20
CPU_BYTES, GPU_BYTES = 56 * _MIB, 1024 * _MIB  # of a chunk's logits
BLOCK = 4 * _MIB  # bytes of a weight that are converted at a time
HALF_SCALE = 256.0  # of logit gradients in float16, most of which are small


class Call:
    """One call of a raw op."""

    def __init__(
        self,
        grad_loss: Tensor | None,  # [N]: given in a backward of "none"
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weights: Tensor | None,
        alphas: Tensor | None,
        labels: Tensor | None,
        index: Tensor | None,
        temperatures: Tensor | None,
        teachers: Sequence[Tensor],
        kinds: list[str],
        *others: Any,
    ):
        count = len(Settings._fields)
        self.set = Settings(*others[:count])
        *self.needs, self.need_stats = others[count:]
        self.grad_loss, self.hidden, self.weight, self.bias = grad_loss, hidden, weight, bias
        self.weights, self.alphas, self.labels, self.index = weights, alphas, labels, index
        self.temperatures = temperatures
        self.inputs = hidden, weight, bias, weights, alphas
        self.kinds, self.teachers = list(kinds), []
        at = 0
        for kind in kinds:
            self.teachers.append(teachers[at : at + TENSORS[kind]])
            at += TENSORS[kind]
        self.wide = wide_dtype(hidden, weight, bias, weights, *teachers)
        self.rows, self.classes = hidden.shape[0], weight.shape[0]
        self.on_cpu = _reads_free(hidden)
        self.buffers: dict[str, Tensor] = {}

    def outputs(self) -> Outputs:
        """Memory for them, not filled in."""
        n, t, set, wide, like = self.rows, len(self.kinds), self.set, self.wide, self.hidden
        sum_dtype = torch.bfloat16 if set.narrow_sum else wide
        shapes = self.hidden.shape, self.weight.shape, (self.classes,), (n, t), (n,)
        dtypes = wide, sum_dtype, wide, wide, wide
        loss = like.new_empty((n,) if set.reduction == "none" else (), dtype=wide)
        grads = [empty(like, *each) for each in zip(self.needs, shapes, dtypes)]
        return Outputs._make([loss, *grads, empty(like, self.need_stats, (n, 4 + t), wide)])

    # --- rows

    def segments(self) -> Segments:
        """Rows that have the same teachers, without those that do not count unless that would take a sync of its own."""
        everyone = list(range(len(self.kinds)))
        valid = None if self.labels is None else self.labels != self.set.ignore_index
        if self.index is None:
            if valid is None or not self.on_cpu or bool(valid.all()):
                return [(None, self.rows, everyone)]
            rows = valid.nonzero().squeeze(1)
            return [(rows, rows.shape[0], everyone)]
        key = torch.where(self.index < len(everyone), self.index, -1)  # above all teachers stand the ignored rows
        key = key if valid is None else torch.where(valid, key, len(everyone))
        key, order = key.sort(stable=True)
        starts = torch.searchsorted(
            key, torch.arange(len(everyone) + 2, dtype=key.dtype, device=key.device)
        ).tolist()  # the one sync
        if starts[0] > 0:
            counted = self.index if valid is None else self.index[valid]
            low, high = map(int, counted.aminmax())
            raise ValueError(f"{NAME}: teacher_index must be in [0, {len(everyone)}), got values in [{low}, {high}]")
        return [(order[a:b], b - a, [t]) for t, (a, b) in enumerate(itertools.pairwise(starts[:-1])) if b > a]

    def chunks(self, segments: Segments, grads: bool) -> Iterator[tuple[Any, list[int]]]:
        """Rows that are taken at a time, and their teachers."""
        for numbers, count, only in segments:
            step = self.chunk_rows(count, only, grads, numbers is not None) if count else 1
            for start in range(0, count, step):
                rows = slice(start, min(start + step, count))
                yield rows if numbers is None else numbers[rows], only

    def chunk_rows(self, rows: int, only: list[int], grads: bool, gathered: bool) -> int:
        """How many rows at a time."""
        if self.set.chunk_size:
            return min(self.set.chunk_size, rows)
        size = self.wide.itemsize
        made = 0 if self.set.row_kernel == "topk_kd" else sum(gathered or self.kinds[t] != "logits" for t in only)
        each = self.classes * (size * (1 + made + grads) + (2 if self.narrow and grads else 0))
        # A chunk's products read the whole weight: with a larger one larger chunks pay.
        whole, step = self.weight.numel() * size, 1 if self.on_cpu else 128
        budget = max(CPU_BYTES, whole // 2) if self.on_cpu else max(GPU_BYTES, whole)
        most = max(budget // each // step * step, step)
        even = -(-rows // -(-rows // most))  # chunks of about one size
        return -(-even // step) * step

    def take(self, x: Tensor, rows: Tensor | slice, name: str = "") -> Tensor:
        if isinstance(rows, slice):
            return x[rows]
        if not name:
            return x.index_select(0, rows)
        return torch.index_select(x, 0, rows, out=self.buffer(name, (rows.shape[0], x.shape[1]), x.dtype))

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Scratch memory under this name, which all chunks use."""
        count = math.prod(shape)
        have = self.buffers.get(name)
        if have is None or have.numel() < count:
            self.buffers.pop(name, None)
            have = self.buffers[name] = self.hidden.new_empty(count, dtype=dtype or self.wide)
        return have[:count].view(shape)

    # --- products

    @property
    def narrow(self) -> bool:
        """Whether the student's products are made of its 16-bit numbers as they are."""
        return _narrow(self.hidden, self.weight, self.wide)

    @property
    def own_products(self) -> bool:
        """Whether the products are those of csrc/cpu."""
        return self.set.backend == "cpp" and self.wide == torch.float32

    def blocks(self, weight: Tensor) -> Any:
        """A weight of another dtype, some classes at a time: where they are, and they in the wide dtype."""
        classes, width = weight.shape
        step = max(BLOCK // (width * self.wide.itemsize), 1)
        for start in range(0, classes, step):
            some = weight[start : start + step]
            yield (
                slice(start, start + some.shape[0]),
                self.buffer("block", (some.shape[0], width)).copy_(some),
            )

    def logits(self, name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``cap(logit_scale * (hidden @ weight.T + bias))``, in the wide dtype. A bias of -inf stays -inf."""
        out, scale, cap = self.buffer(name, (hidden.shape[0], self.classes)), self.set.logit_scale, self.set.softcap
        if cap:
            scale = scale / cap
        bias = None if bias is None else bias.to(self.wide)
        if self.own_products:
            torch.ops.amtml.fused_linear_kd_logits_.default(out, hidden, weight, bias, scale)
        elif _narrow(hidden, weight, self.wide):
            _narrow_product(hidden, weight.t(), out)
            if bias is not None:
                out.add_(bias)
            if scale != 1:
                out.mul_(scale)
        elif weight.dtype == self.wide:
            _product(hidden.to(self.wide), weight.t(), bias, scale, out)
        else:
            hidden = hidden.to(self.wide)
            for some, wide in self.blocks(weight):
                _product(hidden, wide.t(), None if bias is None else bias[some], scale, out[:, some])
        if not cap:
            return out
        out.tanh_().mul_(cap)
        return out if bias is None else out.masked_fill_(bias == -torch.inf, -torch.inf)

    def uncap(self, grad: Tensor, student: Tensor) -> None:
        """Takes the gradient of capped logits to that of the logits before it, times 1 - tanh^2. Overwrites both."""
        y = student.div_(self.set.softcap)
        if self.bias is not None:
            y.masked_fill_(self.bias == -torch.inf, 1)
        torch.ops.aten.tanh_backward.grad_input(grad, y, grad_input=grad)

    def add_grads(self, grad: Tensor, hidden: Tensor, by: Tensor | None, scale: float, first: bool) -> Tensor | None:
        """Adds a chunk's share to the gradients of weight and bias, and returns that of its hidden states, from the gradient of
        its logits before ``logit_scale``, times ``by`` and ``scale``."""
        need_hidden, need_weight, need_bias = self.needs[:3]
        narrow = self.narrow and (by is None or hidden.dtype == torch.bfloat16)
        ones, of_bias = grad.new_ones(1), scale
        if narrow:
            rounded = self.buffer("rounded", tuple(grad.shape), hidden.dtype)
            if hidden.dtype == torch.float16:
                torch.mul(grad, HALF_SCALE, out=rounded)
                scale /= HALF_SCALE
            elif by is None:
                rounded.copy_(grad)
            else:
                torch.mul(grad, by, out=rounded)
                ones = by.reshape(-1)
        elif by is not None:
            grad.mul_(by)
        if need_bias:
            self.out.grad_bias.addmv_(grad.t(), ones.expand(grad.shape[0]), beta=0.0 if first else 1.0, alpha=of_bias)
        if need_weight:
            self.add_weight_grad(rounded if narrow else grad, hidden, scale, 0.0 if first else 1.0)
        if not need_hidden:
            return None
        out = self.buffer("grad_hidden", tuple(hidden.shape))
        if self.own_products:
            torch.ops.amtml.fused_linear_kd_grad_hidden_.default(out, grad, self.weight, scale)
            return out
        if narrow:
            _narrow_product(rounded, self.weight, out)
            return out.mul_(scale) if scale != 1 else out
        if self.weight.dtype == self.wide:
            return torch.addmm(out, grad, self.weight, beta=0, alpha=scale, out=out)
        for i, (some, wide) in enumerate(self.blocks(self.weight)):
            torch.addmm(out, grad[:, some], wide, beta=min(i, 1), alpha=scale, out=out)
        return out

    def add_weight_grad(self, grad: Tensor, hidden: Tensor, scale: float, beta: float) -> None:
        out, narrow = self.out.grad_weight, grad.dtype != self.wide
        if self.own_products and out.dtype == self.wide:
            torch.ops.amtml.fused_linear_kd_grad_weight_.default(out, grad, hidden, scale, beta != 0)
            return
        if not narrow:
            hidden = hidden.to(self.wide)
        if out.dtype == grad.dtype:
            torch.addmm(out, grad.t(), hidden, beta=beta, alpha=scale, out=out)
        elif narrow and out.dtype == self.wide and _adds_to_float32(out.device, grad.dtype):
            torch.addmm(out, grad.t(), hidden, out_dtype=self.wide, beta=beta, alpha=scale, out=out)
        else:
            step = max(BLOCK // (hidden.shape[1] * self.wide.itemsize), 1)
            for start in range(0, self.classes, step):
                some = grad[:, start : start + step]
                made = self.buffer("block", (some.shape[1], hidden.shape[1]))
                if narrow:
                    _narrow_product(some.t(), hidden, made)
                    made.mul_(scale)
                else:
                    torch.addmm(made, some.t(), hidden, beta=0, alpha=scale, out=made)
                if beta == 0:
                    out[start : start + step].copy_(made)
                else:
                    out[start : start + step].add_(made)

    # --- student and teachers

    def student(self, rows: Tensor | slice, labels: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
        """Which of these rows count, None where no others are among them; hidden states, 0 where they do not count; logits."""
        keep = None
        if labels is not None and not self.on_cpu and isinstance(rows, slice):
            keep = labels != self.set.ignore_index
        hidden = kept_rows(self.take(self.hidden, rows), keep)  # what the others hold must not get into a product
        return keep, hidden, self.logits("student", hidden, self.weight, self.bias)

    def teacher(self, t: int, rows: Tensor | slice, keep: Tensor | None) -> Tensor:
        """The logits of teacher t in these rows."""
        kind, tensors = self.kinds[t], self.teachers[t]
        if kind == "logits":
            return self.take(tensors[0], rows, f"teacher{t}")
        name = f"teacher{t}" if self.index is None else "teacher"
        if kind != "topk":
            hidden = kept_rows(self.take(tensors[0], rows), keep)
            return self.logits(name, hidden, tensors[1], tensors[2] if kind == "linear_bias" else None)
        # Where p is the softmax of x / tau, x is tau log p.
        index, log_probs = self.take(tensors[0], rows), self.take(tensors[1], rows).to(self.wide)
        out = self.buffer(name, (index.shape[0], self.classes)).fill_(-torch.inf)
        tau: Any = self.set.temperature
        if self.set.teacher_temperatures:
            tau = self.set.teacher_temperatures[t]
        elif self.temperatures is not None:
            tau = self.take(self.temperatures, rows).unsqueeze(1)
        index, log_probs = _together(kept_rows(index.long(), keep), log_probs)
        return self.scatter(out, index, log_probs * tau)

    def scatter(self, out: Tensor, index: Tensor, values: Tensor) -> Tensor:
        """A top-k teacher's logits at its classes; those that are named twice have the same in both places."""
        return out.scatter_(1, index, values)

    # --- the loss

    def run(self) -> tuple[Tensor, ...]:
        with torch.no_grad(), torch.autocast(self.hidden.device.type, enabled=False):
            return self.run_chunks()

    def run_chunks(self) -> tuple[Tensor, ...]:
        out = self.out = self.outputs()
        segments = self.segments()
        losses = self.hidden.new_zeros(self.rows, dtype=self.wide)
        if sum(count for _, count, _ in segments) < self.rows:
            for x in (out.grad_hidden, out.grad_weights, out.grad_alpha, out.stats):
                x.zero_()
        elif self.index is not None:
            for x in (out.grad_weights, out.stats):  # a row's other teachers
                x.zero_()
        divisor = self.divisor(segments)
        first = True
        for rows, only in self.chunks(segments, any(self.needs[:3])):
            self.chunk(rows, only, divisor, first, losses)
            first = False
        if first:  # no row counts
            for x in (out.grad_weight, out.grad_bias):
                x.zero_()
        if divisor is not None and self.late(divisor):
            for x in (out.grad_hidden, out.grad_weight, out.grad_bias):
                x.div_(divisor)
        if self.set.reduction == "none":
            loss = losses
        else:
            loss = losses.sum() if divisor is None else losses.sum() / divisor
        return loss, *out[1:]

    def divisor(self, segments: Segments) -> float | Tensor | None:
        """Of the sum over rows: the rows that count, a number wherever it is known without a sync."""
        if self.set.reduction not in ("mean", "batchmean"):
            return None
        if self.labels is None or self.index is not None or self.on_cpu:
            return max(sum(count for _, count, _ in segments), 1)  # rows that do not count are left out
        return (self.labels != self.set.ignore_index).sum().clamp(min=1).to(self.wide)

    def late(self, divisor: float | Tensor | None) -> bool:
        """Whether sums are divided at the end: earlier, float16 would round small gradients to 0."""
        half = self.narrow and self.hidden.dtype == torch.float16
        return half and isinstance(divisor, Tensor) and self.set.reduction == "batchmean"

    def chunk(
        self, rows: Tensor | slice, only: list[int], divisor: float | Tensor | None, first: bool, losses: Tensor
    ) -> None:
        """Puts what these rows give into ``losses`` and ``out``."""
        set, take, out = self.set, self.take, self.out
        need_student, (need_weights, need_alpha) = any(self.needs[:3]), self.needs[3:]
        labels = None if self.labels is None else take(self.labels, rows)
        keep, hidden, student = self.student(rows, labels)
        weights = None if self.weights is None else take(self.weights, rows)
        # "mean" divides D by the classes, and by the rows of this chunk, which is taken back.
        mean = set.reduction == "mean"
        loss, grad, made_weights, made_alpha, made_stats = self.row_kernel(
            student, only, rows, weights, labels, keep, "mean" if mean else "none"
        )
        by: Any = 1.0 if divisor is None else 1.0 / divisor
        if mean:
            counted: Any = student.shape[0] if keep is None else keep.sum().clamp(min=1)
            by = by * counted
            loss = (loss * (counted / student.shape[0])).expand(student.shape[0])
        if self.grad_loss is not None:
            by = take(self.grad_loss, rows).to(self.wide).unsqueeze(1)
        put_rows(losses, rows, loss)
        if self.need_stats:
            if self.index is None:
                put_rows(out.stats, rows, made_stats)
            else:
                put_rows(out.stats[:, :4], rows, made_stats[:, :4])
                put_rows(out.stats[:, 4 + only[0]], rows, made_stats[:, 4])
        if need_weights:
            put_rows(out.grad_weights, rows, made_weights * by)
        if need_alpha:
            put_rows(out.grad_alpha, rows, made_alpha * (by.squeeze(1) if self.grad_loss is not None else by))
        if not need_student:
            return
        if set.softcap:
            self.uncap(grad, student)
        if self.late(divisor):
            by = 1.0
        on_device = isinstance(by, Tensor)
        scale = set.logit_scale * (1.0 if on_device else by)
        made = self.add_grads(grad, hidden, by if on_device else None, scale, first)
        if made is not None:
            put_rows(out.grad_hidden, rows, made)

    def row_kernel(
        self,
        student: Tensor,
        only: list[int],
        rows: Tensor | slice,
        weights: Tensor | None,
        labels: Tensor | None,
        keep: Tensor | None,
        reduction: str,
    ) -> tuple[Tensor, ...]:
        """Losses of the rows (or their mean), and the gradients to logits, weights and alpha and the statistics, or empty ones."""
        set, ops, none = self.set, kernels(self.set.backend), student.new_empty(0)
        need_student, (need_weights, need_alpha) = any(self.needs[:3]), self.needs[3:]
        shared = reduction, set.ignore_index, set.label_smoothing
        kl_scale = set.temperature**2 if set.t2_scale else 1.0
        eq8 = set.temperature, set.ce_weight, set.kl_weight, kl_scale
        if set.row_kernel == "topk_kd":
            tensors = [[self.take(x, rows) for x in self.teachers[t]] for t in only]
            index, log_probs = (torch.cat(x, 1) for x in zip(*tensors))
            sizes = [x[0].shape[1] for x in tensors]
            loss, _, grad, of_weights = ops.topk_kd_fwd.default(
                student, index.long(), log_probs.to(self.wide), sizes, weights, labels, *eq8, "renormalize", *shared,
                need_student, need_weights,
            )  # fmt: skip
            return loss, grad, of_weights, none, none
        given = [self.teacher(t, rows, keep) for t in only]
        if set.row_kernel == "multi_teacher_kd":
            out = ops.multi_teacher_kd_fwd.default(
                student, given, weights, labels, *eq8, set.mode, *shared, need_student, need_weights, False
            )
            return out[0], out[6], out[7], none, none
        taus = [set.teacher_temperatures[t] for t in only] if set.teacher_temperatures else []
        alphas, temperatures = (None if x is None else self.take(x, rows) for x in (self.alphas, self.temperatures))
        return ops.divergence_fwd.default(
            student, given, weights, labels, alphas, temperatures, set.divergence, set.beta, set.mode, taus, set.temperature,
            set.t2_scale, set.ce_weight, set.kl_weight, *shared, need_student, need_weights, need_alpha, self.need_stats,
        )  # fmt: skip


def _reads_free(hidden: Tensor) -> bool:
    """Whether looking at values costs no sync."""
    return hidden.device.type == "cpu"


def _narrow(hidden: Tensor, weight: Tensor, wide: torch.dtype) -> bool:
    """Whether torch multiplies these 16-bit numbers into float32 as they are."""
    return hidden.device.type == "cuda" and hidden.dtype == weight.dtype != wide == torch.float32


def _narrow_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``a @ b`` of 16-bit numbers, summed and given in float32."""
    torch.mm(a, b, out_dtype=torch.float32, out=out)


@functools.cache
def _adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds such a product to a float32 matrix; some versions want a matrix of the factors' dtype."""
    one = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.ones(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, one, one, out_dtype=torch.float32, out=total)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, out: Tensor) -> None:
    """``scale * (hidden @ weight + bias)`` of one dtype."""
    if bias is None:
        torch.addmm(out, hidden, weight, beta=0, alpha=scale, out=out)
    else:
        torch.addmm(bias, hidden, weight, beta=scale, alpha=scale, out=out)


def kept_rows(x: Tensor, keep: Tensor | None) -> Tensor:
    """0 in rows that do not count."""
    return x if keep is None else x.masked_fill(~keep.unsqueeze(1), 0)


def put_rows(out: Tensor, rows: Tensor | slice, values: Tensor) -> None:
    if isinstance(rows, slice):
        out[rows] = values
    else:
        out.index_copy_(0, rows, values.to(out.dtype))


def _together(index: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, k] classes and log-probabilities, sorted by class; a class that is named twice has the sum of both in all places."""
    index, order = index.sort(1)
    log_probs = log_probs.gather(1, order)
    run = torch.zeros_like(index)
    run[:, 1:] = (index[:, 1:] != index[:, :-1]).cumsum(1)  # which of the classes that are named
    most = torch.full_like(log_probs, -torch.inf).scatter_reduce_(1, run, log_probs, "amax")
    share = (log_probs - most.gather(1, run)).masked_fill_(log_probs == -torch.inf, -torch.inf).exp_()
    total = torch.zeros_like(share).scatter_add_(1, run, share).log_().add_(most)
    return index, total.gather(1, run)
