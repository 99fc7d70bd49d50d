#!/usr/bin/env bash
# torch.distributed.checkpoint: an optimizer with an empty group of parameters is read, and not loaded, unless that group is the last.
#
# Packages: torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   A group without parameters is valid for an optimizer: it is what is left of a group whose part of the model is frozen or shared.
#   get_optimizer_state_dict returns it with the others. set_optimizer_state_dict of this same state into this same optimizer ends in
#   KeyError: 'lr', after it has reset the optimizer. If the empty group comes last, all is loaded, the empty group's options too.
#   With flatten_optimizer_state_dict=True the empty group is left out. optimizer.load_state_dict takes it in every place.
# Printed: what becomes of a state that is read and loaded again, for each place of the empty group.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
cat > see.py <<'PY'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

for place in range(3):
    student = torch.nn.Linear(3, 2)
    groups = [{"params": [student.weight], "lr": 0.1}, {"params": [student.bias], "lr": 0.2}]
    groups.insert(place, {"params": [], "lr": 0.3})
    optimizer = torch.optim.AdamW(groups)
    student(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(optimizer.state_dict())
    state = get_optimizer_state_dict(student, optimizer)
    assert [group["lr"] for group in state["param_groups"]] == rates, "behavior has changed"
    try:
        set_optimizer_state_dict(student, optimizer, state)
        seen = "loaded"
        assert [group["lr"] for group in optimizer.param_groups] == rates, "behavior has changed"
    except KeyError as error:
        seen = f"KeyError: {error}"
    print(f"empty group in place {place}: {seen}")
    assert seen == ("loaded" if place == 2 else "KeyError: 'lr'"), "behavior has changed"
PY
venv/bin/python -W ignore see.py
