#!/usr/bin/env bash
# torchmetrics: metrics that agree on the first batch are one metric from then on, whatever their settings.
#
# Packages: torchmetrics 1.9.0, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   MetricCollection saves work by groups of metrics that share their counts, as precision and recall do. It finds these after the first update, by
#   comparing counts, not classes and settings. A student that is sure and right on a first batch of 32 has the same counts for accuracy at 0.5 and at
#   0.9, so for the rest of the run both have the counts of the one whose name comes first. A first batch of which all is right makes top-2 accuracy
#   (average="macro", the default) equal top-1; one without padding makes accuracy that leaves padding out (ignore_index) equal to accuracy that
#   counts it. reset() does not separate them. Nothing warns.
#   With the batches in another order the numbers are right, so the same model and data have two results.
#   Right is compute_groups=False. Calling the collection, metrics(preds, target), instead of update() makes no groups, either.
# Printed: for each pair, the values with groups, with compute_groups=False, and with groups and the batches in the opposite order.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 torchmetrics==1.9.0 numpy
cd "$folder"
cat > see.py <<'PY'
import warnings

import torch
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy

torch.manual_seed(0)
warnings.simplefilter("error")
sure = torch.randint(2, (32,))
binary = [(sure * 0.96 + 0.02, sure)]  # probabilities of 0.02 and 0.98, all right
for _ in range(5):
    labels = torch.randint(2, (32,))
    binary.append(((labels + torch.randn(32)).sigmoid(), labels))
labels = torch.arange(10).repeat(4)
several, padded = [(torch.nn.functional.one_hot(labels, 10).float(), labels)], [(torch.randn(40, 10), labels)]
for _ in range(5):
    labels = torch.randint(10, (40,))
    logits = torch.randn(40, 10) + torch.nn.functional.one_hot(labels, 10)
    several.append((logits, labels))
    padded.append((logits, torch.where(torch.rand(40) < 0.5, 0, labels)))
pairs = {
    "thresholds": (binary, lambda: {"above half": BinaryAccuracy(threshold=0.5), "above 9 tenths": BinaryAccuracy(threshold=0.9)}),
    "top k": (several, lambda: {"top 1": MulticlassAccuracy(10, top_k=1), "top 2": MulticlassAccuracy(10, top_k=2)}),
    "padding of class 0": (
        [(logits[target > 0], target[target > 0]) for logits, target in padded[:1]] + padded[1:],
        lambda: {"all": MulticlassAccuracy(10, average="micro"), "real": MulticlassAccuracy(10, average="micro", ignore_index=0)},
    ),
}


def values(metrics, batches, repeat=1, call=False):
    for _ in range(repeat):
        metrics.reset()
        for batch in batches:
            metrics(*batch) if call else metrics.update(*batch)
    return {name: round(value.item(), 4) for name, value in metrics.compute().items()}


for name, (batches, make) in pairs.items():
    grouped, single = values(MetricCollection(make()), batches), values(MetricCollection(make(), compute_groups=False), batches)
    backwards = values(MetricCollection(make()), batches[::-1])
    print(f"{name}: {grouped}, without groups {single}, backwards {backwards}")
    first, second = grouped
    assert grouped[first] == grouped[second] == single[first] and abs(single[second] - single[first]) > 0.05, "behavior has changed"
    assert backwards == single, "behavior has changed"
    metrics = MetricCollection(make())
    values(metrics, batches)
    assert values(metrics, batches[1:])[second] == values(MetricCollection(make()), batches[1:])[first], "behavior has changed"
    assert values(MetricCollection(make()), batches, call=True) == single, "behavior has changed"
PY
venv/bin/python see.py
