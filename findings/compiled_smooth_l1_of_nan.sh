#!/usr/bin/env bash
# torch.compile: smooth_l1_loss has a gradient of 0 where student or teacher is NaN; without the compiler it is NaN.
#
# Packages: torch 2.13.0 (CPU build), and a C++ compiler. Seen there, and checked by this script:
#   A NaN in the student's or the teacher's features, or a class that both have masked by -inf, makes smooth_l1_loss NaN in both modes. In eager
#   mode its gradient there is NaN, so GradScaler skips the step, and a check of the gradients or of their norm finds it. Compiled by Inductor the
#   gradient there is 0, and right elsewhere: such checks pass, and training goes on, with a loss of NaN in its log. The backend "aot_eager",
#   with which one looks for the compiler's faults, has NaN again; "aot_eager_decomp_partition" has 0.
#   huber_loss, the same function for beta = 1, and mse_loss have NaN in both modes. l1_loss has 0 in both.
# Printed: for each loss, its value, and its gradient where the teacher is NaN and beside it, in eager mode and compiled.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
export TORCHINDUCTOR_CACHE_DIR="$folder/cache"
cat > see.py <<'PY'
import math

import torch
import torch.nn.functional as F

torch.set_num_threads(1)
losses = {"smooth_l1": F.smooth_l1_loss, "huber": F.huber_loss, "mse": F.mse_loss, "l1": F.l1_loss}
pairs = {
    "NaN in the teacher": ([1.0, 0.1], [0.0, math.nan]),
    "NaN in the student": ([1.0, math.nan], [0.0, 0.1]),
    "-inf in both": ([1.0, -math.inf], [0.0, -math.inf]),
}
seen = {}
for name, loss in losses.items():
    for backend in (None, "aot_eager", "aot_eager_decomp_partition", "inductor"):
        torch._dynamo.reset()
        run = torch.compile(loss, backend=backend, fullgraph=True) if backend else loss
        for kind, (student, teacher) in pairs.items():
            x = torch.tensor(student, requires_grad=True)
            value = run(x, torch.tensor(teacher))
            value.backward()
            assert math.isnan(value.item()) and x.grad[0] in (0.5, 1.0), "behavior has changed"
            seen[name, backend, kind] = x.grad[1].item()
        print(f"{name}, {backend or 'eager'}: loss {value.item()}, gradient {x.grad[1].item()}, beside it {x.grad[0].item()}")
for (name, backend, kind), gradient in seen.items():
    zero = name == "l1" or name == "smooth_l1" and backend in ("aot_eager_decomp_partition", "inductor")
    assert gradient == 0 if zero else math.isnan(gradient), "behavior has changed"
PY
venv/bin/python see.py
