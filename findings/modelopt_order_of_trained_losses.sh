#!/usr/bin/env bash
# nvidia-modelopt: losses with parameters are numbered anew in every process, so a checkpoint gives them to other layers.
#
# Packages: nvidia-modelopt 0.47.0, transformers 5.24.0, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   mtd.convert takes a dictionary from pairs of layers to losses. The losses that have parameters (MGDLoss has a small network) go into
#   an nn.ModuleList by way of a Python set, whose order is that of memory addresses. In processes that run the same lines, the same
#   pair's loss is _loss_modules.0 here and _loss_modules.3 there.
#   load_state_dict(strict=True) of a checkpoint that another process wrote succeeds where their shapes agree, and gives a pair of
#   layers the trained network of another pair. Nothing warns. The student itself loads right.
# Printed: for each process, the number in _loss_modules of each of 8 pairs, and for each pair the one whose weights it has loaded.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 nvidia-modelopt==0.47.0 transformers==5.24.0 requests==2.34.2 numpy
cd "$folder"
cat > run.py <<'PY'
import json
import sys
import warnings

import modelopt.torch.distill as mtd
import torch
from torch import nn


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(8)))

    def forward(self, image):
        return self.layers(image)


student = Network()
losses = [mtd.MGDLoss(3, 3) for _ in range(8)]
criterion = {(f"layers.{i}", f"layers.{i}"): loss for i, loss in enumerate(losses)}
balancer = mtd.StaticLossBalancer([0.125] * 8)
model = mtd.convert(
    student, mode=[("kd_loss", {"teacher_model": Network(), "criterion": criterion, "loss_balancer": balancer})]
)
if sys.argv[1] == "save":
    with torch.no_grad():
        for i in range(8):
            for parameter in (*losses[i].parameters(), *student.layers[i].parameters()):
                parameter.fill_(i)  # what has been trained for pair i
    torch.save(model.state_dict(), "checkpoint.pt")
else:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        model.load_state_dict(torch.load("checkpoint.pt"), strict=True)
    assert not heard
numbers = [[loss is module for module in model.loss_modules].index(True) for loss in losses]
has = [int(loss.generation[0].weight[0, 0, 0, 0]) for loss in losses]
print(json.dumps([numbers, has, [int(layer.weight[0, 0, 0, 0]) for layer in student.layers]]))
PY
cat > see.py <<'PY'
import json
import subprocess
import sys

right, orders = list(range(8)), []
for number, what in enumerate(("save", "load", "load", "load")):
    printed = subprocess.run([sys.executable, "-W", "ignore", "run.py", what], stdout=subprocess.PIPE, text=True, check=True)
    numbers, has, layers = json.loads(printed.stdout.splitlines()[-1])
    print(f"process {number} ({what}): pairs are numbered {numbers}, have the weights of {has}")
    orders.append((numbers, has))
    assert layers == right, "behavior has changed"
saved = orders[0][0]
assert all(has == [saved.index(number) for number in numbers] for numbers, has in orders), "behavior has changed"
assert any(has != right for _, has in orders[1:]), "behavior has changed"
PY
HF_HUB_OFFLINE=1 venv/bin/python see.py
