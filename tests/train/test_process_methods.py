"""Two processes, and two rounds of accumulation, against one: the loss of every method, and its gradients, from halves of a batch."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from method_step import N, objective, seen
from parallel import in_processes
from small_run import ROOT
from torch import Tensor

from amtml_fast.train.data.parts import IGNORED
from amtml_fast.train.methods.base import Method, Step
from amtml_fast.train.methods.registry import METHODS

HIDDEN = (0, 1, 2, 5, 7)  # four of them are of the first half
HALVES = (slice(0, N // 2), slice(N // 2, N))
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # All but mmkd, whose processes look at other images (docs/training.md).
    **{name: (name, {}) for name in METHODS if name != "mmkd"},
    "distance": ("amtml_kd", {"distance_weight": 2.0}),
    "trained distance": ("amtml_angle_trains_weights", {"distance_weight": 2.0}),
    "aekd rows": ("aekd", {"aekd_gradients": "rows", "aekd_bound": 1.0}),
    "labels alone": ("amtml_label_weights", {"angle_weight": 0.0}),  # without another term of a whole batch
}


def whole_step(method: Method, hidden: bool) -> Step:
    step = seen(method)
    if not hidden or not method.needs_teachers:
        return step
    labels = step.labels.clone()
    labels[list(HIDDEN)] = IGNORED
    return step._replace(labels=labels, hidden=True, truth=step.labels)


def part(step: Step, rows: slice) -> Step:
    """Some rows, as leaves of their own."""

    def of(x: Tensor) -> Tensor:
        return x.detach()[rows].requires_grad_(x.requires_grad)

    maps = {name: of(x) for name, x in step.maps.items()}
    return step._replace(
        logits=of(step.logits),
        maps=maps,
        features=maps["high"],
        labels=step.labels[rows],
        truth=None if step.truth is None else step.truth[rows],
        teacher_logits=[of(z) for z in step.teacher_logits],
        teacher_maps=[of(x) for x in step.teacher_maps],
        images=step.images[rows],
    )


def outcome(case: str, hidden: bool, rows: slice, processes: int) -> dict[str, Tensor]:
    """The loss, its terms and its gradients: of the parameters, and of these rows of the student's outputs."""
    name, loss = CASES[case]
    method = METHODS[name]
    step = whole_step(method, hidden)
    made = objective(method, hidden_labels=step.hidden, processes=processes, **loss)
    if method.fits:
        made.fit(step.teacher_logits, step.labels)
    mine = part(step, rows)
    out = made(mine)
    out.loss.backward()
    found = {"loss": out.loss.detach(), **out.terms}
    found |= {f"gradient of {key}": p.grad for key, p in made.named_parameters() if p.grad is not None}
    inputs = {"logits": mine.logits, **mine.maps}
    return found | {f"rows of {key}": x.grad for key, x in inputs.items() if x.grad is not None}


def outcomes(rank: int) -> dict[tuple[str, bool], dict[str, Tensor]]:
    return {(case, hidden): outcome(case, hidden, HALVES[rank], 2) for case in CASES for hidden in (False, True)}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return in_processes(2, outcomes, tmp_path_factory.mktemp("two"))


def differences(first: dict[str, Tensor], second: dict[str, Tensor], want: dict[str, Tensor]) -> list[str]:
    """What the halves of a batch have otherwise than the whole; their losses and gradients are averaged."""
    found = []
    for name, value in want.items():
        both = torch.cat([first[name], second[name]]) if name.startswith("rows") else first[name] + second[name]
        if not (both / 2 - value).norm() <= 1e-5 * value.norm() + 1e-7:
            found.append(name)
    return found


@pytest.mark.parametrize("hidden", [False, True], ids=["labels", "hidden"])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_loss_and_the_gradients_of_one(two: list[dict], case: str, hidden: bool) -> None:
    want = outcome(case, hidden, slice(None), 1)
    first, second = (process[case, hidden] for process in two)
    assert first.keys() == second.keys() == want.keys()
    assert differences(first, second, want) == []


def rounds_differ(case: str, hidden: bool) -> bool:
    """Whether two rounds of accumulation have another loss or other gradients than one."""
    first, second, want = (outcome(case, hidden, rows, 1) for rows in (HALVES[0], HALVES[1], slice(None)))
    return differences(first, second, want) != []


def test_rounds_of_accumulation_differ_from_one_only_where_the_documentation_says_so() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    said = re.search(r"- \*\*Rounds of accumulation\*\*.*?(?=\n- )", text, re.DOTALL)
    assert said is not None
    always, hidden = (set(re.findall("`([a-z_]+)`", part)) for part in said[0].split("labels are hidden"))
    whole = METHODS["amtml_kd"].build  # AMTML-KD and its ablations compare all images, two cases do not
    always |= {case for case, (name, _) in CASES.items() if METHODS[name].build is whole} | {"aekd rows"}
    always -= {"amtml_no_angle", "labels alone", "mmkd"}
    assert {case for case in CASES if rounds_differ(case, False)} == always
    assert {case for case in CASES if rounds_differ(case, True)} == always | hidden | {"labels alone"}
