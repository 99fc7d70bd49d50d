"""How the suite times, and what its JSON holds beside pytest-benchmark's own: ``limits``, ``machine``, ``memory`` and ``not_run``.

Machines get slower and faster from one second to the next, by half on shared ones. So what is compared, the providers of one case,
is timed in turn: each for a fraction of a second, then each again. A ratio is the median of the turns' ratios.
"""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from . import machine

REMEMBERED: pytest.StashKey[Any] = pytest.StashKey()
PREPARED: pytest.StashKey[Any] = pytest.StashKey()
TURNS = 3
WARM_UP = 0.05  # seconds, before each turn
Step = Callable[[], object]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: part of the short run (make bench-quick)")
    config.stash[REMEMBERED], config.stash[PREPARED] = {"memory": [], "not_run": []}, {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "turn" in metafunc.fixturenames:
        turns = 1 if metafunc.config.getoption("benchmark_disable", False) else TURNS
        metafunc.parametrize("turn", range(turns), ids=lambda turn: f"turn {turn + 1}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first: dict[Any, int] = {}  # comparison -> its place
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=machine.clock))
        first.setdefault(_comparison(item), len(first))
    items.sort(key=lambda item: first[_comparison(item)])  # which leaves the turns of each in their order


def _comparison(item: pytest.Item) -> tuple[str, str]:
    """What tests of several providers have in common."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    case = {name: value for name, value in parameters.items() if name not in ("provider", "turn")}
    return item.nodeid.partition("[")[0], repr(sorted(case.items()))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json |= config.stash[REMEMBERED]
    output_json["limits"] = machine.limits()
    output_json["machine"] = {
        "name": machine.name(),
        "device": machine.DEVICE.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "quick": "quick" in config.option.markexpr,
    }


@pytest.fixture
def remembered(request: pytest.FixtureRequest) -> dict[str, list]:
    return request.config.stash[REMEMBERED]


@pytest.fixture
def leave_out(remembered: dict[str, list]) -> Callable[..., None]:
    """Skips a row and keeps the reason for the table."""

    def skip(group: str, provider: str, reason: str) -> None:
        row = {"group": group, "provider": provider, "reason": reason}
        if row not in remembered["not_run"]:  # of an earlier turn
            remembered["not_run"].append(row)
        pytest.skip(f"{group}, {provider}: {reason}")

    return skip


@pytest.fixture
def prepared(request: pytest.FixtureRequest) -> dict[str, tuple[Step, dict[str, Any], float]]:
    """provider -> step, facts and seconds, of the comparison that this test is part of. Those of the last one are let go."""
    kept, comparison = request.config.stash[PREPARED], _comparison(request.node)
    if comparison not in kept:
        kept.clear()
        torch._dynamo.reset()  # it compiles a function for a few sizes, and no more
        kept[comparison] = {}
    return kept[comparison]


@pytest.fixture
def refuse_too_large(leave_out: Callable[..., None], prepared: dict) -> Callable[..., None]:
    """refuse_too_large(bytes, group, provider): leaves a row out whose predicted memory is not there."""

    def check(wanted: float, group: str, provider: str) -> None:
        free = machine.free_bytes()
        if wanted > machine.MOST * free:
            leave_out(group, provider, f"would take about {wanted / 1e9:,.0f} GB, {free / 1e9:,.0f} GB are free")

    return check


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest, prepared: dict, turn: int) -> Callable[..., None]:
    """timed(prepare, group, provider): one turn of this row. prepare() makes the step that is timed, and facts for the JSON; it is
    called in the first turn. A turn has at least 2 rounds after a warm-up; a long step is timed once, in the first turn."""
    budget = 0.5 if machine.GPU or "quick" in request.config.option.markexpr else 2.0  # seconds, of all turns

    def run(prepare: Callable[[], tuple[Step, dict[str, Any]]], group: str, provider: str) -> None:
        if provider not in prepared:
            step, facts = prepare()
            prepared[provider] = step, facts, _warm(step)
        elif prepared[provider][2] > 4 * budget:
            pytest.skip("it is long, and was timed once")
        else:
            _warm(prepared[provider][0])
        step, facts, once = prepared[provider]
        benchmark.group = group
        benchmark.extra_info.update(provider=provider, turn=turn, **facts)
        rounds = 1 if once > 4 * budget else max(2, min(1000, int(budget / TURNS / max(once, 1e-5))))
        benchmark.pedantic(step, setup=machine.flush_cache, rounds=rounds, warmup_rounds=0)

    return run


def _warm(step: Step) -> float:
    """Seconds of the last of as many steps as a warm-up takes."""
    until = time.perf_counter() + WARM_UP
    step()
    once = machine.seconds(step)
    while time.perf_counter() < until:
        once = machine.seconds(step)
    return once
