"""The student's rows of a distillation that compares the classes which teachers name, and one class for all others.

    m = max z_c, s = log sum exp((z_c - m) / tau) over the classes c that nobody names, and the logits of the others
    dL/dz_c = a exp(z_c / tau - m / tau - s) / tau + b exp(z_c - m - s_1) + d outside, given + d at a class that is named,
    where a, b and d are what comes back to the log-sums and, over C, to the mean of the row

Shapes   student z [N, C] in float32|bfloat16|float16, read in place where C is dense; indices [N, K] int64, those of NOBODY
         left out; labels [N] int64 -> found [N, 8] and logits [N, K] float64, the gradient in the student's dtype
Grid     one program a row. Triton has no shared memory to scatter to, so that a first kernel writes a bit for each class that is
         named, N C / 8 bytes; the sweep reads them beside the row
Traffic  N C elements in, each way, and one out in backward; N C / 8 bytes of bits written twice and read

A label or class out of range is an error only with TRITON_DEBUG=1; without, it makes the loss of its row NaN, and nothing
outside of the row is read or written. Weights are not looked at.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import OPTIONS, aligned, alignment, check_count, rate_of
from ._kd_rows import LONG_WARPS, LOWEST, dense, find_rows, load, sum_of, top_of, vectors
from ._launch import Launch, kept

HELD = 4096  # classes that a program takes at a time, where there are no more
ENTRIES = 256  # of a row that a program takes at a time
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_indices(indices, rows, entries, start, ENTRIES: tl.constexpr):
    """Columns, which of them there are, and classes."""
    entry = start + tl.arange(0, ENTRIES)[None, :]
    there = entry < entries
    return entry, there, tl.load(indices + rows * entries + entry, mask=there, other=-1)


@triton.jit
def _bucket_mark_kernel(indices, bits, c, entries, words, ENTRIES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, entries, ENTRIES):
        _, there, index = _load_indices(indices, row, entries, start, ENTRIES)
        bit = (1 << (index & 31)).to(tl.int32)
        tl.atomic_or(bits + row * words + (index >> 5), bit, mask=there & (index >= 0) & (index < c))


@triton.jit(do_not_specialize=["n"])
def _bucket_forward_kernel(
    student, indices, bits, labels, found, named, n, c, entries, words, stride, label_stride, ignore_index, unit, per_tau,
    SECOND: tl.constexpr, TOTAL: tl.constexpr, STATISTICS: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
    STEPS: tl.constexpr, VECTOR: tl.constexpr, ENTRIES: tl.constexpr, NOBODY: tl.constexpr,
):  # fmt: skip
    LANES: tl.constexpr = BLOCK // VECTOR
    rows, _, used, label = find_rows(n, labels, label_stride, ignore_index, c, 1)
    z_rows = student + rows * aligned(stride, ALIGN)
    for start in range(0, entries, ENTRIES):
        entry, there, index = _load_indices(indices, rows, entries, start, ENTRIES)
        known = there & used & (index >= 0) & (index < c)
        tl.device_assert(known | ~(there & used) | (index == NOBODY), "a class is out of range")
        z = tl.load(z_rows + index, mask=known, other=float("nan")).to(tl.float64)
        z = tl.where(index == NOBODY, -float("inf"), z)
        tl.store(named + rows * entries + entry, tl.where(used, z, 0.0), mask=there)

    m = tl.full([1, LANES, 1], LOWEST, tl.float32)  # finite: -inf - m is no NaN
    s = tl.zeros([1, LANES, 1], tl.float32)
    s1 = tl.zeros([1, LANES, 1], tl.float32)
    total = tl.zeros([1, BLOCK], tl.float64)
    for step in range(STEPS):
        cols = step * BLOCK + tl.arange(0, BLOCK)[None, :]
        keep = used & (cols < c)
        x = load(student, rows, stride, cols, keep, ALIGN, -float("inf"))
        word = tl.load(bits + rows * words + (cols >> 5), mask=keep, other=0)
        if TOTAL:
            total += tl.where(keep, x, 0.0).to(tl.float64)
        tile = vectors(tl.where(((word >> (cols & 31)) & 1) != 0, -float("inf"), x), ALIGN, VECTOR)
        most = tl.maximum(m, top_of(tile))  # a NaN is none and makes the sum NaN
        s = s * tl.exp2((m - most) * unit) + sum_of(tl.exp2((tile - most) * unit))
        if SECOND:
            s1 = s1 * tl.exp2((m - most) * LOG2_E) + sum_of(tl.exp2((tile - most) * LOG2_E))
        m = most
    m = tl.reshape(m, [1, LANES])
    top = tl.max(m, axis=1, keep_dims=True)
    log_s = tl.log(tl.sum(tl.reshape(s, [1, LANES]) * tl.exp2((m - top) * unit), axis=1, keep_dims=True).to(tl.float64))
    log_s1 = tl.zeros([1, 1], tl.float64)
    if SECOND:
        sum1 = tl.sum(tl.reshape(s1, [1, LANES]) * tl.exp2((m - top) * LOG2_E), axis=1, keep_dims=True)
        log_s1 = tl.log(sum1.to(tl.float64))
    # No class is left: not where top is LOWEST, which a finite mask may be.
    top = tl.where(log_s == -float("inf"), 0.0, top)
    of_label = tl.zeros([1, 1], tl.float64)
    if labels is not None:
        at = tl.load(z_rows + label, mask=used & (label >= 0) & (label < c), other=float("nan"))
        of_label = at.to(tl.float64)

    entropy = tl.zeros([1, BLOCK], tl.float64)
    below = tl.zeros([1, BLOCK], tl.float64)
    largest = tl.zeros([1, 1], tl.int64)
    if STATISTICS:
        most = tl.full(
            [1, BLOCK], -float("inf"), tl.float32
        )  # of a column's classes, and the first of them; NaN is the largest
        first = tl.full([1, BLOCK], 1 << 62, tl.int64)
        for step in range(STEPS):
            cols = step * BLOCK + tl.arange(0, BLOCK)[None, :]
            keep = used & (cols < c)
            x = load(student, rows, stride, cols, keep, ALIGN, 0.0)
            more = keep & ((x > most) | ((x != x) & (most == most)) | (first == 1 << 62))
            most = tl.where(more, x, most)
            first = tl.where(more, cols.to(tl.int64), first)
            word = tl.load(bits + rows * words + (cols >> 5), mask=keep, other=0)
            keep = keep & (((word >> (cols & 31)) & 1) == 0)
            below += tl.where(keep, x, 0.0).to(tl.float64)
            log_r = (x - top) * per_tau - log_s.to(tl.float32)
            r = tl.exp(log_r)
            entropy += tl.where(keep & (r != 0), r * log_r, 0.0).to(tl.float64)  # log_r is -inf for a finite mask, too
        broken = tl.max((most != most).to(tl.int32), axis=1, keep_dims=True) != 0
        of_all = tl.max(tl.where(most == most, most, -float("inf")), axis=1, keep_dims=True)
        is_largest = tl.where(broken, most != most, most == of_all)
        largest = tl.min(tl.where(is_largest, first, 1 << 62), axis=1, keep_dims=True)
    at = found + rows * 8
    tl.store(at, tl.where(used, top, 0.0).to(tl.float64))
    tl.store(at + 1, tl.where(used, log_s, 0.0))
    tl.store(at + 2, tl.where(used, log_s1, 0.0))
    tl.store(at + 3, tl.where(used, of_label, 0.0))
    tl.store(at + 4, tl.sum(total, axis=1, keep_dims=True))
    tl.store(at + 5, tl.sum(entropy, axis=1, keep_dims=True))
    tl.store(at + 6, tl.sum(below, axis=1, keep_dims=True))
    tl.store(at + 7, tl.where(used, largest, 0).to(tl.float64))


@triton.jit
def _factor(g, log_s):
    """Without a class there is nothing to multiply, whatever comes back."""
    none = (g == 0) | (log_s == -float("inf"))
    return tl.where(none, 0.0, g * tl.exp(tl.where(none, 0.0, -log_s))).to(tl.float32)


@triton.jit
def _outside(z, m, a, b, d, unit, SECOND: tl.constexpr):
    half = tl.exp2((z - m) * (0.5 * unit))  # squared, it goes down to the smallest float32
    g = a * (half * half) + d
    if SECOND:
        g += b * tl.exp2((z - m) * LOG2_E)
    return tl.where(z == -float("inf"), 0.0, g)


@triton.jit(do_not_specialize=["n"])
def _bucket_backward_kernel(
    of_sums, of_named, student, indices, labels, found, grad, n, c, entries, stride, label_stride, ignore_index, unit,
    per_tau,
    SECOND: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    c = aligned(c, ALIGN)
    rows, _, used, label = find_rows(n, labels, label_stride, ignore_index, c, 1)
    m = tl.load(found + rows * 8, mask=used, other=0.0).to(tl.float32)
    a = _factor(tl.load(of_sums + rows * 4, mask=used, other=0.0) * per_tau, tl.load(found + rows * 8 + 1))
    b = tl.zeros([1, 1], tl.float32)
    if SECOND:
        b = _factor(tl.load(of_sums + rows * 4 + 1, mask=used, other=0.0), tl.load(found + rows * 8 + 2))
    d = (tl.load(of_sums + rows * 4 + 3, mask=used, other=0.0) / c).to(tl.float32)
    for step in range(STEPS):
        cols = step * BLOCK + tl.arange(0, BLOCK)[None, :]
        z = load(student, rows, stride, cols, used & (cols < c), ALIGN, 0.0)
        g = tl.where(used, _outside(z, m, a, b, d, unit, SECOND), 0.0)
        tl.store(grad + rows * c + cols, g.to(grad.dtype.element_ty), mask=cols < c)
    z_rows = student + rows * aligned(stride, ALIGN)
    at_label = tl.zeros([1, 1], tl.float64)
    tl.debug_barrier()  # behind what other threads have written there
    if labels is not None:
        at_label += tl.load(of_sums + rows * 4 + 2, mask=used, other=0.0)
        has_label = used & (label >= 0) & (label < c) & (at_label != 0)
        of_label = tl.load(z_rows + label, mask=has_label, other=0.0).to(tl.float32)
        with_label = _outside(of_label, m, a, b, d, unit, SECOND) + at_label.to(tl.float32)
        with_label = tl.where(of_label == -float("inf"), 0.0, with_label).to(grad.dtype.element_ty)
        tl.store(grad + rows * c + label, with_label, mask=has_label)
        tl.debug_barrier()
    for start in range(0, entries, ENTRIES):
        entry, there, index = _load_indices(indices, rows, entries, start, ENTRIES)
        known = there & used & (index >= 0) & (index < c)
        given = tl.load(of_named + rows * entries + entry, mask=known, other=0.0)
        if labels is not None:
            given += tl.where(index == label, at_label, 0.0)
        logit = tl.load(z_rows + index, mask=known, other=0.0).to(tl.float32)
        of_named_class = tl.where(logit == -float("inf"), 0.0, given.to(tl.float32) + d)
        tl.store(grad + rows * c + index, of_named_class.to(grad.dtype.element_ty), mask=known)


@triton.jit
def _bucket_last_kernel(student, bounds, equal, last, c, stride, teachers, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Of a row and one of its bounds."""
    row = tl.program_id(0).to(tl.int64)
    place = row * teachers + tl.program_id(1)
    bound = tl.load(bounds + place).to(tl.float32)
    left = tl.load(equal + place)
    out = tl.full([], -1, tl.int64)
    for step in range(STEPS):
        cols = step * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(student + row * stride + cols, mask=cols < c, other=0.0).to(tl.float32)
        here = ((z == bound) & (cols < c)).to(tl.int32)
        at = (here != 0) & (tl.cumsum(here, axis=0) == left)
        out = tl.maximum(out, tl.max(tl.where(at, cols, -1), axis=0).to(tl.int64))
        left -= tl.sum(here, axis=0)
    tl.store(last + place, tl.where(out < 0, c - 1, out))


