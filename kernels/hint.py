"""The parts of the hint loss around torch's 1x1 convolution: pooled (and normalized) maps, and the mean squared error.

    r = 1 / max(|x|, 1e-12), |x| over channels        y_o = mean over window o of x r
    dx = (d - x <x, d> / |x|^2) / |x|,                d = sum over the windows o of a pixel of dy_o / |o|
    loss = mean (u - v)^2,                            dloss / du = 2 (u - v) / n

Windows are those of torch's adaptive pooling: output i of h averages inputs floor(i H / h) to ceil((i + 1) H / h), so
that with h <= H a pixel lies in one window, or in two neighbors where h does not divide H; so for W. Below 1e-12 |x| is a constant.

Shapes   feature_map [N, c, H, W] in float32|bfloat16|float16 with any strides -> pooled [N, c, h, w], norms [N, H, W]
         float32; gradient [N, c, H, W] as the map's dtype, contiguous. prediction, target of one shape -> loss [],
         gradient float32
Grid     norms, and the gradient: a program for an example and a block of pixels, which walks over the channels (twice
         with the norm: a sum over all of them, then what needs it). pool: a program for a tile of channels by outputs,
         with its windows as a third dimension. error: at most 1024 programs, each a run of elements, then one program
         that adds up their sums in float64
Traffic  forward reads the map and writes the pooled one. With the norm it reads the map twice, the second time from L2
         where a block's channels fit there; h = H and w = W take one launch, which writes x r in that second walk. The
         gradient: reads dy and the map (twice, likewise), writes the map's gradient. error: reads both, writes one.
         Bytes bind all of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import OPTIONS, aligned, alignment, check_count, pixel_offset, plane_strides, power_of_2
from ._launch import Launch, kept

SMALLEST_NORM = tl.constexpr(1e-12)  # as torch.nn.functional.normalize has it
TILE = 2048  # elements that a program holds at once
PIXELS = 32  # at most, of a tile that walks over channels
RUN = 4096  # elements that a program of the error takes at a time
RUNS = 1024  # most programs of the error


@triton.jit
def _norms_kernel(
    x_ptr, norms_ptr, out_ptr, channels, pixels, width, x_example, x_channel, down, along,
    WRITE: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr, X_ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(pixels, BLOCK_P)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    pixels, x_channel = aligned(pixels, ALIGN), aligned(x_channel, X_ALIGN)
    p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    example = x_ptr + n * aligned(x_example, X_ALIGN) + pixel_offset(p, width, down, along, FLAT)[None, :]
    squares = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C).to(tl.int64)[:, None]
        x = tl.load(example + c * x_channel, mask=(c < channels) & (p < pixels)[None, :], other=0.0).to(tl.float32)
        squares += x * x
    norm = tl.sqrt_rn(tl.sum(squares, axis=0))
    tl.store(norms_ptr + n * pixels + p, norm, mask=p < pixels)
    if WRITE:
        scale = 1 / tl.where(norm < SMALLEST_NORM, SMALLEST_NORM, norm)
        out = out_ptr + n * channels * pixels + p[None, :]
        for start in range(0, channels, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C).to(tl.int64)[:, None]
            mask = (c < channels) & (p < pixels)[None, :]
            x = tl.load(example + c * x_channel, mask=mask, other=0.0).to(tl.float32)
            tl.store(out + c * pixels, x * scale[None, :], mask=mask)


@triton.jit
def _window(i, size, out):
    """Begin and end of the inputs that average into output i."""
    return i * size // out, ((i + 1) * size + out - 1) // out


@triton.jit
def _pool_kernel(
    x_ptr, norms_ptr, out_ptr, channels, height, width, out_height, out_width, window_height, window_width,
    x_example, x_channel, down, along,
    NORMALIZE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    outputs = out_height * out_width
    blocks, tiles = tl.cdiv(channels, BLOCK_C), tl.cdiv(outputs, BLOCK_O)  # a grid's other dimensions end at 65535
    program, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    n = (program // blocks).to(tl.int64)
    c = (program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    top, bottom = _window(o // out_width, height, out_height)
    left, right = _window(o % out_width, width, out_width)
    total = tl.zeros([BLOCK_C, BLOCK_O, BLOCK_K], tl.float32)
    for start in range(0, window_height * window_width, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K))[None, :]
        y, z = top[:, None] + k // window_width, left[:, None] + k % window_width
        inside = (y < bottom[:, None]) & (z < right[:, None]) & (o < outputs)[:, None]
        at = y.to(tl.int64) * down + z.to(tl.int64) * along
        planes = x_ptr + n * x_example + c[:, None, None] * x_channel
        mask = (c < channels)[:, None, None] & inside[None, :, :]
        x = tl.load(planes + at[None, :, :], mask=mask, other=0.0).to(tl.float32)
        if NORMALIZE:
            norm = tl.load(norms_ptr + n * height * width + y * width + z, mask=inside, other=1.0)
            x *= (1 / tl.where(norm < SMALLEST_NORM, SMALLEST_NORM, norm))[None, :, :]
        total += x
    mean = tl.sum(total, axis=2) / ((bottom - top) * (right - left)).to(tl.float32)[None, :]
    out = out_ptr + n * channels * outputs + c[:, None] * outputs + o[None, :]
    tl.store(out, mean, mask=(c < channels)[:, None] & (o < outputs)[None, :])


@triton.jit
def _spread(
    grad, c, p, channels, height, width, out_height, out_width,
    SAME: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """What the windows of some pixels send back to them, [c, p]. A pixel lies in at most ROWS x COLUMNS windows."""
    pixels = aligned(height * width, ALIGN)
    inside = (c < channels)[:, None] & (p < pixels)[None, :]
    if SAME:
        total = tl.load(grad + c[:, None] * pixels + p[None, :], mask=inside, other=0.0)
    else:
        total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        y, z = p // width, p % width
        for down in tl.static_range(ROWS):
            for along in tl.static_range(COLUMNS):
                i, j = y * out_height // height + down, z * out_width // width + along
                top, bottom = _window(i, height, out_height)
                left, right = _window(j, width, out_width)
                hit = (top <= y) & (i < out_height) & (left <= z) & (j < out_width)
                at = grad + c[:, None] * (out_height * out_width) + (i * out_width + j)[None, :]
                share = 1 / ((bottom - top) * (right - left)).to(tl.float32)
                total += tl.load(at, mask=inside & hit[None, :], other=0.0) * share[None, :]
    return total


@triton.jit
def _pool_backward_kernel(
    grad_ptr, x_ptr, norms_ptr, out_ptr, channels, height, width, out_height, out_width,
    x_example, x_channel, down, along,
    NORMALIZE: tl.constexpr, SAME: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr, X_ALIGN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(height * width, BLOCK_P)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    pixels, x_channel = aligned(height * width, ALIGN), aligned(x_channel, X_ALIGN)
    p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    example = x_ptr + n * aligned(x_example, X_ALIGN) + pixel_offset(p, width, down, along, FLAT)[None, :]
    grad = grad_ptr + n * channels * (pixels if SAME else out_height * out_width)
    if NORMALIZE:
        inner = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        for start in range(0, channels, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C).to(tl.int64)
            d = _spread(
                grad, c, p, channels, height, width, out_height, out_width, SAME, ALIGN, ROWS, COLUMNS, BLOCK_C, BLOCK_P
            )
            mask = (c < channels)[:, None] & (p < pixels)[None, :]
            inner += d * tl.load(example + c[:, None] * x_channel, mask=mask, other=0.0).to(tl.float32)
        norm = tl.load(norms_ptr + n * pixels + p, mask=p < pixels, other=1.0)
        dead = norm < SMALLEST_NORM
        scale = 1 / tl.where(dead, SMALLEST_NORM, norm)
        along_x = tl.where(dead, 0.0, tl.sum(inner, axis=0) * scale)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C).to(tl.int64)
        d = _spread(
            grad, c, p, channels, height, width, out_height, out_width, SAME, ALIGN, ROWS, COLUMNS, BLOCK_C, BLOCK_P
        )
        mask = (c < channels)[:, None] & (p < pixels)[None, :]
        if NORMALIZE:
            x = tl.load(example + c[:, None] * x_channel, mask=mask, other=0.0).to(tl.float32)
            d = (d - x * scale[None, :] * along_x[None, :]) * scale[None, :]
        out = out_ptr + n * channels * pixels + c[:, None] * pixels + p[None, :]
        tl.store(out, d.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _error_kernel(
    u_ptr, v_ptr, sums_ptr, grad_ptr, n, run, scale, NEED_GRAD: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    n = aligned(n, ALIGN)
    start = tl.program_id(0).to(tl.int64) * run
    total = tl.zeros([BLOCK], tl.float32)
    for offset in range(0, run, BLOCK):
        i = start + offset + tl.arange(0, BLOCK)
        u = tl.load(u_ptr + i, mask=i < n, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + i, mask=i < n, other=0.0).to(tl.float32)
        total += (u - v) * (u - v)
        if NEED_GRAD:
            tl.store(grad_ptr + i, (u - v) * scale, mask=i < n)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total.to(tl.float64), axis=0))


@triton.jit
def _mean_kernel(sums_ptr, loss_ptr, count, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(sums_ptr + i, mask=i < count, other=0.0), axis=0)
    tl.store(loss_ptr, (total / n).to(tl.float32))


def _blocks(channels: int, pixels: int, tile: int = TILE) -> dict[str, int]:
    block_p = power_of_2(pixels, PIXELS)
    return {"BLOCK_C": power_of_2(channels, tile // block_p), "BLOCK_P": block_p}


def _check(shape: tuple[int, ...], height: int, width: int) -> None:
    """What is counted in 32 bits: channels, pixels, and in ``_window`` a side times what it is pooled to."""
    _, c, h, w = shape
    check_count("hint_loss: feature maps", c, "channels")
    check_count("hint_loss: feature maps", h * w, "pixels")
    if (height, width) != (h, w) and max(h * (height + 1), w * (width + 1)) >= 1 << 31:
        raise ValueError(
            f"hint_loss: Triton cannot pool [{h}, {w}] to [{height}, {width}]: a side times the pooled one must be below 2^31"
        )


@kept
def _norms(shape: tuple[int, ...], strides: tuple[int, ...], same: bool) -> Launch:
    n, c, h, w = shape
    _check(shape, h, w)
    blocks = _blocks(c, h * w)
    down, along, flat = plane_strides((h, w), strides[2:])
    return Launch(
        _norms_kernel,
        (n * triton.cdiv(h * w, blocks["BLOCK_P"]),),
        channels=c,
        pixels=h * w,
        width=w,
        x_example=strides[0],
        x_channel=strides[1],
        down=down,
        along=along,
        WRITE=same,
        FLAT=flat,
        ALIGN=alignment(h * w),
        X_ALIGN=alignment(*strides[:2]),
        **blocks,
        **OPTIONS,
    )


@kept
def _pool(shape: tuple[int, ...], strides: tuple[int, ...], height: int, width: int, normalize: bool) -> Launch:
    n, c, h, w = shape
    _check(shape, height, width)
    # The longest window: one more than the quotient, rounded up, where windows do not divide the map evenly.
    window = [-(-i // o) + (i % o != 0) for i, o in ((h, height), (w, width))]
    block_k = power_of_2(window[0] * window[1], TILE)
    block_o = power_of_2(height * width, min(TILE // block_k, 64))
    block_c = power_of_2(c, TILE // (block_k * block_o))
    return Launch(
        _pool_kernel,
        (n * triton.cdiv(c, block_c) * triton.cdiv(height * width, block_o),),
        channels=c,
        height=h,
        width=w,
        out_height=height,
        out_width=width,
        window_height=window[0],
        window_width=window[1],
        x_example=strides[0],
        x_channel=strides[1],
        down=strides[2],
        along=strides[3],
        NORMALIZE=normalize,
        BLOCK_C=block_c,
        BLOCK_O=block_o,
        BLOCK_K=block_k,
        **OPTIONS,
    )


@kept
def _pool_backward(
    shape: tuple[int, ...], strides: tuple[int, ...], height: int, width: int, normalize: bool
) -> Launch:
    n, c, h, w = shape
    _check(shape, height, width)
    same = (height, width) == (h, w)
    blocks = _blocks(c, h * w, TILE if same else TILE // 2)
    down, along, flat = plane_strides((h, w), strides[2:])
    return Launch(
        _pool_backward_kernel,
        (n * triton.cdiv(h * w, blocks["BLOCK_P"]),),
        channels=c,
        height=h,
        width=w,
        out_height=height,
        out_width=width,
        x_example=strides[0],
        x_channel=strides[1],
        down=down,
        along=along,
        NORMALIZE=normalize,
        SAME=same,
        FLAT=flat,
        ALIGN=alignment(h * w),
        X_ALIGN=alignment(*strides[:2]),
        ROWS=1 + (h % height > 0),
        COLUMNS=1 + (w % width > 0),
        **blocks,
        **OPTIONS,
    )


@kept
def _error(n: int, need_grad: bool) -> tuple[int, Launch, Launch]:
    """Programs of the error, its launch, and that of the mean."""
    run = triton.cdiv(n, RUN * RUNS) * RUN
    programs = triton.cdiv(n, run)
    numbers = dict(n=n, run=run, scale=2 / n, NEED_GRAD=need_grad, ALIGN=alignment(n), BLOCK=RUN)
    error = Launch(_error_kernel, (programs,), **numbers, num_warps=8, **OPTIONS)
    return programs, error, Launch(_mean_kernel, (1,), count=programs, n=n, BLOCK=RUNS, **OPTIONS)


def hint_pool_fwd(feature_map: Tensor, height: int, width: int, normalize: bool) -> tuple[Tensor, Tensor]:
    shape, strides = feature_map.shape, feature_map.stride()
    n, c, h, w = shape
    pooled = feature_map.new_empty(n, c, height, width, dtype=torch.float32)
    norms = pooled.new_empty((n, h, w) if normalize else 0)
    same = (height, width) == (h, w)
    if n and normalize:
        _norms(shape, strides, same)(feature_map, norms, pooled)
    if n and not (normalize and same):
        _pool(shape, strides, height, width, normalize)(feature_map, norms, pooled)
    return pooled, norms


def hint_pool_bwd(grad: Tensor, feature_map: Tensor, norms: Tensor, normalize: bool) -> Tensor:
    out = torch.empty_like(feature_map, memory_format=torch.contiguous_format)
    if feature_map.shape[0]:
        launch = _pool_backward(feature_map.shape, feature_map.stride(), grad.shape[2], grad.shape[3], normalize)
        launch(grad.contiguous(), feature_map, norms, out)
    return out


def hint_mse_fwd(prediction: Tensor, target: Tensor, need_grad: bool) -> tuple[Tensor, Tensor]:
    n = prediction.numel()
    loss = prediction.new_empty((), dtype=torch.float32)
    grad = loss.new_empty(prediction.shape if need_grad else 0)
    if n == 0:
        return loss.zero_(), grad
    programs, error, mean = _error(n, need_grad)
    sums = prediction.new_empty(programs, dtype=torch.float64)
    error(prediction.contiguous(), target.contiguous(), sums, grad)
    mean(sums, loss)
    return loss, grad
