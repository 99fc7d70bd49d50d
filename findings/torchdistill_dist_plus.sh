#!/usr/bin/env bash
# torchdistill: the channel term of DISTPlusLoss rewards features that are the opposite of the teacher's.
#
# Packages: torchdistill 1.1.5, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   DISTPlusLoss adds four terms. Three of them are 1 minus a correlation with the teacher, so that minimizing brings the student near. The
#   fourth, of channels, is the correlation itself: 1 for a student with the teacher's features, -1 for their negative, and near 0 for random ones.
#   Trained by it, a student ends at a correlation of -1. With the default weights it cancels the term of space for these two: a copy of the
#   teacher and its negative have the same loss, 1.
#   Right is a negative iota, which gives the gradient of 1 - correlation.
# Printed: the terms of features for three students; each term alone beside correlations by torch.corrcoef; and the
#   correlation of channels after 300 steps, with iota=1 and with iota=-1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy pyyaml scipy cython
"$folder/venv/bin/pip" install -q --no-deps torchdistill==1.1.5
cd "$folder"
cat > see.py <<'PY'
import torch
from torchdistill.losses.mid_level import DISTPlusLoss

torch.set_num_threads(1)
torch.manual_seed(0)
logits, answers, teacher, other = torch.randn(4, 10), torch.randn(4, 10), torch.randn(4, 16, 3, 3), torch.randn(4, 16, 3, 3)
paths = ("head", "output") * 2 + ("body", "output") * 2


def value(features, student=logits, **weights):
    loss = DISTPlusLoss(*paths, **weights)
    return loss({"head": {"output": student}, "body": {"output": features}}, {"head": {"output": logits}, "body": {"output": teacher}})


def correlation(a, b):
    return sum(torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b)).item() / len(a)


def trained(iota):
    features = other.clone().requires_grad_()
    optimizer = torch.optim.Adam([features], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        value(features, beta=0.0, gamma=0.0, iota=iota, kappa=0.0).backward()
        optimizer.step()
    a, b = (x.detach() - x.detach().mean(1, keepdim=True) for x in (features, teacher))
    return torch.cosine_similarity(a, b, dim=1).mean().item()


seen = {}
for name, features in {"a copy of the teacher": teacher, "its negative": -teacher, "random": other}.items():
    seen[name] = [value(features, iota=i, kappa=k).item() for i, k in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))]
    print(name + ": channels {:.4f}, space {:.4f}, both {:.4f}".format(*seen[name]))
ends = [trained(iota) for iota in (1.0, -1.0)]
print("correlation with the teacher after training: iota=1 {:.4f}, iota=-1 {:.4f}".format(*ends))
p, q = answers.softmax(1), logits.softmax(1)
sums = [x.sum(1).flatten(1).T for x in (other, teacher)]
pixels = [x.movedim(1, -1).flatten(0, 2) for x in (other, teacher)]
terms = {
    "beta": 1 - correlation(p, q),
    "gamma": 1 - correlation(p.T, q.T),
    "kappa": 1 - correlation(*sums),
    "iota": correlation(*pixels),
}
for name, expected in terms.items():
    got = value(other, answers, **{**dict.fromkeys(terms, 0.0), name: 1.0}).item()
    print(f"{name}: {got:.4f}, by torch.corrcoef {expected:.4f}")
    assert abs(got - expected) < 1e-4, "behavior has changed"
same, negative, random = seen.values()
assert abs(same[0] - 1) < 1e-4 and abs(negative[0] + 1) < 1e-4 and abs(random[0]) < 0.2, "behavior has changed"
assert abs(same[2] - 1) < 1e-4 and abs(negative[2] - 1) < 1e-4, "behavior has changed"
assert ends[0] < -0.9 and ends[1] > 0.9, "behavior has changed"
PY
venv/bin/python see.py
