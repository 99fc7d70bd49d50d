#!/usr/bin/env bash
# lightning: Fabric's "bf16-mixed" rounds every floating input of a module to bfloat16, counts and targets, too; torch.autocast does not.
#
# Packages: lightning 2.6.1, accelerate 1.15.0, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   "Mixed" elsewhere means torch.autocast: what goes into a module keeps its dtype, and operators choose theirs. Fabric also casts all
#   floating tensors among the arguments of forward before it is called. A loss that is set up as a module (which DDP and FSDP ask for where it
#   has parameters) gets rounded predictions, targets and counts: a mean of squared differences of numbers near 300, which bfloat16 has in steps
#   of 2, comes out 1.3 times too large, in float32, without a warning, and a count of 1005 is 1004.
#   Under torch.autocast and under accelerate's mixed_precision="bf16" the same module gets float32 and gives the right number.
# Printed: for each, the result over the right one, and the dtypes that forward has seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy lightning==2.6.1 accelerate==1.15.0
cd "$folder"
cat > see.py <<'PY'
import warnings

import torch
import torch.nn as nn
from accelerate import Accelerator
from lightning import Fabric


class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))  # without a parameter DDP would refuse it

    def forward(self, predicted, target, count):
        self.seen = [str(t.dtype).removeprefix("torch.") for t in (predicted, target, count)]
        return (predicted - target + self.bias).square().sum() / count


torch.manual_seed(0)
given = torch.randn(1000) + 300, torch.randn(1000) + 300, torch.tensor(1005.0)
want = ((given[0] - given[1]).double().square().sum() / 1005).item()
seen = {}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name in ("32-true", "bf16-mixed"):
        module = Loss()
        seen[f"Fabric {name}"] = Fabric(accelerator="cpu", devices=1, precision=name).setup_module(module)(*given), module.seen
    module = Loss()
    with torch.autocast("cpu", torch.bfloat16):
        seen["torch.autocast"] = module(*given), module.seen
    module = Loss()
    seen["accelerate bf16"] = Accelerator(cpu=True, mixed_precision="bf16").prepare(module)(*given), module.seen
for name, (out, dtypes) in seen.items():
    print(f"{name}: {out.item() / want:.4f} of the right number, as {out.dtype}; forward saw {', '.join(dtypes)}")
assert not [w for w in caught if "bfloat16" in str(w.message)], "behavior has changed"
for name, (out, dtypes) in seen.items():
    if name == "Fabric bf16-mixed":
        assert dtypes == ["bfloat16"] * 3 and out.dtype == torch.float32 and out.item() / want > 1.2, "behavior has changed"
    else:
        assert dtypes == ["float32"] * 3 and abs(out.item() / want - 1) < 1e-3, "behavior has changed"
PY
venv/bin/python see.py
