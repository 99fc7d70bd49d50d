#!/usr/bin/env bash
# Triton's interpreter: a constexpr times a tensor, used without a name of its own, is a number in one release and an error in another.
#
# Packages: triton 3.8.0 and 3.9.0, torch 2.13.0 (on the CPU). Seen there, and checked by this script with one kernel:
#   x >= HALF * x, with HALF a tl.constexpr of the module: the compiler takes it in both releases (compiled for compute capability
#   9.0, no GPU needed). Under TRITON_INTERPRET=1 it runs in 3.9.0 and raises in 3.8.0, "cannot convert ... of type
#   triton.language.core.tensor to tensor": the product is a constexpr that holds a tensor.
#   x >= x * HALF, and y = HALF * x before x >= y, run in both. So a kernel that works on a GPU, and in the interpreter of the
#   newest release, may not run in the interpreter of the release that a torch brings.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy setuptools
cd "$folder"
export TRITON_CACHE_DIR=$folder/cache
cat > see.py <<'PY'
import os
import sys

import torch
import triton
import triton.language as tl

HALF: tl.constexpr = tl.constexpr(0.5)


@triton.jit
def constant_first(x, y):
    i = tl.arange(0, 8)
    a = tl.load(x + i)
    tl.store(y + i, (a >= HALF * a).to(tl.float32))


@triton.jit
def tensor_first(x, y):
    i = tl.arange(0, 8)
    a = tl.load(x + i)
    tl.store(y + i, (a >= a * HALF).to(tl.float32))


@triton.jit
def named(x, y):
    i = tl.arange(0, 8)
    a = tl.load(x + i)
    b = HALF * a
    tl.store(y + i, (a >= b).to(tl.float32))


def interpreted(kernel):
    x, y = torch.arange(8.0), torch.zeros(8)
    try:
        kernel[(1,)](x, y)
    except Exception as error:
        return f"raises {type(error).__name__}"
    return "runs" if y.tolist() == [1.0] * 8 else "is wrong"


def compiled(kernel):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    triton.compile(ASTSource(kernel, {"x": "*fp32", "y": "*fp32"}), target=GPUTarget("cuda", 90, 32))
    return "compiles"


do = interpreted if os.environ.get("TRITON_INTERPRET") == "1" else compiled
seen = [do(kernel) for kernel in (constant_first, tensor_first, named)]
print(triton.__version__, do.__name__, *seen, sep=", ")
assert seen == sys.argv[1].split(","), "behavior has changed"
PY
for version in 3.8.0 3.9.0; do
  "$folder/venv/bin/pip" install -q --no-deps "triton==$version"
  first=$([ "$version" = 3.8.0 ] && echo "raises InterpreterError" || echo runs)
  TRITON_INTERPRET=1 venv/bin/python -W ignore see.py "$first,runs,runs"
  venv/bin/python -W ignore see.py compiles,compiles,compiles
done
