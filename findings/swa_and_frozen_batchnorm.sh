#!/usr/bin/env bash
# lightning: StochasticWeightAveraging resets the statistics of BatchNorm layers that are frozen in eval mode, and does not fill them again.
#
# Packages: lightning 2.6.1, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   At its end the callback sets running_mean, running_var and the count of every BatchNorm layer of the LightningModule to 0, 1 and 0, and
#   goes through the training data once more to fill them again. A layer in eval mode does not fill them, so that those of a frozen backbone or
#   of a distillation's teacher, which nothing trains, stay at 0 and 1: in what fit leaves behind, and in what is saved. Nothing warns.
#   A linear head on a frozen backbone: 0.93 of the answers are right without the callback, 0.58 with it, and 0.92 with it once the
#   statistics are put back.
# Printed: for each run the head's accuracy and the backbone's first running means; then the accuracy with the statistics put back.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy lightning==2.6.1
cd "$folder"
cat > see.py <<'PY'
import copy
import logging
import warnings

import lightning
import torch
import torch.nn as nn
import torch.nn.functional as F
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch.utils.data import DataLoader, TensorDataset

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.manual_seed(0)
x = 3 * torch.randn(256, 6) + 5
y = (x[:, 0] > 5).long()
backbone = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU())
for _ in range(50):
    backbone(x)  # fills the running statistics
backbone.eval().requires_grad_(False)


class Head(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = copy.deepcopy(backbone), nn.Linear(16, 2)

    def training_step(self, batch, index):
        assert not self.backbone.training
        return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.head.parameters(), lr=0.05)


def right(model):
    with torch.no_grad():
        return (model.eval().head(model.backbone(x)).argmax(1) == y).double().mean().item()


seen, said = {}, []
for name, callbacks in (("without", []), ("with", [StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=3)])):
    torch.manual_seed(1)
    model = Head()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lightning.Trainer(
            max_epochs=6, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, callbacks=callbacks,
            enable_progress_bar=False, enable_model_summary=False,
        ).fit(model, DataLoader(TensorDataset(x, y), batch_size=32))
    said += [str(w.message) for w in caught if "norm" in str(w.message).lower() or "statistic" in str(w.message).lower()]
    seen[name] = right(model), model.backbone[1].running_mean[:3].tolist()
    print(f"{name} the callback: {seen[name][0]:.3f} right, running_mean {[round(m, 3) for m in seen[name][1]]}")
kept = backbone[1].running_mean[:3].tolist()
model.backbone.load_state_dict(backbone.state_dict())
again = right(model)
print(f"with the statistics put back: {again:.3f} right")
assert seen["without"][1] == kept and seen["with"][1] == [0, 0, 0] and not said, "behavior has changed"
assert seen["without"][0] > 0.85 and again > 0.85 and seen["with"][0] < 0.75, "behavior has changed"
PY
venv/bin/python see.py 2>&1 | grep -v "^$"
