#!/usr/bin/env bash
# Liger: a chunk of the fused distillation losses has up to twice as many rows, less one, as chunk_size says.
#
# Packages: liger-kernel 0.8.5, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   LigerFusedLinearJSDLoss(chunk_size=1024) makes max(1, rows // 1024) chunks of nearly equal size. 2048 rows are two chunks of 1024,
#   2047 rows are one of 2047. So one row fewer takes nearly twice the memory beside inputs and gradients, and memory goes up and down as
#   batches get longer: the peak of a run is at the row before a multiple, not at the longest batch. A chunk_size chosen by what fits
#   into memory has to be half of that.
# Printed: for some numbers of rows, what the loss and its gradients add to the process's peak memory.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 liger-kernel==0.8.5 numpy
cd "$folder"
cat > see.py <<'PY'
import resource
import subprocess
import sys

CLASSES, HIDDEN = 20000, 16


def added(rows):
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    torch.manual_seed(0)
    tensors = [torch.randn(n, HIDDEN) for n in (rows, CLASSES, rows, CLASSES)]
    labels = torch.randint(CLASSES, (rows,))
    loss = LigerFusedLinearJSDLoss(chunk_size=1024, compiled=False)
    loss(*(x[:64] for x in tensors), labels[:64] % 64)  # what the first call loads
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss(*tensors, labels)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


if len(sys.argv) > 1:
    print(added(int(sys.argv[1])))
else:
    seen = {}
    for rows in (1024, 2047, 2048, 3071, 3072):
        out = subprocess.run([sys.executable, "-W", "ignore", __file__, str(rows)], check=True, capture_output=True, text=True)
        seen[rows] = float(out.stdout)
        print(f"{rows} rows: {seen[rows]:.0f} MiB")
    assert 1.6 < seen[2047] / seen[2048] < 2.4, "behavior has changed"
    assert 1.3 < seen[3071] / seen[3072] < 1.7, "behavior has changed"
    assert 0.8 < seen[2048] / seen[1024] < 1.25, "behavior has changed"
PY
venv/bin/python see.py
