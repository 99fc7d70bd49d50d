"""Every operator that is not made of others, once: how to make its inputs, what it must equal, the bytes it cannot avoid moving.

Tests and benchmarks both take their cases from here, so that nothing is timed which is not also checked.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from amtml_fast import functional, reference


@dataclass(frozen=True)
class Case:
    """One operator.

    Attributes:
        op: its stem. function, reference: the public function and its float64 oracle.
        make: ``make(generator, *size) -> args``, float32 on the CPU; tensors that require grad are differentiated.
        small: one size with nothing special about it, for promises that hold at any.
        sizes: what the tests run, each with the reason it is there (see the comments).
        variants: keyword arguments to run each size with.
        parallel: a size that several threads of a CPU share, or several blocks of a GPU.
        large: sizes as people use them, small enough for the CPU to hold, at which GPU kernels are compiled.
        bytes: ``bytes(itemsize, *size)`` read and written once by forward and backward together.
        flops: ``flops(*size)`` operations of forward and backward: what the formulas need at least. Additions,
            multiplications, comparisons, exponentials and logarithms count one each.
    """

    op: str
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    make: Callable[..., tuple]
    small: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...]
    variants: tuple[dict[str, Any], ...]
    parallel: tuple[int, ...]
    large: tuple[tuple[int, ...], ...]
    bytes: Callable[..., int] = field(repr=False)
    flops: Callable[..., float] = field(repr=False)

    def inputs(self, *size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple:
        """Arguments of this size, on the default device; the numbers are the same on all."""
        args = self.make(torch.Generator().manual_seed(seed), *size)
        return convert(args, dtype=dtype, device=torch.get_default_device())


def tensors(args: Any) -> Iterator[Tensor]:
    """All tensors of nested arguments, in order."""
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from tensors(a)


def convert(args: Any, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Any:
    """The same arguments as fresh leaves; only floating tensors change dtype."""

    def one(a: Any) -> Any:
        if isinstance(a, Tensor):
            new = a.detach().to(device=device, dtype=dtype if a.is_floating_point() else None, copy=True)
            return new.requires_grad_(a.requires_grad)
        return type(a)(one(x) for x in a) if isinstance(a, (list, tuple)) else a

    return tuple(one(a) for a in args)


def value_and_grads(
    function: Callable[..., Tensor], args: tuple, upstream: Tensor | None = None, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """The result and its gradient to every input that requires one (zeros where none flows).

    ``upstream`` weighs the elements of the result; None draws fixed weights from a generator.
    """
    out = function(*args, **options)
    if upstream is None:
        upstream = (
            torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32, device="cpu")
            .half()
            .bfloat16()
        )  # exact in any dtype
    leaves = [t for t in tensors(args) if t.requires_grad]
    grads = torch.autograd.grad(out, leaves, upstream.to(out), allow_unused=True)
    return out.detach(), [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads)]


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of ``want``; over 1 where ``want`` itself is only rounding (below 1e-6)."""
    got, want = (t.detach().to("cpu", torch.float64) for t in (got, want))
    scale = want.norm().item()
    return ((got - want).norm() / (scale if scale > 1e-6 else 1)).item()


def _randn(g: torch.Generator, *size: int) -> Tensor:
    return torch.randn(size, generator=g, dtype=torch.float32, device="cpu")


def _teacher_weights(g: torch.Generator, n: int, d: int, h: int, w: int, t: int) -> tuple:
    features = _randn(g, n, d, h, w) if h else _randn(g, n, d)
    return tuple(x.requires_grad_() for x in (features, _randn(g, t, d), _randn(g, d)))


def _multi_teacher_kd(g: torch.Generator, n: int, c: int, t: int) -> tuple:
    labels = torch.randint(0, c, (n,), generator=g, dtype=torch.int64, device="cpu")
    labels[1::5] = -100  # some rows ignored
    weights = _randn(g, n, t).softmax(-1)
    return (
        (2 * _randn(g, n, c)).requires_grad_(),
        [2 * _randn(g, n, c) for _ in range(t)],
        weights.requires_grad_(),
        labels,
    )


