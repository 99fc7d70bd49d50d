#!/usr/bin/env bash
# accelerate: an environment variable beats an explicit gradient_accumulation_steps, but not an explicit mixed_precision.
#
# Packages: accelerate 1.15.0, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   With ACCELERATE_GRADIENT_ACCUMULATION_STEPS=3 set, Accelerator(gradient_accumulation_steps=1) silently accumulates 3 steps.
#   With ACCELERATE_MIXED_PRECISION=bf16 set, Accelerator(mixed_precision="no") computes without mixed precision: there the
#   argument wins.
# Printed: "gradient_accumulation_steps=1 gives 3" and "mixed_precision='no' gives no".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy accelerate==1.15.0
cd "$folder"
cat > see.py <<'PY'
from accelerate import Accelerator

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=1, mixed_precision="no")
steps, precision = accelerator.gradient_accumulation_steps, accelerator.mixed_precision
print(f"gradient_accumulation_steps=1 gives {steps}")
print(f"mixed_precision='no' gives {precision}")
assert (steps, precision) == (3, "no"), "behavior has changed"
PY
ACCELERATE_GRADIENT_ACCUMULATION_STEPS=3 ACCELERATE_MIXED_PRECISION=bf16 venv/bin/python -W ignore see.py
