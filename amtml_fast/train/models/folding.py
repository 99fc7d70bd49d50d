"""BatchNorm of a network that never trains, folded into the convolution before it: one pass over each map less."""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@torch.no_grad()
def fold(model: nn.Module) -> int:
    """Folds in place each BatchNorm in eval mode that alone reads one convolution's output; how many were folded.

    The normalized values are right to rounding. Modules keep their paths and hooks; a convolution or BatchNorm that has hooks
    (one whose map is caught) is left as it is, and so is a model that torch.fx cannot read.
    """
    try:
        graph = fx.Tracer().trace(model)
    except Exception:  # of the model's own code, which may do anything
        return 0
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    modules, folded = dict(model.named_modules(remove_duplicate=False)), 0
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        names = str(before.target), str(node.target)
        convolution, norm = modules[names[0]], modules[names[1]]
        if type(convolution) not in CONVOLUTIONS or type(norm) not in NORMS or norm.running_var is None:
            continue
        if convolution.training or norm.training:
            continue
        if any(calls[name] != 1 or has_hooks(modules[name]) for name in names):
            continue
        fused = fuse_conv_bn_eval(convolution, norm)
        convolution.weight, convolution.bias = fused.weight, fused.bias
        model.set_submodule(names[1], nn.Identity())
        folded += 1
    return folded


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
