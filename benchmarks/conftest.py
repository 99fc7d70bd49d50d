"""How the suite times, and what its JSON holds beside pytest-benchmark's own: ``limits``, ``machine``, ``memory`` and ``not_run``."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from . import machine

REMEMBERED: pytest.StashKey[Any] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: part of the three-minute run (make bench-quick)")
    config.stash[REMEMBERED] = {"memory": [], "not_run": []}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=machine.clock))


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
        remembered["not_run"].append({"group": group, "provider": provider, "reason": reason})
        pytest.skip(f"{group}, {provider}: {reason}")

    return skip


@pytest.fixture
def refuse_too_large(leave_out: Callable[..., None]) -> Callable[..., None]:
    """refuse_too_large(bytes, group, provider): leaves a row out whose predicted memory is not there."""

    def check(wanted: float, group: str, provider: str) -> None:
        free = machine.free_bytes()
        if wanted > machine.MOST * free:
            leave_out(group, provider, f"would take about {wanted / 1e9:,.0f} GB, {free / 1e9:,.0f} GB are free")

    return check


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """timed(step, group, provider, **facts): a benchmark of at least 5 rounds after a warm-up, or of one if it is long."""
    quick = "quick" in request.config.option.markexpr

    def run(step: Callable[[], object], group: str, provider: str, **facts: Any) -> None:
        benchmark.group = group
        benchmark.extra_info.update(provider=provider, **facts)
        step()
        once, budget = machine.seconds(step), 0.5 if quick else 2.0
        rounds = 1 if once > 4 * budget else max(5, min(200, int(budget / max(once, 1e-5))))
        benchmark.pedantic(step, setup=machine.flush_cache, rounds=rounds, warmup_rounds=0)

    return run
