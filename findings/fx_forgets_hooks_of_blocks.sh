#!/usr/bin/env bash
# torch.fx: a traced network keeps the forward hooks of single layers, and loses those of blocks without a word.
#
# Package: torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   A network has a block (a module of its own that holds a convolution) and a head (a convolution); both have a forward hook that
#   keeps the output, as distillation does to read a teacher's maps.
#   While torch.fx.symbolic_trace runs, the block's hook is called with a Proxy in place of a tensor, and so it keeps a Proxy. The head's
#   hook is not called.
#   When the traced network runs, the head's hook is called with its tensor. The block's is never called again: what stands in the
#   block's place is an empty module without hooks. Nothing warns, and the output is the same as before.
#   So whoever folds or quantizes a teacher by torch.fx gets maps of its layers, and of its stages those of no run at all.
# Printed: for each stage, the type that each hook has seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
cat > see.py <<'PY'
import warnings

import torch
from torch import nn

warnings.simplefilter("error")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x).relu()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.head = Block(), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.head(self.block(x))


seen = {}
net, x = Net().eval(), torch.randn(1, 3, 2, 2)
for name in ("block", "head"):
    getattr(net, name).register_forward_hook(lambda module, args, out, name=name: seen.update({name: type(out).__name__}))


def of(stage, run):
    seen.clear()
    out = run()
    print(f"{stage}: {seen}")
    return out, dict(seen)


plain, as_is = of("the network runs", lambda: net(x))
traced, tracing = of("symbolic_trace", lambda: torch.fx.symbolic_trace(net))
again, after = of("the traced network runs", lambda: traced(x))
assert torch.equal(plain, again)
assert as_is == {"block": "Tensor", "head": "Tensor"}
assert tracing == {"block": "Proxy"}, "behavior has changed"
assert after == {"head": "Tensor"}, "behavior has changed"
PY
venv/bin/python see.py
