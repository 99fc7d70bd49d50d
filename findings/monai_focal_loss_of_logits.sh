#!/usr/bin/env bash
# MONAI: AsymmetricUnifiedFocalLoss asks for logits and takes them for probabilities: most get no gradient.
#
# Packages: monai 1.6.1, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   Its documentation says that the input should be the original logits, since forward applies a sigmoid. forward applies none. It clamps its input
#   to 1e-7 and 1 - 1e-7, so that a logit below 0 or above 1 counts as a probability of 0 or 1, and has a gradient of 0. Nothing warns.
#   A pixel on the right side by a logit of 1, a probability of 0.73, has a loss of 0.0001; on the wrong side by 1 or by 6 the loss is the same,
#   2.20, and does not train. Of logits of a standard deviation of 3 it is 87 % that have no gradient, and training leaves 40 % of the pixels
#   wrong, of 50 %. Of the same logits after a sigmoid, which is what is right, all have one, and none is wrong in the end.
# Printed: the loss of pixels that are right or wrong by some logits, given as logits and after a sigmoid; for both, the share without a
#   gradient, and the share of pixels that are wrong before and after training.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/pip" install -q --no-deps monai==1.6.1
cd "$folder"
cat > see.py <<'PY'
import torch
from monai.losses import AsymmetricUnifiedFocalLoss

torch.set_num_threads(1)
torch.manual_seed(0)
loss = AsymmetricUnifiedFocalLoss()
assert "should be the original logits" in loss.forward.__doc__, "the documentation has changed"
labels = (torch.rand(2, 1, 32, 32) < 0.3).long()
start = 3 * torch.randn(2, 1, 32, 32)
sides = {}
for by in (1, 6, -1, -6):
    logits = (2.0 * labels - 1) * by
    sides[by] = loss(logits, labels).item(), loss(logits.sigmoid(), labels).item()
    print("right by {}: {:.4f} as logits, {:.4f} after a sigmoid".format(by, *sides[by]))
seen = {}
for name, change in (("logits", torch.clone), ("sigmoid", torch.sigmoid)):
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    shares = []
    for step in range(500):
        optimizer.zero_grad()
        loss(change(logits), labels).backward()
        if step == 0:
            idle = (logits.grad == 0).float().mean().item()
        optimizer.step()
    wrong = [((x > 0) != labels).float().mean().item() for x in (start, logits.detach())]
    seen[name] = idle, *wrong
    print("{}: without a gradient {:.0%}, wrong before {:.0%} and after {:.0%}".format(name, *seen[name]))
assert sides[1][0] < 1e-3 < sides[1][1] and abs(sides[-1][0] - sides[-6][0]) < 1e-6, "behavior has changed"
assert sides[-6][1] > 1.5 * sides[-1][1], "behavior has changed"
idle, _, after = seen["logits"]
assert 0.8 < idle < 0.95 and after > 0.3, "behavior has changed"
idle, before, after = seen["sigmoid"]
assert idle < 0.01 and after < 0.01 < before, "behavior has changed"
PY
venv/bin/python -W ignore see.py
