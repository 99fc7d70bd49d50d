#!/usr/bin/env bash
# TextBrewer: a mask that hides nothing changes its attention and similarity losses.
#
# Packages: textbrewer 0.2.1.post1, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   Without a mask, the default, the four losses of attention take every score at or below -0.001 as masked: att_mse sets it to 0, on both
#   sides, and the student gets no gradient there; att_ce takes the teacher's probability there as 0. Scores are those before the softmax
#   (att_ce applies it), so that about half of them are below. With a mask of ones all of them count. The documentation speaks of the mask alone.
#   mmd_loss divides the similarities by the hidden size without a mask, and by the length with one: the loss with a mask of ones is (hidden /
#   length)^2 times as large. The other losses of hidden states are the same with both.
#   Right is a mask for every loss of attention, also where no text is padded, and a weight of mmd_loss that is chosen with the mask in use.
# Printed: each loss without a mask and with a mask of ones, and the share of scores that att_mse gives no gradient.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy tqdm tensorboard
"$folder/venv/bin/pip" install -q --no-deps textbrewer==0.2.1.post1
cd "$folder"
cat > see.py <<'PY'
import torch
import torch.nn.functional as F
from textbrewer import losses

torch.manual_seed(0)
batch, heads, length, hidden = 2, 3, 8, 32
scores = [torch.randn(batch, heads, length, length) for _ in range(2)]
states = [torch.randn(batch, length, hidden) for _ in range(2)]
ones = torch.ones(batch, length)
ratios = {}
for name in ("att_mse", "att_mse_sum", "att_ce", "att_ce_mean", "hid_mse", "cos", "pkd", "fsp", "mmd"):
    loss = getattr(losses, name + "_loss")
    student, teacher = scores if name.startswith("att") else states
    if name in ("fsp", "mmd"):
        student, teacher = [student, student], [teacher, teacher]
    without, with_ones = loss(student, teacher).item(), loss(student, teacher, ones).item()
    ratios[name] = with_ones / without
    print(f"{name}: {without:.4f} without a mask, {with_ones:.4f} with a mask of ones")
def hidden_ones(x, scores):
    return torch.where(scores <= -1e-3, 0.0, x)


scores[0][0, 0, 0, :3] = torch.tensor([-0.0011, -0.001, -0.0009])
for name, loss in (("mse", losses.att_mse_loss), ("mse_sum", losses.att_mse_sum_loss)):
    s, t = scores if name == "mse" else (x.sum(1) for x in scores)
    assert torch.isclose(loss(*scores), F.mse_loss(hidden_ones(s, s), hidden_ones(t, t))), "behavior has changed"
for name, loss in (("ce", losses.att_ce_loss), ("ce_mean", losses.att_ce_mean_loss)):
    s, t = scores if name == "ce" else (x.mean(1) for x in scores)
    expected = -(hidden_ones(t.softmax(-1), t) * s.log_softmax(-1)).sum(-1).mean()
    assert torch.isclose(loss(*scores), expected), "behavior has changed"
idle = []
for mask in (None, ones):
    student = scores[0].clone().requires_grad_()
    losses.att_mse_loss(student, scores[1], mask).backward()
    if mask is None:
        assert torch.equal(student.grad == 0, student <= -1e-3), "behavior has changed"
    idle.append((student.grad == 0).float().mean().item())
print(f"att_mse, scores without a gradient: {idle[0]:.0%} without a mask, {idle[1]:.0%} with a mask of ones")
for name in ("hid_mse", "cos", "pkd", "fsp"):
    assert abs(ratios[name] - 1) < 1e-4, "behavior has changed"
assert min(ratios[name] for name in ratios if name.startswith("att")) > 1.1, "behavior has changed"
assert abs(ratios["mmd"] - (hidden / length) ** 2) < 1e-3, "behavior has changed"
assert 0.4 < idle[0] < 0.6 and idle[1] == 0, "behavior has changed"
PY
venv/bin/python see.py
