#!/usr/bin/env bash
# datasets: Dataset.to_json writes a probability from 1e-15 to 5e-11 as 0, and a logit of -inf as null, which training reads as NaN.
#
# Packages: datasets 5.2.0, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   to_json goes through pandas, whose to_json keeps ten decimals unless it is told otherwise: ten places behind the point, not ten digits. So of
#   a teacher's stored probabilities the small ones are 0 in the file (log gives -inf), and those near them keep a digit or two.
#   Below 1e-15 they are right again, written with an exponent. -inf, the logit of a masked class, becomes null, and so does NaN. Read back with
#   the format "torch" null is NaN: softmax of the row is NaN.
#   double_precision=15 is the most that can be asked for: then none is 0, but 1.4e-15 is 1e-15. No warning in any case.
#   to_parquet keeps every bit of all of these. json.dumps does, too.
# Printed: the row, and what comes back by each way.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 datasets==5.2.0 numpy
cd "$folder"
export HF_HOME="$folder/cache" HF_DATASETS_DISABLE_PROGRESS_BARS=1
cat > see.py <<'PY'
import json
import math

import torch
from datasets import Dataset

row = {"probs": [0.75, 0.25 - 3e-11 - 2.53e-9, 2.53e-9, 3e-11], "logits": [1.5, 0.0, -2.0, -math.inf]}
stored = Dataset.from_dict({name: [value] for name, value in row.items()})
ways = {}
for name, options in (("to_json", {}), ("to_json with 15", {"double_precision": 15})):
    stored.to_json("file.jsonl", **options)
    print(open("file.jsonl").read().strip())
    ways[name] = Dataset.from_json("file.jsonl", cache_dir=f"cache/{len(ways)}")
stored.to_parquet("file.parquet")
ways["to_parquet"] = Dataset.from_parquet("file.parquet", cache_dir="cache/parquet")
print("given:", row)
for name, data in ways.items():
    logits = data.with_format("torch")[0]["logits"]
    print(f"{name}: probs {data[0]['probs']}, softmax of the logits {[round(x, 4) for x in logits.softmax(0).tolist()]}")
plain, longer, parquet = ways.values()
assert plain[0]["probs"][3] == 0 and plain[0]["probs"][2] != row["probs"][2], "behavior has changed"
assert longer[0]["probs"][3] == 3e-11, "behavior has changed"
small = Dataset.from_dict({"small": [[5.1e-11, 4.9e-11, 1.4e-15, 9.9e-16, math.nan]]})
for digits, expected in ((10, [1e-10, 0, 0, 9.9e-16, None]), (15, [5.1e-11, 4.9e-11, 1e-15, 9.9e-16, None])):
    small.to_json("small.jsonl", double_precision=digits)
    read = json.load(open("small.jsonl"))["small"]
    print(f"{digits} decimals of {small[0]['small']}: {read}")
    assert read == expected, "behavior has changed"
try:
    small.to_json("small.jsonl", double_precision=16)
    raise AssertionError("behavior has changed")
except ValueError as error:
    print("16 decimals:", str(error)[:60])
for data in (plain, longer):
    assert data[0]["logits"][3] is None and data.with_format("torch")[0]["logits"].softmax(0).isnan().all(), "behavior has changed"
assert parquet[0] == row and json.loads(json.dumps(row)) == row, "behavior has changed"
assert parquet.with_format("torch")[0]["logits"].softmax(0).isfinite().all(), "behavior has changed"
PY
venv/bin/python see.py
