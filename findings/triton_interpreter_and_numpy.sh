#!/usr/bin/env bash
# Triton 3.6's interpreter needs NumPy below 2.4, and nothing says so: a loop over a kernel's integer argument raises.
#
# Packages: triton 3.6.0 and 3.9.0, numpy 2.3.5 and 2.4.6, torch 2.13.0 (on the CPU). Seen there, and checked by this script:
#   for i in range(n), where n is an argument of the kernel, under TRITON_INTERPRET=1. Triton 3.6.0 runs it with NumPy 2.3.5 and
#   raises with 2.4.6, "only 0-dimensional arrays can be converted to Python scalars": it makes an int of an array of one element,
#   which NumPy 2.4 no longer does. Triton 3.9.0 runs it with both.
# torch 2.11 brings Triton 3.6 and any NumPy, so tests that interpret kernels there have to ask for numpy<2.4 themselves.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 setuptools
cd "$folder"
cat > see.py <<'PY'
import sys

import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def add_up(x, y, n):
    total = 0.0
    for i in range(n):
        total += tl.load(x + i)
    tl.store(y, total)


x, y = torch.arange(4.0), torch.zeros(1)
try:
    add_up[(1,)](x, y, 4)
    seen = "runs" if y.item() == 6 else "is wrong"
except Exception as error:
    seen = "raises" if "only 0-dimensional arrays" in str(error) else f"raises {error}"
print(f"triton {triton.__version__}, numpy {numpy.__version__}: {seen}")
assert seen == sys.argv[1], "behavior has changed"
PY
for versions in "3.6.0 2.3.5 runs" "3.6.0 2.4.6 raises" "3.9.0 2.3.5 runs" "3.9.0 2.4.6 runs"; do
  read -r triton numpy expected <<< "$versions"
  "$folder/venv/bin/pip" install -q --no-deps "triton==$triton" "numpy==$numpy"
  TRITON_INTERPRET=1 venv/bin/python -W ignore see.py "$expected"
done
