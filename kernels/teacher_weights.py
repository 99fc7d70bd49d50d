"""Teacher weights: pooling, scores and their softmax in one pass over the feature map; a backward that writes it once.

    b = max or mean over H x W of B,  gamma_t = sum_c v_c theta_tc b_c,  w = softmax_t gamma
    dgamma_t = w_t (g_t - sum_s g_s w_s),  db_c = sum_t dgamma_t theta_tc v_c,  d(theta_t v) = sum_n dgamma_nt b_n

Shapes   features [N, d, H, W] or [N, d] in float32|bfloat16|float16 with any strides; theta [T, d], v [d] float32
         -> weights [N, T], pooled [N, d] float32, index [N, d] int32: the first maximum's place in its plane
Grid     forward and the map's gradient: one program an example (backward: N x parts, each some of the channels), tiles
         of channels by pixels; the parameters' gradient: one program for 16 channels, which walks over the examples
Traffic  forward reads the map, backward writes it: N d H W itemsize bytes each way, which binds both. Besides 8 N d
         (pooled, index) each way, and pooled once a teacher and the slopes N T for the parameters' gradient, from L2

Scores, their softmax and what backward makes of it are float64, d T multiply-adds an example: the softmax turns an
absolute error of a score into a relative one, and backward takes differences of weights near 1.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import OPTIONS, aligned, alignment, check_count, pixel_offset, plane_strides, power_of_2
from ._launch import Launch, kept

TILE = 4096  # elements that a program holds at once
SLOPES = 2048  # most elements of a tile of teachers by channels
PROGRAMS = 1024  # backward splits the channels of few examples until there are about as many


@triton.jit
def _sortable(x):
    """float32 as int32 in the same order: -0 as 0, and NaN as the largest."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def _unsorted(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _pixels(planes, inside, p, pixels, width, down, along, other, FLAT: tl.constexpr):
    at = planes[:, None] + pixel_offset(p, width, down, along, FLAT)[None, :]
    return tl.load(at, mask=inside[:, None] & (p < pixels)[None, :], other=other).to(tl.float32)


