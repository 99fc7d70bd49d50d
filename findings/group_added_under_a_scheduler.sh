#!/usr/bin/env bash
# torch: a group of parameters that is added during LinearLR's warm-up ends with several times the learning rate that it was given.
#
# Packages: torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   optimizer.add_param_group is there for layers that join later, as a projector does, or blocks that are unfrozen one after the other.
#   Schedulers that already exist treat the new group differently. LinearLR multiplies each group's rate by the ratio of two factors, so it takes the
#   rate of 1 as one that has the steps until now behind it: a group that joins after one of ten steps of a warm-up from 0.1 ends at 5.3, and
#   one that joins when the warm-up is over stays at 1. CosineAnnealingLR and PolynomialLR do the same downwards and end at 0 for all.
#   StepLR and ExponentialLR lower it by the steps that are left. LambdaLR raises ValueError at its next step, SequentialLR at its next
#   milestone. OneCycleLR raises KeyError at its next step.
#   Right for LinearLR is to add the group with its rate times the first group's lr / initial_lr, and with its own initial_lr.
# Printed: for each scheduler the rates of both groups, whose given rate is 1, after ten steps, the second joined after one, or the error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
cat > see.py <<'PY'
import torch
from torch.optim import lr_scheduler as kinds


def rates(make, joins, scaled=False):
    first, second = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([first], lr=1.0)
    scheduler = make(optimizer)
    try:
        for step in range(10):
            if step == joins:
                group = optimizer.param_groups[0]
                rate = group["lr"] / group["initial_lr"] if scaled else 1.0
                optimizer.add_param_group({"params": [second], "lr": rate, "initial_lr": 1.0} if scaled else {"params": [second], "lr": rate})
            optimizer.step()
            scheduler.step()
    except (ValueError, KeyError) as error:
        return f"{type(error).__name__} at step {step + 1}"
    return [round(group["lr"], 3) for group in optimizer.param_groups]


def warm(optimizer, steps=10):
    return kinds.LinearLR(optimizer, 0.1, 1.0, steps)


print("LinearLR, joined at", {joins: rates(warm, joins) for joins in (1, 3, 6, 9)}, "scaled", rates(warm, 1, scaled=True))
print("LinearLR of 3 steps, joined at 6", rates(lambda o: warm(o, 3), 6))
assert rates(warm, 1) == [1.0, 5.263] and rates(warm, 6)[1] > 1.5, "behavior has changed"
assert rates(warm, 1, scaled=True) == [1.0, 1.0] and rates(lambda o: warm(o, 3), 6) == [1.0, 1.0], "behavior has changed"
others = {
    "CosineAnnealingLR": (lambda o: kinds.CosineAnnealingLR(o, 10), [0.0, 0.0]),
    "PolynomialLR": (lambda o: kinds.PolynomialLR(o, 10), [0.0, 0.0]),
    "ExponentialLR": (lambda o: kinds.ExponentialLR(o, 0.5), [0.001, 0.002]),
    "StepLR": (lambda o: kinds.StepLR(o, 2, 0.5), [0.031, 0.031]),
    "LambdaLR": (lambda o: kinds.LambdaLR(o, lambda step: 1 / (1 + step)), "ValueError at step 2"),
    "SequentialLR": (lambda o: kinds.SequentialLR(o, [warm(o, 3), kinds.CosineAnnealingLR(o, 7)], [3]), "ValueError at step 3"),
    "OneCycleLR": (lambda o: kinds.OneCycleLR(o, 1.0, total_steps=20), "KeyError at step 2"),
}
for name, (make, expected) in others.items():
    print(name, rates(make, 1))
    assert rates(make, 1) == expected, "behavior has changed"
PY
venv/bin/python see.py