def _topk_kd(g: torch.Generator, n: int, c: int, k: int, t: int) -> tuple:
    student, teachers, weights, labels = _multi_teacher_kd(g, n, c, t)
    top = [(z / 4).log_softmax(-1).topk(max(k - i, 1)) for i, z in enumerate(teachers)]  # k differs between teachers
    return student, [x.indices for x in top], [x.values for x in top], weights, labels


def _topk_bucket(g: torch.Generator, n: int, c: int, k: int, t: int) -> tuple:
    """A student not too far from its teachers: some of what they name is among its own k largest."""
    student, teachers, weights, labels = _multi_teacher_kd(g, n, c, t)
    top = [((3 * z + student.detach()) / 4).log_softmax(-1).topk(max(k - i, 1)) for i, z in enumerate(teachers)]
    return student, [x.indices for x in top], [x.values for x in top], weights, labels


def _angle(g: torch.Generator, n: int, c: int) -> tuple:
    return tuple((2 * _randn(g, n, c)).softmax(-1).requires_grad_() for _ in range(2))


def _hint(g: torch.Generator, n: int, c_s: int, h_s: int, c_t: int, h_t: int) -> tuple:
    maps = _randn(g, n, c_s, h_s, h_s), _randn(g, n, c_t, h_t, h_t + 1), _randn(g, c_t, c_s)
    return tuple(x.requires_grad_() for x in maps)


def _dual_softmax(g: torch.Generator, *size: int) -> tuple:
    return ((3 * _randn(g, *size)).requires_grad_(),)


