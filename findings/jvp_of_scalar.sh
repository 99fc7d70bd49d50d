#!/usr/bin/env bash
# Forward-mode AD: the tangent of (0-d tensor) * (Python float) is float64 though the value is float32.
#
# Package: torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   For y = x.sum() * 0.7 with x in float32, torch.func.jvp gives y in float32 and its tangent in float64. x.sum() / 3.0 and
#   torch.addcmul with a float `value` do the same. With an int (x.sum() * 3), with a tensor of one dimension or more, and with
#   torch.add(a, b, alpha=0.7) the tangent keeps the dtype of the value.
#   So a loss that is a weighted sum of scalar terms, as distillation losses are, leaves float32 in forward mode.
# Printed: one line per expression with the two dtypes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
cat > see.py <<'PY'
import torch

EXPRESSIONS = {
    "x.sum() * 0.7": (lambda x: x.sum() * 0.7, torch.float64),
    "x.sum() / 3.0": (lambda x: x.sum() / 3.0, torch.float64),
    "torch.addcmul(x.sum(), x.sum(), one, value=0.7)": (
        lambda x: torch.addcmul(x.sum(), x.sum(), x.new_ones(()), value=0.7), torch.float64
    ),
    "x.sum() * 3": (lambda x: x.sum() * 3, torch.float32),
    "x.sum(0) * 0.7": (lambda x: x.sum(0) * 0.7, torch.float32),
    "torch.add(x.sum(), x.sum(), alpha=0.7)": (lambda x: torch.add(x.sum(), x.sum(), alpha=0.7), torch.float32),
}
x = torch.arange(6.0).view(2, 3)
for text, (f, expected) in EXPRESSIONS.items():
    value, tangent = torch.func.jvp(f, (x,), (torch.ones_like(x),))
    print(f"{text}: value {value.dtype}, tangent {tangent.dtype}")
    assert value.dtype == torch.float32 and tangent.dtype == expected, "behavior has changed"
PY
venv/bin/python -W ignore see.py
