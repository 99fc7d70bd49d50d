#!/usr/bin/env bash
# torch.compile(options={"freezing": True}) freezes nothing: no weight becomes a constant, and no error or warning says so.
#
# Package: torch 2.13.0 (CPU build) and 2.11.0. Seen there, and checked by this script:
#   Whether weights are constants is decided twice: by the tracer (torch/_dynamo, which makes parameters inputs or attributes), and by
#   Inductor. The option of torch.compile holds in Inductor alone. The tracer looks at the global torch._inductor.config.freezing.
#   So with the option Inductor's freezing pass runs on a graph whose weights are inputs, and finds nothing to do: BatchNorm is
#   not folded into convolutions, no weight is packed, no ReLU is fused. With the global setting, or within
#   torch._inductor.config.patch(freezing=True) around the call that compiles, all of that is done.
# Printed: "by option: 0 weights packed" and "by the global setting: 1 weights packed".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy setuptools
cd "$folder"
cat > see.py <<'PY'
import torch
import torch._inductor.config
from torch import nn
from torch._dynamo.utils import counters


def packed(options, setting):
    """Convolutions whose weights Inductor has packed."""
    torch._dynamo.reset()
    counters.clear()
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval().requires_grad_(False)
    with torch.no_grad(), torch._inductor.config.patch(freezing=setting, force_disable_caches=True):
        torch.compile(net, options=options)(torch.randn(2, 3, 8, 8))
    return counters["inductor"]["mkldnn_conv_weight_pack_matcher_count"]


option, setting = packed({"freezing": True}, False), packed(None, True)
print(f"by option: {option} weights packed")
print(f"by the global setting: {setting} weights packed")
assert (option, setting) == (0, 1), "behavior has changed"
PY
"$folder/venv/bin/python" see.py
