#!/usr/bin/env bash
# torch: AdamW of bfloat16 parameters never forgets a large gradient: its steps stay small for good.
#
# Packages: torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   The mean of squared gradients has the parameters' dtype. Each step multiplies it by beta2, 0.999, which takes off less than half of bfloat16's last
#   digit, so that it is rounded back: it can grow, and never gets smaller. A first gradient of 100, as a distillation's loss makes it before
#   the student's logits have the teacher's scale, is followed by 10000 of 0.1. In float32 it is forgotten: a step is 0.04 of the learning rate after
#   1000 of them, 0.36 after 5000 and 0.98 at the end. In bfloat16 the mean stays at 10, and a step at 0.03, for good. So it is with foreach,
#   fused and neither, and for Adam and RMSprop (alpha=0.999). Nothing warns, and the loss falls slowly.
#   With beta2 = 0.998 it is the same; with 0.99 the mean comes down to 0.018 where it should be 0.010.
#   Right are parameters in float32 under torch.autocast, or a float32 copy of them for the optimizer.
# Printed: for each optimizer, dtype and beta2, the size of a step over the learning rate, after 1000, 5000 and 10000 steps, and the mean of
#   squared gradients at the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
cat > see.py <<'PY'
import torch

torch.set_num_threads(1)
RATE, STEPS = 1e-3, 10000


def run(make, mean, dtype):
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=dtype))
    optimizer = make([parameter])
    sizes = []
    for step in range(STEPS + 1):
        parameter.grad = torch.full_like(parameter, 0.1 if step else 100.0)
        with torch.no_grad():
            parameter.zero_()
        optimizer.step()
        if step in (1000, 5000, STEPS):
            sizes.append(abs(parameter.item()) / RATE)
    return *sizes, optimizer.state[parameter][mean].item()


def adam(beta2, kind=torch.optim.AdamW, **options):
    return lambda parameters: kind(parameters, lr=RATE, betas=(0.9, beta2), **options)


def rmsprop(parameters):
    return torch.optim.RMSprop(parameters, lr=RATE, alpha=0.999)


cases = {
    "AdamW": adam(0.999, foreach=False),
    "AdamW, foreach": adam(0.999, foreach=True),
    "AdamW, fused": adam(0.999, fused=True),
    "Adam": adam(0.999, torch.optim.Adam),
    "RMSprop": rmsprop,
    "AdamW, beta2 0.998": adam(0.998),
    "AdamW, beta2 0.99": adam(0.99),
}
for name, make in cases.items():
    mean = "square_avg" if name == "RMSprop" else "exp_avg_sq"
    seen = {dtype: run(make, mean, dtype) for dtype in (torch.float32, torch.bfloat16)}
    for dtype, numbers in seen.items():
        print("{}, {}: steps of {:.3f}, {:.3f}, {:.3f}; mean {:.4f}".format(name, dtype, *numbers), flush=True)
    right, rounded = seen.values()
    assert 0.95 < right[2] < 1.01 and right[3] < 0.0105, "behavior has changed"
    if name == "AdamW, beta2 0.99":
        assert 0.7 < rounded[2] < 0.8 and 0.017 < rounded[3] < 0.02, "behavior has changed"
    else:
        assert max(rounded[:3]) < 0.04 and rounded[3] >= 10, "behavior has changed"
PY
venv/bin/python -W ignore see.py
