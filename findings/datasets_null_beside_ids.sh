#!/usr/bin/env bash
# datasets: one null in a batch turns its integers into float32, so ids above 2^24 become other ids.
#
# Packages: datasets 5.2.0, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   A column of int64 holds ids of samples; some rows have none (null, which Arrow has in every column). With the format "torch" or "numpy" a
#   row is an int64 with the exact id. A batch whose rows all have one is int64 and exact. A batch with a null is float32: the null is NaN, and
#   the other ids are rounded to 24 bits: 16777217 is read as 16777216, another sample's id. So what is read of a row depends on the rows beside
#   it, and on the batch size. Lists are converted one by one: a null in one makes float32 of that one, and of the whole batch.
#   The column itself is exact: dataset["id"] without a format, or .data, has the numbers. Nothing warns.
# Printed: the ids of the same rows, read one by one, in batches of two and all at once, with each format.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 datasets==5.2.0 numpy
cd "$folder"
export HF_HOME="$folder/cache"
cat > see.py <<'PY'
from datasets import Dataset

ids = [16777217, 16777219, 16777221, None]
data = Dataset.from_dict({"id": ids, "near": [[i, 16777223] for i in ids]})
print(data.features, list(data["id"]))
assert list(data["id"]) == ids and data.data["id"].to_pylist() == ids, "behavior has changed"
for name in ("torch", "numpy"):
    shown = data.with_format(name)
    single = [shown[row]["id"] for row in range(3)]
    pairs = [shown[row : row + 2]["id"] for row in (0, 2)]
    whole = shown[:]["id"]
    lists = [shown[row]["near"] for row in (2, 3)]
    near = shown[2:]["near"]
    print(f"{name}: one by one {[int(x) for x in single]}, in pairs {[(x.dtype, x.tolist()) for x in pairs]}")
    print(f"    at once {whole.dtype, whole.tolist()}, lists {[(x.dtype, x.tolist()) for x in lists]}")
    assert all(str(x.dtype).endswith("int64") for x in [*single, pairs[0], lists[0]]), "behavior has changed"
    assert all(str(x.dtype).endswith("float32") for x in (pairs[1], whole, lists[1], near)), "behavior has changed"
    assert near.tolist()[0] == [16777220, 16777224], "behavior has changed"
    assert [int(x) for x in single] == ids[:3] and pairs[0].tolist() == ids[:2], "behavior has changed"
    assert pairs[1][0] == 16777220 and pairs[1][1] != pairs[1][1], "behavior has changed"
    assert whole.tolist()[:3] == [16777216, 16777220, 16777220], "behavior has changed"
    assert lists[0].tolist() == [16777221, 16777223] and lists[1].tolist()[1] == 16777224, "behavior has changed"
PY
venv/bin/python see.py