CASES = {
    case.op: case
    for case in (
        Case(
            "teacher_weights",
            functional.teacher_weights,
            reference.teacher_weights,
            _teacher_weights,
            (3, 4, 2, 3, 2),
            # n, d, h, w, T: empty; one of all; pooled already; odd; one pixel column; several threads' worth
            ((0, 4, 2, 2, 3), (1, 1, 1, 1, 1), (5, 7, 0, 0, 3), (3, 5, 3, 5, 2), (2, 8, 5, 1, 4), (33, 64, 8, 8, 3)),
            ({"pool": "max"}, {"pool": "avg"}),
            parallel=(64, 32, 8, 8, 3),
            large=((128, 64, 8, 8, 3), (16, 64, 0, 0, 3)),
            bytes=lambda s, n, d, h, w, t: 2 * s * n * d * max(h * w, 1),
            flops=lambda n, d, h, w, t: n * d * (max(h * w, 1) + 8 * t),
        ),
        Case(
            "multi_teacher_kd",
            functional.multi_teacher_kd_loss,
            reference.multi_teacher_kd_loss,
            _multi_teacher_kd,
            (6, 5, 3),
            # n, C, T: empty; one of all; one class; less and more than a vector; whole groups of 16 rows and some more; past
            # several summation blocks; whole packs of 16 bytes; threads
            (
                (0, 10, 3),
                (1, 1, 1),
                (3, 1, 2),
                (2, 7, 3),
                (7, 10, 1),
                (35, 21, 2),
                (33, 100, 3),
                (5, 1030, 2),
                (9, 1040, 3),
                (256, 257, 5),
            ),
            (
                {},
                {"mode": "sum", "reduction": "none", "temperature": 1.0},
                {"reduction": "mean", "label_smoothing": 0.1, "temperature": 0.5},
                {"mode": "sum", "reduction": "sum", "alpha": 1.0, "t2_scale": False},
                {"reduction": "none", "alpha": 0.0, "label_smoothing": 1.0},
            ),
            parallel=(2000, 100, 3),
            large=((128, 100, 3), (50_000, 10, 2), (64, 1000, 3), (4, 32000, 3), (4, 128256, 1)),
            bytes=lambda s, n, c, t: s * n * c * (t + 2),
            flops=lambda n, c, t: n * c * (7 * t + 20),
        ),
        Case(
            "divergence",
            functools.partial(functional.multi_teacher_kd_loss, divergence="jsd"),
            functools.partial(reference.multi_teacher_kd_loss, divergence="jsd"),
            _multi_teacher_kd,
            (6, 5, 3),
            # n, C, T: empty; one of all; less and more than a vector; past several summation blocks; threads
            ((0, 10, 3), (1, 1, 1), (2, 7, 3), (33, 100, 3), (5, 1030, 2), (256, 257, 5)),
            (
                {},
                {"divergence": "reverse_kl", "mode": "sum", "reduction": "none", "teacher_temperature": 2.0},
                {"divergence": "skew_kl", "mode": "logits", "reduction": "mean", "label_smoothing": 0.1},
                {"divergence": "skew_reverse_kl", "reduction": "sum", "t2_scale": False, "beta": 0.3},
                {"divergence": "tvd", "mode": "sum", "reduction": "none", "temperature": 1.0},
                {"divergence": "forward_kl", "mode": "logits", "alpha": 1.0, "temperature": 0.5},
                {"divergence": "reverse_kl", "reduction": "none", "alpha": 0.0, "label_smoothing": 1.0},
                {"divergence": "jsd", "mode": "logits", "beta": 0.9, "teacher_temperature": 1.5},
                {"divergence": "skew_kl", "reduction": "none", "temperature": 0.7},
                {"divergence": "reverse_kl", "mode": "logits"},
                {"divergence": "skew_reverse_kl", "mode": "sum"},
                {"divergence": "forward_kl", "teacher_temperature": 3.0, "reduction": "sum"},
                {"divergence": "reverse_kl", "temperature": 1.0},
                {"divergence": "tvd", "mode": "logits", "reduction": "none"},
            ),
            parallel=(2000, 100, 3),
            large=((128, 100, 3), (4, 32000, 3), (4, 128256, 1)),
            bytes=lambda s, n, c, t: s * n * c * (t + 2),
            flops=lambda n, c, t: n * c * (7 * t + 30),
        ),
        Case(
            "topk_kd",
            functional.topk_kd_loss,
            reference.topk_kd_loss,
            _topk_kd,
            (6, 5, 3, 2),
            # n, C, k, T: empty; one of all; all classes, and all but one; a single entry; past a vector and a chunk; threads
            (
                (0, 10, 2, 3),
                (1, 1, 1, 1),
                (3, 5, 5, 1),
                (2, 7, 6, 2),
                (7, 10, 1, 2),
                (33, 100, 9, 3),
                (5, 1030, 40, 2),
                (96, 257, 7, 3),
            ),
            (
                {},
                {"tail": "uniform", "reduction": "none"},
                {"tail": "ignore", "reduction": "mean", "label_smoothing": 0.1, "t2_scale": False},
                {"tail": "uniform", "reduction": "sum", "alpha": 1.0, "temperature": 0.5},
                {"reduction": "none", "alpha": 0.0, "label_smoothing": 1.0},
            ),
            parallel=(300, 100, 9, 3),
            large=((128, 100, 8, 3), (4, 32000, 64, 3), (4, 128256, 32, 1)),
            bytes=lambda s, n, c, k, t: 2 * s * n * c + (8 + s) * n * sum(max(k - i, 1) for i in range(t)),
            flops=lambda n, c, k, t: n * (c * 14 + t * k * 30),
        ),
        Case(
            "topk_bucket",
            functools.partial(functional.topk_kd_loss, tail="bucket"),
            functools.partial(reference.topk_kd_loss, tail="bucket"),
            _topk_bucket,
            (6, 5, 3, 2),
            # n, C, k, T: empty; one of all; all classes; all but one; past a vector, a chunk and a word of the GPUs' bits; odd
            ((0, 10, 2, 3), (1, 1, 1, 1), (3, 5, 5, 1), (2, 7, 6, 2), (5, 1030, 40, 2), (24, 257, 7, 3)),
            (
                {},
                {"divergence": "jsd", "reduction": "mean", "label_smoothing": 0.1, "temperature": 1.0},
                {"divergence": "reverse_kl", "support": "student", "reduction": "none"},
                {"divergence": "skew_kl", "reduction": "sum", "alpha": 1.0, "temperature": 0.5, "t2_scale": False},
                {"divergence": "tvd", "reduction": "none", "alpha": 0.0, "label_smoothing": 1.0},
            ),
            parallel=(300, 100, 9, 3),
            large=((128, 100, 8, 3), (4, 32000, 64, 3), (4, 128256, 32, 1)),
            bytes=lambda s, n, c, k, t: 2 * s * n * c + (8 + s) * n * sum(max(k - i, 1) for i in range(t)),
            flops=lambda n, c, k, t: n * (c * 14 + t * k * 60),
        ),
        Case(
            "angle",
            functional.angle_loss,
            reference.angle_loss,
            _angle,
            (6, 4),
            # n, C: empty; no triplet; one width; less and more than a vector; several threads; wide
            ((0, 3), (1, 3), (2, 3), (3, 1), (7, 5), (40, 10), (67, 10), (19, 300)),
            (
                {},
                {"reduction": "none", "delta": 0.1},
                {"reduction": "sum", "delta": 0.1},
                {"reduction": "distinct", "eps": 0.0},
            ),
            parallel=(300, 10),
            large=((128, 100),),
            bytes=lambda s, n, c: 4 * s * n * c,
            flops=lambda n, c: 10.0 * n**3 + 12.0 * n * n * c,  # 20 a vertex and unordered pair; distances and back
        ),
        Case(
            "distance",
            functional.rkd_distance_loss,
            reference.rkd_distance_loss,
            _angle,
            (6, 4),
            # n, C: empty; no pair; one pair; one width; less and more than a vector; several threads; wide
            ((0, 3), (1, 3), (2, 3), (3, 1), (7, 5), (67, 10), (150, 20), (19, 300)),
            ({}, {"reduction": "sum", "delta": 0.1}, {"reduction": "distinct", "eps": 0.0}),
            parallel=(300, 10),
            large=((128, 100),),
            bytes=lambda s, n, c: 4 * s * n * c,
            flops=lambda n, c: 15.0 * n * n + 12.0 * n * n * c,
        ),
        Case(
            "hint",
            functional.hint_loss,
            reference.hint_loss,
            _hint,
            (2, 3, 4, 5, 2),
            # n, c_s, h_s, c_t, h_t: empty; one of all; student larger; teacher larger and not a multiple; same size; pixels
            # of several examples in a block, channels that fill no vector; examples of one pixel; an example of several
            # blocks, channels past a vector; several threads
            (
                (0, 2, 2, 3, 2),
                (1, 1, 1, 1, 1),
                (3, 4, 8, 5, 4),
                (2, 3, 4, 6, 7),
                (5, 8, 6, 7, 6),
                (7, 17, 5, 9, 5),
                (70, 2, 1, 3, 1),
                (3, 33, 9, 6, 9),
                (18, 8, 8, 16, 8),
            ),
            ({}, {"normalize": True}),
            parallel=(9, 8, 32, 8, 32),
            large=((16, 16, 16, 64, 8),),
            bytes=lambda s, n, c_s, h_s, c_t, h_t: s * n * (2 * c_s * h_s**2 + 2 * c_t * h_t * (h_t + 1)),
            flops=lambda n, c_s, h_s, c_t, h_t: n * (6.0 * c_s * c_t * h_t * (h_t + 1) + 4 * c_s * h_s**2),
        ),
        Case(
            "dual_softmax",
            functional.dual_softmax,
            reference.dual_softmax,
            _dual_softmax,
            (4, 6),
            # empty; one of all; a row; a column; past one block of columns; batched
            ((0, 3), (1, 1), (1, 9), (9, 1), (37, 300), (3, 2, 17, 5)),
            ({}, {"mode": "product"}, {"dim1": -1, "dim2": -2}, {"dim1": 0, "dim2": -1, "mode": "product"}),
            parallel=(300, 300),
            large=((512, 512), (2, 4096)),
            bytes=lambda s, *size: 4 * s * int(torch.Size(size).numel()),
            flops=lambda *size: 16.0 * math.prod(size),
        ),
    )
}
