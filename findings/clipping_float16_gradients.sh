#!/usr/bin/env bash
# torch: clip_grad_norm_ turns float16 gradients of a norm above 65504 into zeros, though each of them is finite.
#
# Packages: torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   The norm is kept in the gradients' dtype. Where it is above float16's largest number it is inf, the factor max_norm / inf is 0, and so are
#   all gradients afterwards, also those of float32 parameters in the same call. A million gradients of 70, as a scaled loss makes them, are
#   enough. The optimizer steps, by momentum and weight decay alone, and a loss that does not move is all that is seen. A gradient that really
#   is inf leaves NaN behind, which GradScaler and checks find; here there is nothing to find. error_if_nonfinite=True raises an error, which
#   speaks of a non-finite norm. The norm that is returned is inf.
#   bfloat16 has float32's range: there the same call clips to 1.
# Printed: for each dtype the norm returned, and the norm afterwards, of the gradients in that dtype and of a float32 one beside them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
cat > see.py <<'PY'
import torch
from torch.nn.utils import clip_grad_norm_

seen = {}
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    large, small = torch.nn.Parameter(torch.zeros(1_000_000, dtype=dtype)), torch.nn.Parameter(torch.zeros(4))
    large.grad, small.grad = torch.full_like(large, 70.0), torch.full_like(small, 7e4)
    norm = clip_grad_norm_([large, small], 1.0).item()
    seen[dtype] = norm, large.grad.double().norm().item(), small.grad.double().norm().item()
    print(f"{dtype}: returned {norm:g}, afterwards {seen[dtype][1]:.4f} and {seen[dtype][2]:.4f}")
assert seen[torch.float16] == (float("inf"), 0, 0), "behavior has changed"
for dtype in (torch.bfloat16, torch.float32):
    whole = (seen[dtype][1] ** 2 + seen[dtype][2] ** 2) ** 0.5
    assert abs(whole - 1) < 0.02 and seen[dtype][2] > 0.5, "behavior has changed"
infinite = torch.nn.Parameter(torch.zeros(3))
infinite.grad = torch.tensor([1.0, float("inf"), 1.0])
clip_grad_norm_([infinite], 1.0)
print("with a gradient that is inf:", infinite.grad.tolist())
assert infinite.grad.isnan().tolist() == [False, True, False], "behavior has changed"
try:
    large = torch.nn.Parameter(torch.zeros(1_000_000, dtype=torch.float16))
    large.grad = torch.full_like(large, 70.0)
    clip_grad_norm_([large], 1.0, error_if_nonfinite=True)
    raise AssertionError("behavior has changed")
except RuntimeError as error:
    print("error_if_nonfinite:", str(error)[:60])
PY
venv/bin/python see.py
