#!/usr/bin/env bash
# torchmetrics: the AUROC of logits depends on the batch size, as each batch is taken for logits or for probabilities by itself.
#
# Packages: torchmetrics 1.9.0, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   Classification metrics apply a sigmoid to what has a value outside of [0, 1], as documented, and keep the rest as it is. This is asked for each
#   batch anew, and one metric gathers both kinds: a logit of 0.9 in a batch without a negative one counts as 0.9, which is above a logit of 2, 0.88.
#   AUROC does not change by a sigmoid, so that one expects the same of logits and of probabilities. 5000 logits have 0.79 in one batch and
#   0.76 in batches of 1, as one validates texts of different lengths. The average precision goes from 0.79 to 0.75. BinaryAccuracy changes too: a
#   logit of 0.3 is positive in a large batch, and negative alone. MulticlassAUROC does the same with the softmax. Nothing warns.
#   Right are probabilities, torch.sigmoid(logits), which give the same in all batch sizes.
# Printed: for each metric and batch size its value, of logits and of probabilities.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/pip" install -q --no-deps torchmetrics==1.9.0 lightning-utilities packaging
cd "$folder"
cat > see.py <<'PY'
import torch
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, BinaryAveragePrecision, MulticlassAUROC

torch.set_num_threads(1)
torch.manual_seed(0)
two = torch.randint(0, 2, (5000,))
three = torch.randint(0, 3, (5000,))
binary = torch.randn(5000) + 1.2 * two
classes = torch.rand(5000, 1) + 0.2 * torch.randn(5000, 3) + 0.2 * torch.nn.functional.one_hot(three, 3)
cases = {
    "BinaryAUROC": (BinaryAUROC, {}, binary, two, torch.sigmoid(binary)),
    "BinaryAveragePrecision": (BinaryAveragePrecision, {}, binary, two, torch.sigmoid(binary)),
    "BinaryAccuracy": (BinaryAccuracy, {}, binary, two, torch.sigmoid(binary)),
    "MulticlassAUROC": (MulticlassAUROC, {"num_classes": 3}, classes, three, torch.softmax(classes, 1)),
}
for name, (kind, options, logits, labels, probabilities) in cases.items():
    seen = {}
    for size in (5000, 8, 2, 1):
        for source, predictions in (("logits", logits), ("probabilities", probabilities)):
            metric = kind(**options)
            for i in range(0, 5000, size):
                metric.update(predictions[i : i + size], labels[i : i + size])
            seen[size, source] = metric.compute().item()
        print("{}, batches of {}: {:.4f} of logits, {:.4f} of probabilities".format(name, size, *list(seen.values())[-2:]), flush=True)
    whole = seen[5000, "logits"]
    assert abs(whole - seen[1, "logits"]) > 0.02, "behavior has changed"
    assert all(abs(seen[size, "probabilities"] - whole) < 1e-5 for size in (5000, 8, 2, 1)), "behavior has changed"
PY
venv/bin/python -W ignore see.py
