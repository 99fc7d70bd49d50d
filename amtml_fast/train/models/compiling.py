"""torch.compile for the networks of a training: for its one batch shape, in place, so that state dicts keep their names."""

from __future__ import annotations

import torch
from torch import nn

# To the compiler FeatureExtractor.forward is one function for all networks of a process; each kind needs its own code.
MOST_NETWORKS = 64


def compile_in_place(network: nn.Module, *, cuda_graphs: bool = False) -> None:
    """A network that trains. `cuda_graphs`: forward and backward are recorded once and replayed without launches."""
    _make_room()
    network.compile(dynamic=False, mode="reduce-overhead" if cuda_graphs else None)


def compile_frozen(network: nn.Module) -> None:
    """A network that never trains: on the CPU its weights become constants, so that BatchNorm folds into the convolutions
    and these get the layout that suits them best."""
    _make_room()
    on_cpu = next(iter(network.parameters())).device.type == "cpu"
    network.compile(dynamic=False, options={"freezing": True} if on_cpu else None)


def new_step() -> None:
    """CUDA graphs may use their memory again: what they gave in the last step has been used."""
    torch.compiler.cudagraph_mark_step_begin()


def _make_room() -> None:
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, MOST_NETWORKS)
