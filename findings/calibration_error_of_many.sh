#!/usr/bin/env bash
# torchmetrics: the calibration error of more than a few million predictions is wrong, and 0 in the end.
#
# Packages: torchmetrics 1.9.0, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   Confidences, right answers and their numbers are added up one after the other in float32, for each bin. From 2^22 on a confidence of 0.9 adds
#   1, and from 2^24 on nothing can be added. A model that is 0.9 sure and right in 0.6 of its answers has a calibration error of 0.30.
#   MulticlassCalibrationError and BinaryCalibrationError give 0.30 for a million, 0.34 for five, 0.37 for ten, 0.29 for twenty and 0.00 for
#   thirty million: perfectly calibrated. So many are 30 images of a megapixel, or the tokens of a validation set. Nothing warns.
#   Given in batches it is the same: they are kept, and added up by compute(). With float64 BinaryCalibrationError is right, and
#   MulticlassCalibrationError is not, as it casts to float32.
#   Right for many classes is BinaryCalibrationError of the largest probability, in float64, and of whether its class is the right one.
# Printed: for each number of predictions the calibration error by both classes, and by its definition; then those of float64.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/pip" install -q --no-deps torchmetrics==1.9.0 lightning-utilities packaging
cd "$folder"
cat > see.py <<'PY'
import torch
from torchmetrics.classification import BinaryCalibrationError, MulticlassCalibrationError

torch.set_num_threads(1)
million = 10**6
torch.manual_seed(0)
right = torch.rand(million) < 0.6
sure = 0.87 + 0.06 * torch.rand(million)
two = torch.stack([1 - sure, sure], dim=1)
want = abs(sure.double().mean().item() - right.double().mean().item())  # all confidences fall into one bin


def error(make, predictions, millions):
    metric = make()
    for _ in range(millions):
        metric.update(predictions, right.long())
    return metric.compute().item()


def multiclass():
    return MulticlassCalibrationError(num_classes=2, validate_args=False)


def binary():
    return BinaryCalibrationError(validate_args=False)


seen = {}
for millions in (1, 5, 10, 20, 30):
    seen[millions] = error(multiclass, two, millions), error(binary, sure, millions)
    print("{} million: {:.4f} multiclass, {:.4f} binary; by its definition {:.4f}".format(millions, *seen[millions], want))
doubles = error(multiclass, two.double(), 20), error(binary, sure.double(), 20)
print("20 million in float64: {:.4f} multiclass, {:.4f} binary".format(*doubles))
for millions, low, high in ((1, want - 2e-3, want + 2e-3), (5, 0.32, 0.36), (10, 0.35, 0.39), (20, 0.27, 0.295), (30, 0, 1e-6)):
    assert all(low <= got <= high for got in seen[millions]), "behavior has changed"
assert doubles[0] == seen[20][0] and abs(doubles[1] - want) < 1e-6, "behavior has changed"
PY
venv/bin/python -W ignore see.py
