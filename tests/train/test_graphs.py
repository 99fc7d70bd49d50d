"""The training step as a graph, through a stand-in for CUDA's (recorder.py): the same bits as without, from the same code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import recorder
import torch
from recorder import Operators, Recorder, Uncapturable
from small_run import Place, assert_equal, own_weights
from torch import Tensor, nn

from amtml_fast.train.config.schema import ConfigError
from amtml_fast.train.methods import avg_mkd
from amtml_fast.train.methods.registry import METHODS
from amtml_fast.train.progress import Display
from amtml_fast.train.run import graphs, trainer
from amtml_fast.train.run.folder import Run
from amtml_fast.train.run.graphs import WARM_UP, Graph
from amtml_fast.train.run.prepare import load_data
from amtml_fast.train.run.stop import Interrupted
from amtml_fast.train.run.tasks import distill
from amtml_fast.train.teachers.frozen import Teachers

STEPS = 9  # an epoch
DEVICE = torch.device("cpu")


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """The CPU can capture; all recorders that were made."""
    made: list[Recorder] = []

    def make(device: torch.device) -> Recorder:
        made.append(Recorder(device))
        return made[-1]

    monkeypatch.setitem(graphs.CAPTURES, "cpu", make)
    return made


# --- trainings ----------------------------------------------------------------------------------------------------------

RANDOM = ["student.factory=plain_net:dropout_net", "student.args={}"]
SETTINGS = {
    "student with dropout": ("student", [*RANDOM, "distill.optimizer=adamw"]),
    "live teachers, augmented": ("amtml_kd", ["data.augment=true"]),
    "views": ("amtml_kd", ["data.augment=true", "data.views=2"]),
    "kept in float16": ("amtml_kd", ["cache.logits=float16", "cache.hints=never"]),
    "kept top 3": ("avg_mkd", ["cache.logits=3"]),
    "accumulation": ("amtml_kd", ["engine.gradient_accumulation_steps=2"]),
    "two stages": ("amtml_kd", ["stages.adapter_epochs=1", "stages.adapter_lr=0.01", "stages.adapter_milestones=[1]"]),
    "channels_last": ("amtml_label_weights", ["engine.channels_last=true"]),
    "bf16": ("amtml_kd", ["engine.mixed_precision=bf16"]),
    "alpha falls, labels are hidden": ("gated_kd", ["data.labeled_share=0.3"]),
    "some of the images are kept": ("mmkd", ["data.labeled_share=0.3"]),
    **{
        method: (method, [])
        for method in ("fitnet", "at", "rkd", "dml", "eb_kd", "ca_mkd", "aekd", "mtkd_rl", "amtml_paper_code")
    },
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.usefixtures("new_engine")
def test_a_captured_training_has_the_same_bits(
    place: Place, recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    method, settings = SETTINGS[name]
    if name in ("views", "kept top 3"):  # what is kept is looked up, by the epoch's view
        monkeypatch.setattr(Teachers, "run", forbidden)
    settings = ["distill.epochs=2", *settings, *own_weights(place)]
    plain = place.train(*settings, "name=plain", "engine.cuda_graphs=false", method=method)
    assert not recorders
    graph = place.train(*settings, method=method)
    stages = 2 if name in ("two stages", "amtml_paper_code") else 1  # in the second one the adapter stays as it is
    assert [len(each.launches) for each in recorders] == [stages]
    assert_equal(graph, plain)


def test_a_captured_training_resumes_to_the_same_bits(
    place: Place, recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*RANDOM, "distill.epochs=2", "distill.optimizer=adamw", "engine.checkpoint_steps=5"]
    unbroken = place.train(*settings, "name=unbroken", method="student")
    learn, steps = trainer.Trainer.learn, 0

    def stopped(self: trainer.Trainer, *args: object) -> None:
        nonlocal steps
        if steps == STEPS + 7:
            raise KeyboardInterrupt
        learn(self, *args)
        steps += 1

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "learn", stopped)
        with pytest.raises(Interrupted, match="1 of 2 epochs and 5 steps"):
            place.train(*settings, method="student")
    run = Run(place.folder / "small" / "student-seed0")
    state = run.load_checkpoint()
    assert state is not None and all(type(group["lr"]) is float for group in state["optimizer"]["param_groups"])
    torch.rand(7)
    assert_equal(place.train(*settings, method="student", resume=True), unbroken)


def test_between_two_replays_the_host_does_little(
    place: Place, recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With live teachers it copies what the epoch has drawn and two learning rates; each operator is one launch."""
    learn, replay, counts = trainer.Trainer.learn, recorder.Tape.replay, list[list[str]]()

    def watched(self: trainer.Trainer, *args: object) -> None:
        counts.append([])
        with Operators(lambda func, args: counts[-1].append(recorder.name_of(func))):
            learn(self, *args)

    def elsewhere(self: recorder.Tape) -> None:
        with torch.utils._python_dispatch._disable_current_modes():
            replay(self)

    monkeypatch.setattr(trainer.Trainer, "learn", watched)
    monkeypatch.setattr(recorder.Tape, "replay", elsewhere)
    place.train("data.augment=true", "distill.epochs=1", *own_weights(place))
    assert len(counts) == STEPS and len(counts[0]) > 200
    assert counts[-1] == 2 * ["fill_"] + 3 * ["copy_"]


# --- what cannot be captured --------------------------------------------------------------------------------------------


class Waits(avg_mkd.AverageKD):
    """Looks at a value on the device in each step."""

    def forward(self, step):  # type: ignore[no-untyped-def]
        out = super().forward(step)
        return out._replace(terms={"kd": torch.full((), out.loss.item())})


