#!/usr/bin/env bash
# pytorch-metric-learning: SmoothAPLoss is right only where a batch has as many classes as samples of each.
#
# Packages: pytorch-metric-learning 2.9.0, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   The loss is 1 - average precision, smoothed. It asks for the same number of samples of each class, next to each other, as MPerClassSampler
#   gives them. It then takes the number of samples for the number of classes: of 16 classes of 4 samples it makes 4 classes of 16. With 8 classes
#   of 8 it is right. Otherwise it has a value and a gradient of a wrong grouping, without an error or a warning: embeddings that separate 16
#   classes perfectly have a loss of 0.52, those of 2 classes of 8 one of 0.67.
#   Training ends at a loss of 0 and lowers what it is for: embeddings of 4 classes of 16 go from an average precision of 0.91 to 0.84.
#   Labels in another order, 0, 1, 2, 3, 0, 1, 2, 3, are accepted, too, and counted as if they stood in blocks.
# Printed: for some classes x samples, the loss beside 1 - smoothed precision computed by its definition, of random and of perfectly separated
#   embeddings; and the loss and the average precision before and after training.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/pip" install -q --no-deps pytorch-metric-learning==2.9.0 scikit-learn scipy joblib threadpoolctl narwhals tqdm
cd "$folder"
cat > see.py <<'PY'
import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import SmoothAPLoss

torch.set_num_threads(1)
torch.manual_seed(0)


def precision(embeddings, labels, above):
    unit = F.normalize(embeddings.detach().double(), dim=1)
    cosine = unit @ unit.T
    same = labels[:, None] == labels[None]
    each = []
    for query in range(len(labels)):
        before = above(cosine[query][None, :] - cosine[query][:, None])  # [j, k]: how far k stands before j
        before.fill_diagonal_(0)
        ranks, own = 1 + before.sum(1), 1 + before[:, same[query]].sum(1)
        each.append((own / ranks)[same[query]].mean())
    return torch.stack(each).mean().item()


def smooth(difference):
    return torch.sigmoid(difference / 0.01)


def hard(difference):
    return (difference > 0).double()


seen = {}
for classes, samples in ((8, 8), (16, 4), (4, 16), (2, 8), (32, 2)):
    labels = torch.arange(classes).repeat_interleave(samples)
    for name, embeddings in (("random", torch.randn(len(labels), 16)), ("separated", F.one_hot(labels).float())):
        got, want = SmoothAPLoss()(embeddings, labels).item(), 1 - precision(embeddings, labels, smooth)
        seen[classes, samples, name] = got, want
        print(f"{classes} x {samples}, {name}: {got:.4f}, by its definition {want:.4f}")
labels = torch.arange(4).repeat(4)
got, want = SmoothAPLoss()(F.one_hot(labels).float(), labels).item(), 1 - precision(F.one_hot(labels).float(), labels, smooth)
seen["order"] = got, want
print(f"4 x 4, separated, labels 0, 1, 2, 3, 0, ...: {got:.4f}, by its definition {want:.4f}")
ends = {}
for classes, samples in ((8, 8), (4, 16)):
    torch.manual_seed(0)
    labels = torch.arange(classes).repeat_interleave(samples)
    embeddings = (torch.randn(classes, 16)[labels] + torch.randn(len(labels), 16)).requires_grad_()
    optimizer = torch.optim.Adam([embeddings], lr=0.02)
    before = precision(embeddings, labels, hard)
    for _ in range(300):
        optimizer.zero_grad()
        loss = SmoothAPLoss(temperature=0.05)(embeddings, labels)
        loss.backward()
        optimizer.step()
    ends[classes, samples] = before, precision(embeddings, labels, hard), loss.item()
    print("{} x {}, trained: average precision {:.4f} before, {:.4f} after; loss {:.4f}".format(classes, samples, *ends[classes, samples]))
for key, (got, want) in seen.items():
    if key == "order":
        assert got > 0.5 and want < 1e-6, "behavior has changed"
    elif key[0] == key[1]:
        assert abs(got - want) < 1e-3, "behavior has changed"
    elif key[2] == "separated":
        assert got > 0.25 and want < 1e-6, "behavior has changed"
    else:
        assert abs(got - want) > 5e-3, "behavior has changed"
assert ends[8, 8][1] > 0.99 and ends[8, 8][2] < 0.01, "behavior has changed"
before, after, loss = ends[4, 16]
assert before > 0.88 and after < 0.87 and loss < 0.01, "behavior has changed"
PY
venv/bin/python -W ignore see.py
