#!/usr/bin/env bash
# Triton for NVIDIA GPUs: tl.exp2 flushes small results to 0, tl.exp does not; logarithms are 40 instructions, exponentials one.
#
# Package: triton 3.6.0 (compiled for compute capability 9.0 without a GPU). Seen there, and checked by this script in the PTX:
#   tl.exp2 of float32 becomes ex2.approx.ftz.f32: what is below the normal numbers (2^-126) is 0. tl.exp becomes a multiplication
#   and ex2.approx.f32 without ftz, which goes down to 2^-149. So exp2(x * log2(e)) in place of exp(x), as softmax kernels do it
#   to save the multiplication, also changes what becomes of small probabilities.
#   tl.log2 and tl.log use no lg2.approx: either is computed in about 40 instructions, where the two exponentials take one or two.
# Printed: of each function, the instructions of a kernel that loads, computes and stores, and its approximate ones.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q triton==3.6.0 setuptools
cd "$folder"
export TRITON_CACHE_DIR=$folder/cache
cat > see.py <<'PY'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def exp2(x, y):
    i = tl.arange(0, 32)
    tl.store(y + i, tl.exp2(tl.load(x + i)))


@triton.jit
def exp(x, y):
    i = tl.arange(0, 32)
    tl.store(y + i, tl.exp(tl.load(x + i)))


@triton.jit
def log2(x, y):
    i = tl.arange(0, 32)
    tl.store(y + i, tl.log2(tl.load(x + i)))


@triton.jit
def log(x, y):
    i = tl.arange(0, 32)
    tl.store(y + i, tl.log(tl.load(x + i)))


EXPECTED = {exp2: ["ex2.approx.ftz.f32"], exp: ["ex2.approx.f32"], log2: [], log: []}
length = {}
for function, expected in EXPECTED.items():
    source = ASTSource(function, {"x": "*fp32", "y": "*fp32"})
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    lines = [line.strip() for line in text.splitlines() if re.match(r"\s+[a-z@][\w.]*\.[\w.]*\s", line)]
    approximate = [line.split()[0] for line in lines if "approx" in line]
    length[function] = len(lines)
    print(f"tl.{function.__name__}: {len(lines)} instructions, approximate: {approximate}")
    assert approximate == expected, "behavior has changed"
assert min(length[log2], length[log]) > 30 + max(length[exp2], length[exp]), "behavior has changed"
PY
venv/bin/python -W ignore see.py
