#!/usr/bin/env bash
# FSDP2: module.zero_grad() between forward and backward clears nothing.
#
# Package: torch 2.13.0 (CPU build, gloo, one process). Seen there, and checked by this script:
#   A module that is its own FSDP2 root keeps its parameters unsharded between forward and backward. During that time
#   `module.parameters()` gives the unsharded parameters, which have no .grad. The gradients of the last step are on the shards,
#   where `module.zero_grad()` does not reach them.
#   So `loss = f(module(x)); module.zero_grad(); loss.backward()` silently adds this step's gradient to the last one's.
#   The same line with `optimizer.zero_grad()` (it holds the shards), or with `module.zero_grad()` before forward, clears them.
# Printed: "zero_grad between forward and backward: 1.0 2.0 3.0" and "before forward: 1.0 1.0 1.0".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
cat > see.py <<'PY'
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
seen = {}
for when in ("between forward and backward", "before forward"):
    module = torch.nn.Linear(1, 1, bias=False)
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    norms = []
    for _ in range(3):
        if when == "before forward":
            module.zero_grad()
        loss = module(torch.ones(1, 1)).sum()  # its gradient is 1 at every step
        if when != "before forward":
            module.zero_grad()
        loss.backward()
        norms.append(module.weight.grad.full_tensor().item())
    seen[when] = norms
    print(f"zero_grad {when}:", *norms)
assert seen == {"between forward and backward": [1.0, 2.0, 3.0], "before forward": [1.0, 1.0, 1.0]}, "behavior has changed"
dist.destroy_process_group()
PY
venv/bin/python -W ignore see.py
