#!/usr/bin/env bash
# transformers: the last learning rate of a schedule is right only for groups whose rate is the optimizer's default one.
#
# Packages: transformers 5.24.0, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   lr_end (polynomial decay) and min_lr (cosine) are documented as the rate that is reached at the end. They are made factors by a
#   division by optimizer.defaults["lr"], and each group multiplies its own rate by them. So of a backbone at 1e-5 and a head at 1e-3, with lr_end=1e-6,
#   one ends too low or the other too high, by the ratio of the two: AdamW(groups, lr=1e-3) ends at 1e-8 and 1e-6, AdamW(groups, lr=1e-5) at 1e-6
#   and 1e-4. If all groups have rates of their own, the default is AdamW's 1e-3, which nothing uses: a single group at 1e-5 then ends
#   at 1e-8. Nothing warns.
#   torch's CosineAnnealingLR with eta_min=1e-6 ends at 1e-6 for each group.
# Printed: for each schedule and default rate, the last rates of the two groups; and of the single group.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0
cd "$folder"
cat > see.py <<'PY'
import math

import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup as cosine
from transformers import get_polynomial_decay_schedule_with_warmup as polynomial

STEPS, LAST = 100, 1e-6
schedules = {
    "polynomial, lr_end": lambda optimizer: polynomial(optimizer, 10, STEPS, lr_end=LAST),
    "cosine, min_lr": lambda optimizer: cosine(optimizer, 10, STEPS, min_lr=LAST),
    "torch, eta_min": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=LAST),
}


def end(make, rates, **default):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    optimizer = torch.optim.AdamW(groups, **default)
    schedule = make(optimizer)
    for _ in range(STEPS):
        optimizer.step()
        schedule.step()
    return schedule.get_last_lr()


for name, make in schedules.items():
    seen = end(make, (1e-5, 1e-3), lr=1e-3), end(make, (1e-5, 1e-3), lr=1e-5), end(make, (1e-5,)), end(make, (1e-5,), lr=1e-5)
    print("{}: default 1e-3 {:.2g} and {:.2g}; default 1e-5 {:.2g} and {:.2g}".format(name, *seen[0], *seen[1]), end="; ")
    print("a single group of 1e-5 {:.2g}; with that default {:.2g}".format(*seen[2], *seen[3]))
    wants = ((1e-8, 1e-6), (1e-6, 1e-4), (1e-8,), (1e-6,)) if name[0] != "t" else ((LAST, LAST), (LAST, LAST), (LAST,), (LAST,))
    for got, want in zip(seen, wants):
        assert len(got) == len(want) and all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(got, want)), "behavior has changed"
PY
HF_HUB_OFFLINE=1 venv/bin/python -W ignore see.py
