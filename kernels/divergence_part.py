"""The rows of ``divergence`` where this process has but a part of their classes (a vocabulary split among processes):

    sums      of every softmax the maximum and the sum of exponentials, of these classes
    forward   with those of all classes given, the shares that these classes have in every sum of the loss
    backward  with all sums given, the student's gradient

Shapes   as in divergence, C the classes of this part. sums and normal [N, S, 2] float64: of the student, of the student at
         temperature 1 where there is a cross-entropy, of the teachers, and in mode "logits" of what is mixed; shares [N, K] float64:
         D and R, the slopes of the weights, the cross-entropy, the statistics. A label of IGNORED leaves the row out, another below
         0 is that of another process
Grid     one program a row, read in chunks
Traffic  (T + 1) N C elements in, each time, and in backward one out

A row's R is sum_c r_c, of which the caller knows the negative: sum_c q_c dD/dq_c. ``shares`` adds what the classes leave out of D
and of the slopes on the process that is asked for it, once.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import OPTIONS, aligned, alignment, check_count, rate_of
from ._kd_rows import (
    LONG_WARPS,
    add,
    folded,
    inverses_of,
    load,
    load_all,
    load_weights,
    mix_logits,
    streamed_sums,
)
from ._launch import Launch, kept
from .divergence import (
    RATE,
    add_statistics,
    compare,
    constants,
    first_largest,
    mass_of,
    probabilities,
    shares_of,
    to_each,
    write_grad,
)
from .multi_teacher_kd import LONG_NUMBERS, Layout, laid_out, power_of_2_below

IGNORED: tl.constexpr = tl.constexpr(-1)


@triton.jit
def _find_row(labels, label_stride):
    """The row of this program [1, 1], whether it counts, and its label."""
    row = (tl.program_id(0).to(tl.int64) + tl.arange(0, 1))[:, None]
    used = row >= 0
    label = row
    if labels is not None:
        label = tl.load(labels + row * label_stride)
        used = label != IGNORED
    return row, used, label


@triton.jit
def _row_rates(temperatures, temperature_stride, row, rate, per_tau, teacher_rates, teacher_per_taus, T: tl.constexpr):
    """Of the student and of the teachers: log2(e) / (2 tau), and 1 / tau."""
    if temperatures is not None:
        tau = tl.load(temperatures + row * temperature_stride)
        per_tau = tl.div_rn(tl.full([1, 1], 1.0, tl.float32), tau)
        rate = tl.div_rn(tl.full([1, 1], RATE, tl.float32), tau)
    rates = (rate,) * T
    per_taus = (per_tau,) * T
    if teacher_rates is not None:
        rates = teacher_rates
        per_taus = teacher_per_taus
    return rate, per_tau, rates, per_taus


@triton.jit
def _put(at, value, used):
    tl.store(at + tl.zeros(value.shape, tl.int32), tl.where(used, value, 0.0).to(tl.float64))


@triton.jit
def _put_sums(at, top, total, used):
    _put(at, tl.where(total == 0, -float("inf"), top), used)  # nothing but -inf
    _put(at + 1, tl.where(used, total, 1.0), used | ~used)


@triton.jit
def _divergence_part_sums_kernel(
    student, teachers, weights, labels, temperatures, out, c, stride, teacher_strides, weight_stride, weight_along,
    label_stride, temperature_stride, rate, rate1, per_tau, teacher_rates, teacher_per_taus,
    MODE: tl.constexpr, LABELED: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = len(teachers)
    LOGITS: tl.constexpr = MODE == "logits"
    S: tl.constexpr = 1 + LABELED + T + LOGITS
    c = aligned(c, ALIGN)
    row, used, _ = _find_row(labels, label_stride)
    w, _ = load_weights(weights, row, weight_stride, weight_along, used, T)
    rate, _, rates, per_taus = _row_rates(
        temperatures, temperature_stride, row, rate, per_tau, teacher_rates, teacher_per_taus, T
    )
    mixing = None
    sum_rates = (rate,) + rates
    if LOGITS:
        mixing = (w, per_taus)
        sum_rates = (rate, RATE) + rates
    tops, totals, s1 = streamed_sums(
        student,
        teachers,
        row,
        stride,
        teacher_strides,
        c,
        used,
        sum_rates,
        rate1,
        mixing,
        True,
        ALIGN,
        BLOCK,
        STEPS,
        VECTOR,
    )
    at = out + row * (2 * S)
    _put_sums(at, tops[0], totals[0], used)
    if LABELED:
        _put_sums(at + 2, tops[0], s1, used)
    if LOGITS:
        _put_sums(at + 2 * (S - 1), tops[1], totals[1], used)
    for t in tl.static_range(T):
        _put_sums(at + 2 * (1 + LABELED + t), tops[1 + LOGITS + t], totals[1 + LOGITS + t], used)


@triton.jit
def _load_normal(normal, row, used, place):
    """Maximum, and the logarithm of the sum beside it in float64."""
    at = normal + row * 0 + 2 * place
    return tl.load(at, mask=used, other=0.0).to(tl.float32), tl.load(at + 1, mask=used, other=0.0)


@triton.jit
def _load_softmaxes(normal, row, used, weights, LOGITS: tl.constexpr, LABELED: tl.constexpr, T: tl.constexpr):
    """Of the student (maximum, sum, and the sum at temperature 1), of the teachers and of the mixed logits (maxima, inverse sums,
    and the logarithms of their sums over the student's)."""
    S: tl.constexpr = 1 + LABELED + T + LOGITS
    own = normal + row * (2 * S)
    m, log = _load_normal(own, row, used, 0)
    s1 = tl.exp(log)
    if LABELED:
        _, log1 = _load_normal(own, row, used, 1)
        s1 = tl.exp(log1)
    maxima = ()
    sums = ()
    log_ratios = ()
    for t in tl.static_range(T + LOGITS):
        top, log_t = _load_normal(own, row, used, 1 + LABELED + t)
        maxima = maxima + (top,)
        sums = sums + (tl.exp(log_t).to(tl.float32),)
        log_ratios = log_ratios + ((log_t - log).to(tl.float32),)
    inverses = inverses_of(sums[:T], weights, True)
    if LOGITS:
        inverses = inverses + (tl.div_rn(1.0, sums[T]),)
    return m, tl.exp(log).to(tl.float32), s1.to(tl.float32), maxima, inverses, log_ratios


@triton.jit
def _targets_of(xs, keep, weights, rates, per_taus, maxima, inverses, log_ratios, MODE: tl.constexpr, T: tl.constexpr):
    """What the student is compared with: logits, maxima, inverse sums, rates, weights and logarithms."""
    if MODE == "logits":
        one = tl.full(weights[0].shape, 1.0, tl.float32)
        xs = (mix_logits(xs, keep, weights, per_taus),)
        maxima = maxima[T:]
        inverses = inverses[T:]
        rates = (RATE,)
        weights = (one,)
        log_ratios = log_ratios[T:]
    return xs, maxima, inverses, rates, weights, log_ratios


@triton.jit
def _divergence_part_shares_kernel(
    student, teachers, weights, labels, temperatures, normal, out, c, stride, teacher_strides, weight_stride, weight_along,
    label_stride, temperature_stride, rate, per_tau, teacher_rates, teacher_per_taus, share, once,
    KIND: tl.constexpr, MODE: tl.constexpr, LABELED: tl.constexpr, TOTALS: tl.constexpr, SLOPES: tl.constexpr,
    STATS: tl.constexpr, ALIGN: tl.constexpr, FOLD: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """once: 1 where what the classes leave out is added, else 0."""
    T: tl.constexpr = len(teachers)
    LOGITS: tl.constexpr = MODE == "logits"
    SUM: tl.constexpr = MODE == "sum"
    EACH: tl.constexpr = T if SUM else 1
    DOTS: tl.constexpr = 0 if SUM or not SLOPES else 1 if LOGITS else T
    WEIGHTS: tl.constexpr = 2 * T + 1 if LOGITS and SLOPES else DOTS
    K: tl.constexpr = EACH * (1 + TOTALS) + WEIGHTS + 2 * LABELED + (6 + T) * STATS
    c = aligned(c, ALIGN)
    row, used, label = _find_row(labels, label_stride)
    w, total = load_weights(weights, row, weight_stride, weight_along, used, T)
    rate, _, rates, per_taus = _row_rates(
        temperatures, temperature_stride, row, rate, per_tau, teacher_rates, teacher_per_taus, T
    )
    m, s, _s1, maxima, inverses, log_ratios = _load_softmaxes(normal, row, used, w, LOGITS, LABELED, T)
    inverse = tl.div_rn(1.0, s)
    mass, log_total, by_total = mass_of(total, LOGITS)

    zero = tl.zeros([1, PART // FOLD], tl.float32)
    values = (zero,) * EACH
    r_sums = (zero,) * EACH
    dots = (zero,) * DOTS
    products = (zero,) * (2 * T if LOGITS and SLOPES else 0)
    below = zero
    stat_sums = (zero,) * ((2 + T) if STATS else 0)
    least = tl.full([1, PART], -1.0, tl.float32)
    nowhere = tl.zeros([1, PART], tl.int32)
    best = (least, nowhere, least, nowhere)
    for step in range(tl.cdiv(c, PART)):
        cols = step * PART + tl.arange(0, PART)[None, :]
        keep = used & (cols < c)
        z = load(student, row, stride, cols, keep, ALIGN, -float("inf"))
        xs = load_all(teachers, row, teacher_strides, cols, keep, ALIGN)
        targets, tops, of_targets, target_rates, target_w, target_logs = _targets_of(
            xs, keep, w, rates, per_taus, maxima, inverses, log_ratios, MODE, T
        )
        if SUM:  # each teacher's own, for whatever weight
            half = (z - m) * rate
            e = tl.exp2(half)
            e = e * e
            halves, probs = probabilities(xs, maxima, inverses, rates)
            new_values = ()
            new_sums = ()
            one = tl.full([1, 1], 1.0, tl.float32)
            for t in tl.static_range(T):
                value, r, _terms, _lost_of_t = to_each(
                    e, half, inverse, (halves[t],), (probs[t],), (one,), (log_ratios[t],), share, KIND, False
                )
                new_values = new_values + value
                new_sums = new_sums + (r,)
            values = add(values, new_values, FOLD, ALIGN)
            r_sums = add(r_sums, new_sums, FOLD, ALIGN)
        else:
            _e, value, r, terms, _lost = compare(
                z, targets, m, inverse, rate, tops, of_targets, target_rates, target_w, target_logs, mass, log_total,
                by_total, share, KIND, MODE,
            )  # fmt: skip
            values = add(values, value, FOLD, ALIGN)
            r_sums = add(r_sums, (r,), FOLD, ALIGN)
            dots = add(dots, terms, FOLD, ALIGN)
            if LOGITS and SLOPES:
                _halves_of_p, p = probabilities(targets, tops, of_targets, target_rates)
                of_a = ()
                of_p = ()
                for t in tl.static_range(T):
                    shift = tl.where(tl.abs(maxima[t]) < 1e38, maxima[t], 0.0)
                    y = (xs[t] - shift) * per_taus[t]
                    y = tl.where(tl.abs(y) < float("inf"), y, -shift * per_taus[t])  # as in divergence.py
                    of_a = of_a + (tl.where(y == 0, 0.0, terms[0] * y),)
                    of_p = of_p + (tl.where(y == 0, 0.0, p[0] * y),)
                products = add(products, of_a + of_p, FOLD, ALIGN)
        if LABELED:
            below += folded(tl.where(keep, m - z, 0.0), FOLD, ALIGN)
        if STATS:
            mixed = None
            if LOGITS:
                _mixed_halves, mixed_probs = probabilities(targets, tops, of_targets, target_rates)
                mixed = mixed_probs[0]
            stat_sums, best = add_statistics(
                stat_sums, best, z, xs, cols, m, inverse, rate, maxima[:T], inverses[:T], rates, w, log_ratios[:T], mixed, FOLD,
                ALIGN,
            )  # fmt: skip

    poison = 0.0 * inverse  # a NaN that a logarithm has lost, of what the student is compared with
    for t in tl.static_range(T if LOGITS else 0, T + LOGITS):
        poison += 0.0 * inverses[t]
    constant, slope_constant = constants(mass, share, KIND, MODE != "sum")
    at = out + row * K
    for t in tl.static_range(EACH):
        own = tl.sum(values[t], axis=1, keep_dims=True)
        if not SUM:
            own += once * constant + poison
        elif KIND == "forward_kl":  # a teacher that counts nothing has p = 0: the classes have added up q - p to 1
            own -= once * tl.where(inverses[t] == 0, 1.0, 0.0)
        elif KIND == "skew_kl":
            own -= once * tl.where(inverses[t] == 0, share[1], 0.0)
        elif KIND == "skew_reverse_kl":
            own += once * tl.where(inverses[t] == 0, share[0], 0.0)
        _put(at + t, own, used)
    at += EACH
    if TOTALS:
        for t in tl.static_range(EACH):
            _put(at + t, -tl.sum(r_sums[t], axis=1, keep_dims=True), used)
        at += EACH
    if LOGITS and SLOPES:
        for t in tl.static_range(2 * T):
            _put(at + t, tl.sum(products[t], axis=1, keep_dims=True) + poison, used)
        _put(at + 2 * T, tl.sum(dots[0], axis=1, keep_dims=True), used)
    else:
        for t in tl.static_range(DOTS):
            slope = tl.sum(dots[t], axis=1, keep_dims=True) + once * slope_constant
            _put(at + t, tl.where(inverses[t] == 0, 0.0, slope) + poison, used)
    at += WEIGHTS
    if LABELED:
        _, log1 = _load_normal(normal + row * (2 * (2 + T + LOGITS)), row, used, 1)
        here = used & (label >= 0) & (label < c)
        of_label = tl.load(student + row * aligned(stride, ALIGN) + label, mask=here, other=0.0).to(tl.float32) - m
        _put(at, tl.where(here, of_label.to(tl.float64) - log1, 0.0), used)
        _put(at + 1, -tl.sum(below, axis=1, keep_dims=True).to(tl.float64) - c * log1, used)
        at += 2
    if STATS:
        for i in tl.static_range(2 + T):
            found = tl.sum(stat_sums[i], axis=1, keep_dims=True)
            if i >= 2:
                found = tl.where(inverses[i - 2] == 0, 0.0, found)
            _put(at + i, found, used)
        for i in tl.static_range(2):
            _put(at + 2 + T + 2 * i, tl.max(best[2 * i], axis=1, keep_dims=True), used)
            _put(at + 3 + T + 2 * i, first_largest(best[2 * i], best[2 * i + 1]), used)


@triton.jit
def _divergence_part_grad_kernel(
    of_kl, of_ce, totals, student, teachers, weights, labels, temperatures, normal, out, c, stride, teacher_strides,
    weight_stride, weight_along, label_stride, temperature_stride, rate, rate1, per_tau, teacher_rates, teacher_per_taus, share,
    smoothing, even, KIND: tl.constexpr, MODE: tl.constexpr, ALIGN: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = len(teachers)
    LOGITS: tl.constexpr = MODE == "logits"
    LABELED: tl.constexpr = of_ce is not None
    c = aligned(c, ALIGN)
    row, used, label = _find_row(labels, label_stride)
    w, total = load_weights(weights, row, weight_stride, weight_along, used, T)
    rate, per_tau, rates, per_taus = _row_rates(
        temperatures, temperature_stride, row, rate, per_tau, teacher_rates, teacher_per_taus, T
    )
    m, s, s1, maxima, inverses, log_ratios = _load_softmaxes(normal, row, used, w, LOGITS, LABELED, T)
    inverse = tl.div_rn(1.0, s)
    mass, log_total, by_total = mass_of(total, LOGITS)
    all_r = -tl.load(totals + row)
    kl_grad = tl.load(of_kl + row)
    ce_grad = 0.0
    ce_labels = None
    if LABELED:
        ce_grad = tl.load(of_ce + row)
        ce_labels = labels
    for step in range(tl.cdiv(c, PART)):
        cols = step * PART + tl.arange(0, PART)[None, :]
        keep = used & (cols < c)
        z = load(student, row, stride, cols, keep, ALIGN, -float("inf"))
        xs = load_all(teachers, row, teacher_strides, cols, keep, ALIGN)
        targets, tops, of_targets, target_rates, target_w, target_logs = _targets_of(
            xs, keep, w, rates, per_taus, maxima, inverses, log_ratios, MODE, T
        )
        e, _value, r, _terms, lost = compare(
            z, targets, m, inverse, rate, tops, of_targets, target_rates, target_w, target_logs, mass, log_total, by_total,
            share, KIND, MODE,
        )  # fmt: skip
        write_grad(
            out, z, e, r, lost, row, row >= 0, used, cols, c, ce_labels, label, m, s, s1, all_r, rate1, per_tau, ce_grad,
            kl_grad, smoothing, even, KIND,
        )  # fmt: skip


# --- launchers


def _numbers(
    at: Layout, mode: str, taus: tuple[float, ...], temperature: float, temperature_stride: int | None
) -> dict:
    """What the three kernels have in common."""
    check_count("student_logits", at.c, "classes in a process")
    return dict(
        c=at.c,
        stride=at.stride,
        teacher_strides=at.teacher_strides,
        weight_stride=(at.weight_strides or (0, 0))[0],
        weight_along=(at.weight_strides or (0, 0))[1],
        label_stride=at.label_stride or 0,
        temperature_stride=temperature_stride or 0,
        rate=rate_of(temperature),
        per_tau=1 / temperature,
        teacher_rates=tuple(rate_of(tau) for tau in taus) or None,
        teacher_per_taus=tuple(1 / tau for tau in taus) or None,
        MODE=mode,
        ALIGN=alignment(at.c, at.stride, *at.teacher_strides),
        num_warps=LONG_WARPS,
        **OPTIONS,
    )


def _rate1(temperature: float, temperature_stride: int | None, labeled: bool) -> float | None:
    """Of the softmax at temperature 1, where that is another than the student's."""
    return math.log2(math.e) if labeled and (temperature != 1 or temperature_stride is not None) else None


def _vector(at: Layout) -> int:
    """Classes that a thread has at a time."""
    return min(16 // at.itemsize, power_of_2_below(LONG_NUMBERS // (1 + len(at.teacher_strides))))


@kept
def _sums_launch(
    at: Layout, mode: str, taus: tuple[float, ...], temperature: float, temperature_stride: int | None, labeled: bool
) -> Launch:
    vector = _vector(at)
    block = LONG_WARPS * 32 * vector
    return Launch(
        _divergence_part_sums_kernel,
        (at.n,),
        **_numbers(at, mode, taus, temperature, temperature_stride),
        rate1=_rate1(temperature, temperature_stride, labeled),
        LABELED=labeled,
        BLOCK=block,
        STEPS=triton.cdiv(at.c, block),
        VECTOR=vector,
    )


@kept
def _shares_launch(
    at: Layout, mode: str, taus: tuple[float, ...], temperature: float, temperature_stride: int | None, labeled: bool,
    divergence: str, beta: float, once: bool, needs: tuple[bool, bool, bool],
) -> Launch:  # fmt: skip
    vector = _vector(at)
    fold = max(vector // 4, 1)
    return Launch(
        _divergence_part_shares_kernel,
        (at.n,),
        **_numbers(at, mode, taus, temperature, temperature_stride),
        share=shares_of(divergence, beta),
        once=float(once),
        KIND=divergence,
        LABELED=labeled,
        TOTALS=needs[0],
        SLOPES=needs[1],
        STATS=needs[2],
        FOLD=fold,
        PART=LONG_WARPS * 32 * fold,
    )


@kept
def _grad_launch(
    at: Layout, mode: str, taus: tuple[float, ...], temperature: float, temperature_stride: int | None, labeled: bool,
    divergence: str, beta: float, smoothing: float, even: float,
) -> Launch:  # fmt: skip
    return Launch(
        _divergence_part_grad_kernel,
        (at.n,),
        **_numbers(at, mode, taus, temperature, temperature_stride),
        # As in divergence: apart from q, of which a row's temperature or a lost class leaves nothing.
        rate1=math.log2(math.e) if labeled else None,
        share=shares_of(divergence, beta),
        smoothing=float(smoothing),
        even=float(even),
        KIND=divergence,
        PART=LONG_WARPS * 32 * max(_vector(at) // 4, 1),
    )


def _given(
    student: Tensor, teachers: list[Tensor], weights: Tensor | None, labels: Tensor | None, temperatures: Tensor | None
) -> tuple[Layout, int | None, tuple]:
    at, student, dense_teachers = laid_out(student, teachers, weights, labels)
    stride = None if temperatures is None else temperatures.stride(0)
    return at, stride, (student, dense_teachers, weights, labels, temperatures)


def divergence_part_sums(
    student: Tensor,
    teachers: list[Tensor],
    weights: Tensor | None,
    labels: Tensor | None,
    temperatures: Tensor | None,
    mode: str,
    teacher_temperatures: list[float],
    temperature: float,
    labeled: bool,
) -> Tensor:
    """[N, S, 2] float64."""
    softmaxes = 1 + labeled + len(teachers) + (mode == "logits")
    out = student.new_empty(student.shape[0], softmaxes, 2, dtype=torch.float64)
    if out.numel():
        at, stride, tensors = _given(student, teachers, weights, labels, temperatures)
        _sums_launch(at, mode, tuple(teacher_temperatures), temperature, stride, labeled)(*tensors, out)
    return out


def divergence_part_fwd(
    student: Tensor,
    teachers: list[Tensor],
    weights: Tensor | None,
    labels: Tensor | None,
    temperatures: Tensor | None,
    normal: Tensor,
    divergence: str,
    beta: float,
    mode: str,
    teacher_temperatures: list[float],
    temperature: float,
    labeled: bool,
    constants: bool,
    need_totals: bool,
    need_weights: bool,
    need_statistics: bool,
) -> Tensor:
    """[N, K] float64."""
    count = len(teachers)
    columns = (count if mode == "sum" else 1) * (1 + need_totals) + 2 * labeled + (6 + count) * need_statistics
    columns += {"mixture": count, "sum": 0, "logits": 2 * count + 1}[mode] * need_weights
    out = student.new_empty(student.shape[0], columns, dtype=torch.float64)
    if out.numel():
        at, stride, tensors = _given(student, teachers, weights, labels, temperatures)
        needs = need_totals, need_weights, need_statistics
        settings = mode, tuple(teacher_temperatures), temperature, stride, labeled, divergence, beta, constants, needs
        _shares_launch(at, *settings)(*tensors, normal, out)
    return out


def divergence_part_bwd(
    of_kl: Tensor,
    of_ce: Tensor | None,
    totals: Tensor,
    student: Tensor,
    teachers: list[Tensor],
    weights: Tensor | None,
    labels: Tensor | None,
    temperatures: Tensor | None,
    normal: Tensor,
    divergence: str,
    beta: float,
    mode: str,
    teacher_temperatures: list[float],
    temperature: float,
    label_smoothing: float,
    even: float,
) -> Tensor:
    """The gradient to the student, in its dtype."""
    out = student.new_empty(student.shape)
    if out.numel():
        at, stride, tensors = _given(student, teachers, weights, labels, temperatures)
        settings = mode, tuple(teacher_temperatures), temperature, stride, of_ce is not None
        launch = _grad_launch(at, *settings, divergence, beta, label_smoothing, even)
        numbers = [None if x is None else x.contiguous() for x in (of_kl, of_ce, totals)]
        launch(*numbers, *tensors, normal, out)
    return out
