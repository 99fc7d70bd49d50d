#!/usr/bin/env bash
# torchdistill: with alpha=0 KDLoss drops the weight of the KL and the square of the temperature, too.
#
# Packages: torchdistill 1.1.5, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   KDLoss is documented as alpha CE + (1 - alpha) T^2 KL, or beta T^2 KL with a beta of one's own. For alpha > 0 it is, also where alpha is
#   tiny. With alpha=0, which is how distillation without labels is written, it is the bare KL: beta is not used, and there is no T^2. At
#   T = 4 the loss and its gradient are 16 times as small as at alpha = 1e-6, and with beta=9 144 times. Without targets the same, for
#   alpha > 0 too. Nothing warns. LogitStdKDLoss does the same.
#   So a sweep over alpha ends in a point with another learning rate. Right is a KDLoss of alpha > 0, or the factor beta T^2 around it.
# Printed: for each loss, the gradient's norm over that of T^2 KL, for alpha = 1e-6, for alpha = 0, and for alpha = 0.5 without targets.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy pyyaml scipy cython
"$folder/venv/bin/pip" install -q --no-deps torchdistill==1.1.5
cd "$folder"
cat > see.py <<'PY'
import torch
import torch.nn.functional as F
from torchdistill.losses.mid_level import KDLoss, LogitStdKDLoss

T = 4.0
torch.manual_seed(0)
student, teacher, labels = torch.randn(8, 5, requires_grad=True), torch.randn(8, 5), torch.randint(0, 5, (8,))


def standard(x):
    return (x - x.mean(-1, keepdim=True)) / (1e-7 + x.std(-1, keepdim=True))


def norm(loss):
    return torch.autograd.grad(loss, student)[0].norm().item()


for kind, change in ((KDLoss, lambda x: x), (LogitStdKDLoss, standard)):
    s, t = (change(x) / T for x in (student, teacher))
    whole = norm(T**2 * F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean"))
    for beta in (None, 9.0):
        seen = []
        for alpha, targets in ((1e-6, labels), (0.0, labels), (0.5, None), (1e-6, None), (1.0, None)):
            loss = kind(".", "output", ".", "output", temperature=T, alpha=alpha, beta=beta)
            seen.append(norm(loss({".": {"output": student}}, {".": {"output": teacher}}, targets)) / whole)
        print(f"{kind.__name__}, beta={beta}: alpha=1e-6 {seen[0]:.4f}, alpha=0 {seen[1]:.4f}, no targets {seen[2]:.4f}")
        assert abs(seen[0] - (beta or 1)) < 1e-3, "behavior has changed"
        assert abs(seen[1] - 1 / T**2) < 1e-6 and max(abs(x - 1 / T**2) for x in seen[2:]) < 1e-6, "behavior has changed"
PY
venv/bin/python see.py