@triton.jit
def _first_maximum(
    planes, inside, pixels, width, down, along, FLAT: tl.constexpr, WHOLE: tl.constexpr, BLOCK_P: tl.constexpr
):
    """The maximum of each plane and the first place where it stands. Integers, so that NaN needs no other path."""
    p = tl.arange(0, BLOCK_P)
    best = _sortable(_pixels(planes, inside, p, pixels, width, down, along, -float("inf"), FLAT))
    place = tl.broadcast_to(p[None, :], best.shape)
    if not WHOLE:
        for start in range(BLOCK_P, pixels, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            key = _sortable(_pixels(planes, inside, p, pixels, width, down, along, -float("inf"), FLAT))
            place = tl.where(key > best, p[None, :], place)
            best = tl.maximum(key, best)
    highest = tl.max(best, axis=1)
    return _unsorted(highest), tl.min(tl.where(best == highest[:, None], place, 0x7FFFFFFF), axis=1)


@triton.jit
def _mean(planes, inside, pixels, width, down, along, FLAT: tl.constexpr, WHOLE: tl.constexpr, BLOCK_P: tl.constexpr):
    total = _pixels(planes, inside, tl.arange(0, BLOCK_P), pixels, width, down, along, 0.0, FLAT)
    if not WHOLE:
        for start in range(BLOCK_P, pixels, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            total += _pixels(planes, inside, p, pixels, width, down, along, 0.0, FLAT)
    return tl.sum(total, axis=1) / pixels


@triton.jit
def _factors(theta_ptr, v_ptr, t, c, teachers, channels, theta_down, theta_along, v_along):
    """theta_t * v for some teachers and channels, [T, C] float64. In 64 bits: rows of a view may lie far apart."""
    t, c = t.to(tl.int64), c.to(tl.int64)
    inside = (t < teachers)[:, None] & (c < channels)[None, :]
    theta = tl.load(theta_ptr + t[:, None] * theta_down + c[None, :] * theta_along, mask=inside, other=0.0)
    v = tl.load(v_ptr + c * v_along, mask=c < channels, other=0.0)
    return theta.to(tl.float64) * v.to(tl.float64)[None, :]


@triton.jit
def _softmax(scores, inside):
    scores = tl.where(inside, scores, -float("inf"))
    e = tl.exp(scores - tl.max(scores, axis=0))
    return e / tl.sum(e, axis=0)


@triton.jit
def _forward_kernel(
    x_ptr, theta_ptr, v_ptr, weights_ptr, pooled_ptr, index_ptr, channels, pixels, width, teachers,
    x_example, x_channel, down, along, theta_down, theta_along, v_along,
    MAX: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    example = x_ptr + n * aligned(x_example, ALIGN)
    pixels, x_channel = aligned(pixels, ALIGN), aligned(x_channel, ALIGN)
    t = tl.arange(0, BLOCK_T)
    scores = tl.zeros([BLOCK_T], tl.float64)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = c < channels
        planes = example + c.to(tl.int64) * x_channel
        if MAX:
            pooled, index = _first_maximum(planes, inside, pixels, width, down, along, FLAT, WHOLE, BLOCK_P)
            tl.store(index_ptr + n * channels + c, index, mask=inside)
        else:
            pooled = _mean(planes, inside, pixels, width, down, along, FLAT, WHOLE, BLOCK_P)
        pooled = tl.where(inside, pooled, 0.0)
        tl.store(pooled_ptr + n * channels + c, pooled, mask=inside)
        factors = _factors(theta_ptr, v_ptr, t, c, teachers, channels, theta_down, theta_along, v_along)
        scores += tl.sum(factors * pooled.to(tl.float64)[None, :], axis=1)
    weights = _softmax(scores, t < teachers)
    tl.store(weights_ptr + n * teachers + t, weights.to(tl.float32), mask=t < teachers)


@triton.jit
def _slopes(
    grad_ptr, theta_ptr, v_ptr, pooled_ptr, n, channels, teachers, grad_down, grad_along, theta_down, theta_along,
    v_along, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """dL / dgamma of one example, [T] float64: from the pooled features once more, as the weights are rounded."""
    t = tl.arange(0, BLOCK_T).to(tl.int64)
    scores = tl.zeros([BLOCK_T], tl.float64)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        factors = _factors(theta_ptr, v_ptr, t, c, teachers, channels, theta_down, theta_along, v_along)
        pooled = tl.load(pooled_ptr + n * channels + c, mask=c < channels, other=0.0)
        scores += tl.sum(factors * pooled.to(tl.float64)[None, :], axis=1)
    weights = _softmax(scores, t < teachers)
    grad = tl.load(grad_ptr + n * grad_down + t * grad_along, mask=t < teachers, other=0.0).to(tl.float64)
    nothing = (
        tl.sum((grad != 0).to(tl.int32), axis=0) == 0
    )  # comes back: the example counts nothing, whatever its features are
    return tl.where(nothing, 0.0, weights * (grad - tl.sum(grad * weights, axis=0)))


@triton.jit
def _features_kernel(
    grad_ptr, theta_ptr, v_ptr, pooled_ptr, index_ptr, slopes_ptr, out_ptr, channels, pixels, width, teachers,
    grad_down, grad_along, theta_down, theta_along, v_along, out_example, out_channel, down, along,
    MAX: tl.constexpr, NEED_FEATURES: tl.constexpr, NEED_PARAMETERS: tl.constexpr, FLAT: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slopes = _slopes(
        grad_ptr, theta_ptr, v_ptr, pooled_ptr, n, channels, teachers, grad_down, grad_along, theta_down, theta_along,
        v_along, BLOCK_C, BLOCK_T,
    )  # fmt: skip
    t = tl.arange(0, BLOCK_T)
    if NEED_PARAMETERS:
        tl.store(slopes_ptr + n * teachers + t, slopes.to(tl.float32), mask=t < tl.where(part == 0, teachers, 0))
    if NEED_FEATURES:
        example = out_ptr + n * aligned(out_example, ALIGN)
        pixels, out_channel = aligned(pixels, ALIGN), aligned(out_channel, ALIGN)
        for start in range(part * BLOCK_C, channels, tl.num_programs(1) * BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            inside = c < channels
            factors = _factors(theta_ptr, v_ptr, t, c, teachers, channels, theta_down, theta_along, v_along)
            value = tl.sum(slopes[:, None] * factors, axis=0)
            if MAX:
                index = tl.load(index_ptr + n * channels + c, mask=inside, other=0)
            else:
                value = value / pixels
            value = value.to(tl.float32).to(out_ptr.dtype.element_ty)
            planes = example + c.to(tl.int64) * out_channel
            for first in range(0, pixels, BLOCK_P):
                p = first + tl.arange(0, BLOCK_P)
                if MAX:
                    tile = tl.where(index[:, None] == p[None, :], value[:, None], 0.0)
                else:
                    tile = tl.broadcast_to(value[:, None], [BLOCK_C, BLOCK_P])
                at = planes[:, None] + pixel_offset(p, width, down, along, FLAT)[None, :]
                tl.store(at, tile, mask=inside[:, None] & (p < pixels)[None, :])


@triton.jit
def _parameters_kernel(
    slopes_ptr, theta_ptr, v_ptr, pooled_ptr, upstream_ptr, grad_theta_ptr, grad_v_ptr, examples, channels, teachers,
    theta_down, theta_along, v_along,
    decay,  # with upstream_ptr: what comes back to the sum of decay / 2 theta^2 and decay / 2 v^2
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    inside = c < channels
    v = tl.load(v_ptr + c * v_along, mask=inside, other=0.0)
    grad_v = tl.zeros([BLOCK_C], tl.float64)
    pull = tl.full([1], 0.0, tl.float64)
    if upstream_ptr is not None:
        pull += decay * tl.load(upstream_ptr).to(tl.float64)
        grad_v += pull * v
    for t in range(teachers):
        total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for start in range(0, examples, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N).to(tl.int64)
            slope = tl.load(slopes_ptr + n * teachers + t, mask=n < examples, other=0.0)
            at = pooled_ptr + n[:, None] * channels + c[None, :]
            pooled = tl.load(at, mask=(n < examples)[:, None] & inside[None, :], other=0.0)
            total += tl.where(slope[:, None] == 0, 0.0, slope[:, None] * pooled)
        grad = tl.sum(total.to(tl.float64), axis=0)
        theta = tl.load(theta_ptr + c * theta_along, mask=inside, other=0.0)
        to_theta = grad * v
        if upstream_ptr is not None:
            to_theta += pull * theta
        tl.store(grad_theta_ptr + c, to_theta.to(tl.float32), mask=inside)
        grad_v += grad * theta
        theta_ptr += theta_down  # not t * theta_down, which 32 bits may not hold
        grad_theta_ptr += channels
    tl.store(grad_v_ptr + c, grad_v.to(tl.float32), mask=inside)


def _geometry(shape: tuple, strides: tuple) -> tuple[dict[str, int], dict[str, Any]]:
    """Sizes of [N, d, H, W] or [N, d]; and how pixels lie: steps, whether evenly, and what divides a plane."""
    channels, plane = shape[1], shape[2:]
    check_count("teacher_weights: features", channels, "channels")
    if not plane:
        sizes = dict(channels=channels, pixels=1, width=1)
        return sizes, dict(down=0, along=0, FLAT=True, ALIGN=1)
    pixels = plane[0] * plane[1]
    check_count("teacher_weights: features", pixels, "pixels")
    down, along, flat = plane_strides(plane, strides[2:])
    sizes = dict(channels=channels, pixels=pixels, width=plane[1])
    return sizes, dict(down=down, along=along, FLAT=flat, ALIGN=alignment(pixels, *strides[:2]))


def _blocks(channels: int, pixels: int, teachers: int) -> dict[str, int]:
    """Tiles that suit rows along pixels and along channels (channels_last): 64 of either make 128 bytes or more."""
    block_p, block_t = power_of_2(pixels, 64), triton.next_power_of_2(teachers)
    block_c = power_of_2(channels, min(TILE // block_p, SLOPES // block_t))
    warps = 8 if block_c * block_p >= TILE else 4
    return {"BLOCK_C": block_c, "BLOCK_P": block_p, "BLOCK_T": block_t, "num_warps": warps}


def _factor_strides(theta: tuple, v: tuple) -> dict[str, int]:
    return dict(theta_down=theta[0], theta_along=theta[1], v_along=v[0])


@kept
def _forward_launch(shape: tuple, strides: tuple, teachers: int, theta: tuple, v: tuple, max_pool: bool) -> Launch:
    sizes, plane = _geometry(shape, strides)
    blocks = _blocks(shape[1], sizes["pixels"], teachers)
    return Launch(
        _forward_kernel,
        shape[:1],
        **sizes,
        teachers=teachers,
        x_example=strides[0],
        x_channel=strides[1],
        **plane,
        **_factor_strides(theta, v),
        MAX=max_pool,
        WHOLE=sizes["pixels"] <= blocks["BLOCK_P"],
        **blocks,
        **OPTIONS,
    )


@kept
def _features_launch(
    shape: tuple,
    strides: tuple,
    teachers: int,
    grad: tuple,
    theta: tuple,
    v: tuple,
    max_pool: bool,
    need_features: bool,
    need_parameters: bool,
) -> Launch:
    sizes, plane = _geometry(shape, strides)
    blocks = _blocks(shape[1], sizes["pixels"], teachers)
    parts = 1
    if need_features:
        parts = min(triton.cdiv(shape[1], blocks["BLOCK_C"]), triton.cdiv(PROGRAMS, shape[0]))
    return Launch(
        _features_kernel,
        (shape[0], parts),
        **sizes,
        teachers=teachers,
        grad_down=grad[0],
        grad_along=grad[1],
        **_factor_strides(theta, v),
        out_example=strides[0],
        out_channel=strides[1],
        **plane,
        MAX=max_pool,
        NEED_FEATURES=need_features,
        NEED_PARAMETERS=need_parameters,
        **blocks,
        **OPTIONS,
    )


@kept
def _parameters_launch(examples: int, channels: int, teachers: int, theta: tuple, v: tuple, decay: float) -> Launch:
    sizes = dict(examples=examples, channels=channels, teachers=teachers, decay=decay, BLOCK_N=128, BLOCK_C=16)
    return Launch(_parameters_kernel, (triton.cdiv(channels, 16),), **sizes, **_factor_strides(theta, v), **OPTIONS)


def teacher_weights_fwd(features: Tensor, theta: Tensor, v: Tensor, max_pool: bool) -> tuple[Tensor, Tensor, Tensor]:
    shape, teachers = features.shape, theta.shape[0]
    n, d = shape[:2]
    weights = features.new_empty(n, teachers, dtype=torch.float32)
    pooled = weights.new_empty(n, d)
    index = weights.new_empty((n, d) if max_pool else 0, dtype=torch.int32)
    if n:
        launch = _forward_launch(shape, features.stride(), teachers, theta.stride(), v.stride(), max_pool)
        launch(features, theta, v, weights, pooled, index)
    return weights, pooled, index


def teacher_weights_bwd(
    grad: Tensor,
    features: Tensor,
    theta: Tensor,
    v: Tensor,
    pooled: Tensor,
    index: Tensor,
    max_pool: bool,
    need_features: bool,
    need_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(grad, features, theta, v, pooled, index, max_pool, need_features, need_parameters, None, 0.0)


def backward(
    grad: Tensor,
    features: Tensor,
    theta: Tensor,
    v: Tensor,
    pooled: Tensor,
    index: Tensor,
    max_pool: bool,
    need_features: bool,
    need_parameters: bool,
    upstream: Tensor | None,
    decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to features, theta and v; to the latter also upstream (a scalar) times decay times themselves."""
    n, d, teachers = features.shape[0], features.shape[1], theta.shape[0]
    grad_features = torch.empty_like(features) if need_features else features.new_empty(0)
    slopes = pooled.new_empty((n, teachers) if need_parameters else 0)
    pooled, index = pooled.contiguous(), index.contiguous()
    if n and (need_features or need_parameters):
        strides = (grad_features if need_features else features).stride()
        launch = _features_launch(
            features.shape, strides, teachers, grad.stride(), theta.stride(), v.stride(), max_pool, need_features,
            need_parameters,
        )  # fmt: skip
        launch(grad, theta, v, pooled, index, slopes, grad_features)
    if not need_parameters:
        return grad_features, theta.new_empty(0), v.new_empty(0)
    grad_theta, grad_v = theta.new_empty(theta.shape), v.new_empty(v.shape)
    launch = _parameters_launch(n, d, teachers, theta.stride(), v.stride(), decay)
    launch(slopes, theta, v, pooled, upstream if decay else None, grad_theta, grad_v)
    return grad_features, grad_theta, grad_v
