"""torch.compile for the networks of a training: for its one batch shape, in place, so that state dicts keep their names.

The compiler is imported where it is used: that takes longer than torch and everything else that a command needs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import nn

# To the compiler FeatureExtractor.forward is one function for all networks of a process; each kind needs its own code.
MOST_NETWORKS = 64


def compile_in_place(network: nn.Module) -> None:
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, MOST_NETWORKS)
    network.compile(dynamic=False)


def as_constants() -> AbstractContextManager[None]:
    """For calls of compiled networks that never train: within it weights are constants of the code that is compiled without
    gradients. On the CPU that code then packs them for its convolutions, and computes what follows each of these with it."""
    # Not an option of compile(): the tracer looks at the global setting alone, and makes the weights inputs without it.
    from torch._inductor import config

    return config.patch(freezing=True)