# --- launchers


def _block(c: int, itemsize: int) -> dict:
    """How many classes a program takes at a time, and its warps."""
    check_count("student_logits", c, "classes")
    block, vector, warps = triton.next_power_of_2(c), 1, LONG_WARPS
    if block > HELD:
        vector = 16 // itemsize
        block = LONG_WARPS * 32 * vector
    else:
        warps = min(LONG_WARPS, max(1, block // 512))
    return dict(BLOCK=block, STEPS=triton.cdiv(c, block), VECTOR=vector, num_warps=warps)


def _numbers(
    n: int, c: int, entries: int, stride: int, label_stride: int, ignore_index: int, temperature: float
) -> dict:
    return dict(
        n=n,
        c=c,
        entries=entries,
        stride=stride,
        label_stride=label_stride,
        ignore_index=ignore_index,
        unit=2 * rate_of(temperature),
        per_tau=1 / temperature,
        ALIGN=alignment(c, stride),
        ENTRIES=min(ENTRIES, triton.next_power_of_2(entries)),
    )


@kept
def _mark(n: int, c: int, entries: int, words: int) -> Launch:
    block = min(ENTRIES, triton.next_power_of_2(entries))
    return Launch(_bucket_mark_kernel, (n,), c=c, entries=entries, words=words, ENTRIES=block, num_warps=1, **OPTIONS)


@kept
def _forward(itemsize: int, words: int, second: bool, total: bool, statistics: bool, *numbers: int) -> Launch:
    at = _numbers(*numbers)
    wanted = dict(SECOND=second, TOTAL=total, STATISTICS=statistics, NOBODY=-(2**62))
    return Launch(
        _bucket_forward_kernel, (at["n"],), words=words, **at, **wanted, **_block(at["c"], itemsize), **OPTIONS
    )


@kept
def _backward(itemsize: int, second: bool, *numbers: int) -> Launch:
    at, block = _numbers(*numbers), _block(numbers[1], itemsize)
    del block["VECTOR"]
    return Launch(_bucket_backward_kernel, (at["n"],), SECOND=second, **at, **block, **OPTIONS)


@kept
def _last(n: int, c: int, stride: int, teachers: int) -> Launch:
    check_count("student_logits", c, "classes")
    block = min(1024, triton.next_power_of_2(c))
    numbers = dict(c=c, stride=stride, teachers=teachers, BLOCK=block, STEPS=triton.cdiv(c, block), num_warps=4)
    return Launch(_bucket_last_kernel, (n, teachers), **numbers, **OPTIONS)


def topk_bucket_fwd(
    student: Tensor,
    indices: Tensor,
    weights: Tensor | None,
    labels: Tensor | None,
    temperature: float,
    ignore_index: int,
    need_second: bool,
    need_total: bool,
    in_float64: bool,
    need_statistics: bool,
) -> tuple[Tensor, Tensor]:
    """Numbers of every row, and the logits that are named."""
    student, indices = dense(student), indices.contiguous()
    (n, c), entries = student.shape, indices.shape[1]
    found = student.new_empty(n, 8, dtype=torch.float64)
    named = student.new_empty(n, entries, dtype=torch.float64)
    if n == 0:
        return found, named
    words = triton.cdiv(c, 32)
    bits = student.new_zeros(n, words, dtype=torch.int32)
    _mark(n, c, entries, words)(indices, bits)
    numbers = n, c, entries, student.stride(0), 0 if labels is None else labels.stride(0), ignore_index, temperature
    launch = _forward(student.element_size(), words, need_second, need_total, need_statistics, *numbers)
    launch(student, indices, bits, labels, found, named)
    return found, named


def topk_bucket_bwd(
    grad_sums: Tensor,
    grad_z: Tensor,
    student: Tensor,
    indices: Tensor,
    labels: Tensor | None,
    found: Tensor,
    temperature: float,
    ignore_index: int,
    need_second: bool,
    need_total: bool,
    in_float64: bool,
) -> Tensor:
    """The gradient to the student, in its dtype."""
    grad = student.new_empty(student.shape)
    student, indices = dense(student), indices.contiguous()
    (n, c), entries = student.shape, indices.shape[1]
    if n == 0:
        return grad
    numbers = n, c, entries, student.stride(0), 0 if labels is None else labels.stride(0), ignore_index, temperature
    launch = _backward(student.element_size(), need_second, *numbers)
    launch(grad_sums.contiguous(), grad_z.contiguous(), student, indices, labels, found, grad)
    return grad


def topk_bucket_last(student: Tensor, bounds: Tensor, equal: Tensor) -> Tensor:
    """Of every row and bound the last of the first ``equal`` classes that have it."""
    student, last = dense(student), torch.empty_like(equal)
    (n, c), teachers = student.shape, bounds.shape[1]
    if n > 0:
        _last(n, c, student.stride(0), teachers)(student, bounds.contiguous(), equal.contiguous(), last)
    return last
