#!/usr/bin/env bash
# torch.distributed.checkpoint: to read an optimizer's state before its first step makes a step, and training goes on differently.
#
# Packages: torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   get_optimizer_state_dict (and get_state_dict) of an optimizer without state calls step() with gradients and learning rates of 0, so
#   that there is a state to return. Parameters stay, but the state stays, too: AdamW counts one step. Its first real step is then
#   corrected as if it were the second, and moves each parameter by 0.74 of the learning rate where it would have moved it by 1. Rprop
#   begins with a step size near 0 instead of the learning rate, and ASGD's first step moves nothing. So a run that writes a checkpoint
#   before its first step, or a test that compares states, trains otherwise than one that does not.
#   optimizer.state_dict() changes nothing.
# Printed: for each optimizer, how far the first step moves a parameter, without and with reading the state before.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
cat > see.py <<'PY'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

KINDS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}
seen = {}
for name, make in KINDS.items():
    moved = []
    for read in ("nothing", "optimizer.state_dict", "get_optimizer_state_dict"):
        torch.manual_seed(0)
        student = torch.nn.Linear(3, 2)
        optimizer = make(student.parameters())
        before = student.weight.detach().clone()
        if read == "optimizer.state_dict":
            optimizer.state_dict()
        elif read == "get_optimizer_state_dict":
            get_optimizer_state_dict(student, optimizer)
        assert torch.equal(student.weight, before)
        student(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        moved.append((student.weight - before).abs().max().item())
    print(f"{name}: {moved[0]:.6f}, {moved[2]:.6f} after reading the state")
    assert moved[0] == moved[1], "behavior has changed"
    seen[name] = moved[2] / moved[0]
assert 0.73 < seen["AdamW"] < 0.76, "behavior has changed"
assert seen["Rprop"] < 1e-3 and seen["ASGD"] == 0, "behavior has changed"
assert seen["SGD"] == 1, "behavior has changed"
PY
venv/bin/python -W ignore see.py