class Notes(Display):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.said.append(text)


def noted(place: Place, *settings: str, must: bool = False) -> tuple[Run, list[str]]:
    """A training of one epoch, and what it said. must: with engine.cuda_graphs=true."""
    asked, notes = place.load("distill.epochs=1", "data.augment=true", *settings, *own_weights(place)), Notes()
    asked.engine.cuda_graphs = asked.engine.cuda_graphs if not must else True
    return distill(asked, load_data(asked), "avg_mkd", 0, notes, resume=False, fresh=False), notes.said


def test_where_the_step_waits_the_teachers_alone_are_captured(
    place: Place, recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "avg_mkd", replace(METHODS["avg_mkd"], build=Waits))
    plain, said = noted(place, "name=plain", "engine.cuda_graphs=false")
    assert said == []
    teachers, said = noted(place, "name=teachers")
    (line,) = said
    assert "AvgMKD" in line and "only the teachers are captured: the step waits for the device (_local_" in line, line
    assert len(recorders) == 1 and len(recorders[0].launches) == 1
    assert_equal(teachers, plain)
    with pytest.raises(
        ConfigError, match=r"cuda_graphs must be auto or false for AvgMKD, seed 0, got true: the step waits"
    ):
        noted(place, must=True)
    assert not (place.folder / "small" / "avg_mkd-seed0").exists()


def test_a_capture_that_fails_is_told_and_trains_on(
    place: Place, recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Recorder, function: Callable[[], object]) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")

    plain, _ = noted(place, "name=plain", "engine.cuda_graphs=false")
    monkeypatch.setattr(Recorder, "record", fails)
    run, said = noted(place, "name=failed")
    assert len(said) == 1 and "without a CUDA graph: CUDA could not capture it (CUDA error: operation not" in said[0]
    assert_equal(run, plain)
    with pytest.raises(ConfigError, match="got true: CUDA could not capture it"):
        noted(place, must=True)


def test_without_a_gpu_graphs_are_an_error_only_where_they_are_asked_for(place: Place) -> None:
    assert noted(place, "name=plain")[1] == []
    with pytest.raises(ConfigError, match=r"cuda_graphs must be auto or false with engine.device=cpu, got true"):
        place.load("engine.cuda_graphs=true")
    with pytest.raises(ConfigError, match=r"cuda_graphs must be auto or false for AvgMKD.*no CUDA device, only cpu"):
        noted(place, must=True)


# --- Graph --------------------------------------------------------------------------------------------------------------


def forbidden(*args: object) -> None:
    raise AssertionError(args)


def test_a_graph_is_captured_anew_for_other_shapes_and_keys() -> None:
    how = Recorder(DEVICE)
    double = Graph(lambda x: 2 * x, how, forbidden)
    for key, size in (("a", 3), ("a", 4), ("b", 4)):
        outs = [double(torch.full((size,), float(i)), key=key) for i in range(WARM_UP + 3)]
        assert outs[WARM_UP] is outs[-1] and outs[-1].tolist() == [2.0 * (WARM_UP + 2)] * size
        assert outs[0].tolist() == [0.0] * size  # what a call gave that was not replayed stays
    assert how.launches == [1, 1, 1]


def test_random_numbers_of_a_replay_follow_the_seed() -> None:
    def noise(x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5) + torch.rand(8)

    drawn = Graph(noise, Recorder(DEVICE), forbidden)
    for seed in range(WARM_UP + 3):
        torch.manual_seed(seed)
        out = drawn(torch.ones(8)).clone()
        torch.manual_seed(seed)
        assert torch.equal(out, noise(torch.ones(8)))


def test_a_scaled_loss_is_captured_with_the_scaler() -> None:
    """fp16's loss scaler leaves out steps with infinite gradients, and changes its scale, without a look by the host."""

    def train(captured: bool) -> list[Tensor]:
        weight = nn.Parameter(torch.ones(4))
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)

        def step(x: Tensor) -> None:
            scaler.scale((weight * x).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        run = Graph(step, Recorder(DEVICE), forbidden) if captured else step
        seen = []
        for i in range(12):
            run(torch.full((4,), torch.inf if i in (1, 6) else float(i)))
            seen += [weight.detach().clone(), torch.tensor(scaler.get_scale())]
        return seen

    plain, graph = train(False), train(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, graph, strict=True)) and len(set(plain[1::2])) > 2


# --- the stand-in itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x * x.sum().item(),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x * float(x.max()),
        lambda x: x * x.tolist()[0],
        lambda x: x + torch.from_numpy(x.numpy()),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: x.masked_select(x > 1),
        lambda x: x.unique(),
        lambda x: x * torch.tensor([1.0, 2.0, 3.0]),
        lambda x: torch.manual_seed(1) and x,
    ],
)
def test_the_recorder_refuses_what_no_graph_can_hold(wrong: Callable[[Tensor], object]) -> None:
    x = torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(Uncapturable):
        Recorder(DEVICE).record(lambda: wrong(x))


def test_the_recorder_repeats_the_numbers_of_the_call_that_it_saw() -> None:
    rate, weight = 0.5, torch.ones(2)

    def step(x: Tensor) -> None:
        weight.sub_(x, alpha=rate)

    bakes = Graph(step, Recorder(DEVICE), forbidden)
    for _ in range(WARM_UP + 1):
        bakes(torch.ones(2))
    before, rate = weight.clone(), 2.0
    bakes(torch.ones(2))
    assert torch.equal(weight, before - 0.5)  # a learning rate has to be a tensor
