#!/usr/bin/env bash
# torch: histc of bfloat16 counts no further than 256, and that of float16 no further than 2048.
#
# Packages: torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   The counts have the dtype of the input, and are made by adding 1 in it. So each bin stops where 1 is less than half of the last digit. Of 100000
#   confidences of a model that is sure, 0.9 on average, the four quarters of [0, 1] have 0, 202, 7195 and 92603. In bfloat16 they have 0, 198,
#   256 and 256, in float16 0, 202, 2048 and 2048: the share of those above 0.75 is 0.36 or 0.48, and not 0.93. With several
#   threads each one stops there, and the sum of theirs is no better (one thread here). Nothing warns.
#   The confidences are rounded, too, but few change their bin by it. Right are histc of them cast to float32, and torch.bincount of
#   torch.bucketize.
# Printed: for each dtype the counts by histc, those of the same numbers cast to float32, and those by bincount; then the share of the last bin.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
cat > see.py <<'PY'
import torch

torch.set_num_threads(1)
torch.manual_seed(0)
sure = torch.distributions.Beta(9.0, 1.0).sample((100000,)).contiguous()
seen = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    x = sure.to(dtype)
    counts = torch.histc(x, 4, 0, 1)
    cast = torch.histc(x.float(), 4, 0, 1)
    edges = torch.tensor([0.25, 0.5, 0.75], dtype=dtype)
    other = torch.bincount(torch.bucketize(x, edges, right=True), minlength=4)
    seen[dtype] = counts.tolist()
    share = (counts[-1].float() / counts.float().sum()).item()
    print(dtype, seen[dtype], "cast", cast.tolist(), "bincount", other.tolist(), f"share {share:.2f}")
    assert counts.dtype == dtype and cast.tolist() == other.tolist() and cast.sum() == len(sure), "behavior has changed"
right, half, short = seen.values()
assert half[:1] + half[2:] == [0, 256, 256] and half[1] < 256, "behavior has changed"
assert short == [right[0], right[1], 2048, 2048], "behavior has changed"
PY
venv/bin/python -W ignore see.py
