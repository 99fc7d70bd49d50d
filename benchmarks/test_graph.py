"""The whole loss as a CUDA graph: forward and backward without Python and launches, and how many kernels they are."""

from collections.abc import Callable

import pytest
import torch

from .machine import GPU
from .providers import OURS, PLAIN, checked, why_not
from .workloads import Workload

pytestmark = pytest.mark.skipif(not GPU, reason="needs a GPU")
WORKLOAD = Workload("whole_loss", (128, 100, 3))
REPLAYS = 10  # a measurement


@pytest.mark.parametrize("provider", [*OURS, *PLAIN])
def test_graph_of_whole_loss(provider: str, timed: Callable, leave_out: Callable) -> None:
    group = f"{WORKLOAD.name}, {REPLAYS} replays of its graph"
    if reason := why_not(provider, WORKLOAD):
        leave_out(group, provider, reason)

    def prepare() -> tuple:
        step = checked(WORKLOAD, provider, 1e-4)
        facts = {"op": WORKLOAD.op, "bytes": REPLAYS * WORKLOAD.bytes, "flops": REPLAYS * WORKLOAD.flops}
        facts["launches"] = launches(step)
        graph = captured(step)

        def replays() -> None:
            for _ in range(REPLAYS):
                graph.replay()

        return replays, facts

    timed(prepare, group, provider)


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def launches(step: Callable[[], object]) -> int:
    """Kernels of one forward and backward, copies and fills included."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
