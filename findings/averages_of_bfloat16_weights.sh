#!/usr/bin/env bash
# torch: AveragedModel of bfloat16 weights stops a quarter or half of the way to the model, depending on the averaging function.
#
# Packages: torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   The average has the weights' dtype; no argument chooses another. With a decay of 0.999 each step adds a thousandth of what is missing,
#   which is soon less than half of bfloat16's last digit. Weights that go from 0 to 1 and stay there should have an average of 0.95 after
#   3000 steps, and of 1 in the end. multi_avg_fn=get_ema_multi_avg_fn(0.999) stops at 0.25, avg_fn=get_ema_avg_fn(0.999) at 0.5, for good.
#   Where the average comes from above, from 1 to 0, both stop at 1: the first step is lost already. So a mean teacher in bfloat16 is a mix of its
#   first weights and a fraction of the way to the student's. float16 stops later, at 0.76 and 0.73. Nothing warns.
#   The average without a decay stops, too, at 0.96. Right is an AveragedModel of a float32 copy of the model: avg_fn takes the bfloat16
#   weights for it, multi_avg_fn raises an error.
# Printed: for each dtype and function, the average after 3000 and after 6000 steps, up from 0 to 1 and down from 1 to 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
cat > see.py <<'PY'
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

torch.set_num_threads(1)
ways = {"multi_avg_fn": {"multi_avg_fn": get_ema_multi_avg_fn(0.999)}, "avg_fn": {"avg_fn": get_ema_avg_fn(0.999)}, "no decay": {}}
seen = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for way, options in ways.items():
        for start in (0.0, 1.0):
            model = torch.nn.Linear(1, 1, bias=False).to(dtype)
            torch.nn.init.constant_(model.weight, start)
            average = AveragedModel(model, **options)
            average.update_parameters(model)
            torch.nn.init.constant_(model.weight, 1 - start)
            row = []
            for _ in range(2):
                for _ in range(3000):
                    average.update_parameters(model)
                row.append(round(average.module.weight.item(), 4))
            seen[dtype, way, start] = row
        print(f"{dtype}, {way}: up {seen[dtype, way, 0.0]}, down {seen[dtype, way, 1.0]}")
exact = seen[torch.float32, "avg_fn", 0.0]
assert abs(exact[0] - (1 - 0.999**3000)) < 1e-4, "behavior has changed"
for start, multi, one in ((0.0, 0.25, 0.5), (1.0, 1.0, 1.0)):
    assert seen[torch.bfloat16, "multi_avg_fn", start] == [multi] * 2, "behavior has changed"
    assert seen[torch.bfloat16, "avg_fn", start] == [one] * 2, "behavior has changed"
for way, end in (("multi_avg_fn", 0.76), ("avg_fn", 0.73)):
    assert all(abs(value - end) < 0.005 for value in seen[torch.float16, way, 0.0]), "behavior has changed"
assert all(abs(value - 0.9609) < 1e-3 for value in seen[torch.bfloat16, "no decay", 0.0]), "behavior has changed"
model = torch.nn.Linear(1, 1, bias=False).bfloat16()
torch.nn.init.zeros_(model.weight)
average = AveragedModel(torch.nn.Linear(1, 1, bias=False), **ways["avg_fn"])
average.update_parameters(model)
torch.nn.init.ones_(model.weight)
for _ in range(3000):
    average.update_parameters(model)
print(f"float32 average of a bfloat16 model by avg_fn: {average.module.weight.item():.4f}")
assert abs(average.module.weight.item() - exact[0]) < 1e-3, "behavior has changed"
average = AveragedModel(torch.nn.Linear(1, 1, bias=False), **ways["multi_avg_fn"])
average.update_parameters(model)
try:
    average.update_parameters(model)
    raise AssertionError("behavior has changed")
except RuntimeError as error:
    print("the same by multi_avg_fn:", str(error)[:60])
PY
venv/bin/python see.py
