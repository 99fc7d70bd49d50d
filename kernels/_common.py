"""What several kernels share: what the compiler may know about sizes, and where the pixels of a map lie."""

import math
import struct

import triton
import triton.language as tl

# Of a launch: products and sums are contracted to multiply-adds. The default differs between versions of Triton.
OPTIONS = {"enable_fp_fusion": True}


def check_count(argument: str, size: int, what: str) -> None:
    """Of what kernels go through in steps, in 32 bits: near 2^31 the next step would begin below 0, which a mask lets pass."""
    if size > 1 << 30:
        raise ValueError(f"{argument} must have at most 2^30 {what} for Triton, got {size}")


def alignment(*numbers: int) -> int:
    """The largest power of 2 up to 16 that divides all of them."""
    return math.gcd(16, *numbers)


def power_of_2(n: int, most: int) -> int:
    """The smallest power of 2 from n on, but not above ``most`` and not below 1."""
    return min(triton.next_power_of_2(max(n, 1)), max(most, 1))


def rate_of(temperature: float) -> float:
    """log2(e) / (2 tau) in float32, as a GPU is given it. Triton's interpreter would multiply float64 sums by the digits of a float64."""
    return struct.unpack("f", struct.pack("f", 0.5 * math.log2(math.e) / temperature))[0]


def plane_strides(shape: tuple, strides: tuple) -> tuple[int, int, bool]:
    """Strides of the rows and columns of a plane [H, W], and whether pixel p lies p columns from the first."""
    height, width = shape
    down, along = strides
    if width == 1:
        along = down
    return down, along, height == 1 or width == 1 or down == width * along


@triton.jit
def aligned(n, ALIGN: tl.constexpr):
    """n, which ALIGN divides: so the compiler learns it, and moves up to 16 bytes at a time."""
    return n // ALIGN * ALIGN


@triton.jit
def pixel_offset(p, width, down, along, FLAT: tl.constexpr):
    """Where pixel p of a plane lies."""
    if FLAT:
        offset = p.to(tl.int64) * along
    else:
        offset = (p // width).to(tl.int64) * down + (p % width).to(tl.int64) * along
    return offset
