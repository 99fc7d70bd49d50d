#!/usr/bin/env bash
# Liger: the soft and the hard loss that the fused distillation losses return have a gradient of zero.
#
# Packages: liger-kernel 0.8.5, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   LigerFusedLinearJSDLoss and LigerFusedLinearCosineSimilarityLoss with return_soft_hard_loss=True return the loss and its two parts. Each
#   of the parts has requires_grad and a grad_fn, and backward() of it succeeds. The gradients that it gives to the student's hidden
#   states and output layer are all 0: not None, not an error. So a sum of the parts with weights of one's own (a schedule, an
#   adaptive weight) has the right value and trains nothing. The loss itself has its gradient.
# Printed: for each loss, the value and the gradient's norm of the loss and of the same loss summed from its parts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 liger-kernel==0.8.5 numpy
cd "$folder"
cat > see.py <<'PY'
import torch
from liger_kernel.chunked_loss import LigerFusedLinearCosineSimilarityLoss, LigerFusedLinearJSDLoss

for kind in (LigerFusedLinearJSDLoss, LigerFusedLinearCosineSimilarityLoss):
    seen = {}
    for name in ("the loss", "its parts"):
        torch.manual_seed(0)
        student = [torch.randn(rows, 5, requires_grad=True) for rows in (8, 7)]  # hidden states, output layer
        teacher = [torch.randn(rows, 6) for rows in (8, 7)]
        labels = torch.randint(7, (8,))
        compute = kind(weight_hard_loss=0.5, weight_soft_loss=0.5, compiled=False, return_soft_hard_loss=True)
        loss, soft, hard = compute(*student, *teacher, labels)
        if name == "its parts":
            assert all(part.requires_grad and part.grad_fn is not None for part in (soft, hard)), "behavior has changed"
            loss = 0.5 * soft + 0.5 * hard
        loss.backward()
        norms = [part.grad.norm().item() for part in student]
        print(f"{kind.__name__}, {name}: {loss.item():.4f}, gradients {norms[0]:.4f} {norms[1]:.4f}")
        seen[name] = loss.item(), min(norms), max(norms)
    assert abs(seen["the loss"][0] - seen["its parts"][0]) < 1e-5, "behavior has changed"
    assert seen["the loss"][1] > 0.1 and seen["its parts"][2] == 0.0, "behavior has changed"
PY
venv/bin/python -W ignore see.py
