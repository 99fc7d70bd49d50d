#!/usr/bin/env bash
# DTensor: the gradient of mse_loss is multiplied by the number of processes; that of ((student - teacher) ** 2).mean() is not.
#
# Packages: torch 2.13.0 (CPU build, gloo). Seen there, and checked by this script:
#   Student and teacher are DTensors, sharded by rows (Shard(0)) over 2 or 4 processes. mse_loss has the right value, and its gradient is 2 or 4
#   times as large as that of the same plain tensors: each process divides by its own number of elements. So are the gradients of smooth_l1_loss,
#   huber_loss and binary_cross_entropy, and with shards by columns (Shard(1)). Those of l1_loss, kl_div, cross_entropy of soft labels,
#   binary_cross_entropy_with_logits, and of the mean written out are right. So beside a KL, a loss of features gets a weight that grows with the
#   number of processes, and a value in the log that does not show it. Nothing warns.
#   Where the rows do not divide evenly, 5 over 2, the values of the four are wrong, too: the mean of two means, of 3 and of 2 rows. So is the
#   value of binary_cross_entropy_with_logits, whose gradient stays right.
#   Right are reduction="none" with .mean() behind it, and reduction="sum" divided by the number of elements.
# Printed: for each loss, by rows x processes, its value and its gradient in the first and in the last place, each divided by that of plain tensors.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
cat > see.py <<'PY'
import json
import os

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

LOSSES = {
    "mse_loss": F.mse_loss,
    "smooth_l1_loss": F.smooth_l1_loss,
    "huber_loss": F.huber_loss,
    "l1_loss": F.l1_loss,
    "kl_div": lambda s, t: F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean"),
    "cross_entropy": lambda s, t: F.cross_entropy(s, t.softmax(1)),
    "bce_with_logits": lambda s, t: F.binary_cross_entropy_with_logits(s, t.sigmoid()),
    "bce": lambda s, t: F.binary_cross_entropy(s.sigmoid(), t.sigmoid()),
    "mean of squares": lambda s, t: ((s - t) ** 2).mean(),
    "mse_loss none": lambda s, t: F.mse_loss(s, t, reduction="none").mean(),
    "mse_loss sum": lambda s, t: F.mse_loss(s, t, reduction="sum") / s.numel(),
}


def see(rank, processes):
    dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/meet{processes}", rank=rank, world_size=processes)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (processes,))
    ratios = {}
    for rows, dim in ((8, 0), (8, 1), (5, 0))[: 3 if processes == 2 else 2]:
        torch.manual_seed(0)
        student, teacher = torch.randn(2, rows, 8)
        for name, loss in LOSSES.items():
            x = student.clone().requires_grad_()
            want = loss(x, teacher)
            want.backward()
            y, z = (distribute_tensor(a, mesh, [Shard(dim)]) for a in (student, teacher))
            y.requires_grad_()
            got = loss(y, z)
            got.backward()
            change = y.grad.full_tensor() / x.grad
            value = (got.full_tensor() / want).item()
            ratios[f"{name}, {rows} x {processes}, dim {dim}"] = [round(r, 3) for r in (value, change[0, 0].item(), change[-1, -1].item())]
    if rank == 0:
        with open(f"ratios{processes}", "w") as f:
            json.dump(ratios, f)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    seen = {}
    for processes in (2, 4):
        torch.multiprocessing.spawn(see, (processes,), processes)
        with open(f"ratios{processes}") as f:
            seen.update(json.load(f))
    for name in LOSSES:
        for where in ("8 x 2, dim 0", "8 x 4, dim 0", "8 x 2, dim 1", "8 x 4, dim 1", "5 x 2, dim 0"):
            value, first, last = seen[f"{name}, {where}"]
            print(f"{name}, {where}: value {value}, gradient {first} and {last}")
            if name in ("mse_loss", "smooth_l1_loss", "huber_loss", "bce"):
                if where.startswith("8"):
                    processes = int(where[4])
                    assert (value, first, last) == (1, processes, processes), "behavior has changed"
                else:
                    assert value != 1 and (first, last) == (1.667, 2.5), "behavior has changed"  # 5 / 3 and 5 / 2
            else:
                uneven = name == "bce_with_logits" and where.startswith("5")
                assert (value != 1) == uneven and first == last == 1, "behavior has changed"
PY
venv/bin/python -W ignore see.py 2> errors || { cat errors; exit 1; }
