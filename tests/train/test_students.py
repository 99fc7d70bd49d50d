"""What a student's network may do: overwrite its own maps, leave parameters out, name a group as it likes; and what it may not."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import PLAIN, QUIET, Place, assert_equal, assert_near, in_two, own_weights

from amtml_fast.train.compare.session import compare
from amtml_fast.train.data.images import Loader
from amtml_fast.train.models.networks import build
from amtml_fast.train.progress import Display
from amtml_fast.train.run.folder import Run
from amtml_fast.train.run.job import student_job
from amtml_fast.train.run.prepare import load_data
from amtml_fast.train.run.tasks import distill
from amtml_fast.train.teachers import frozen

NETS = '''
import torch
from torch import nn


class Net(nn.Module):
    """A small net with a residual connection, without BatchNorm and smooth (see small_run)."""

    def __init__(self, num_classes, in_channels, width, overwrites, unused, skips):
        super().__init__()
        self.first, self.second = (nn.Conv2d(c, width, 3, padding=1) for c in (in_channels, width))
        self.head = nn.Linear(16 * width, num_classes)
        self.overwrites, self.skips, self.calls = overwrites, skips, 0
        if unused:
            self.unused = nn.Linear(3, 3)

    def forward(self, x):
        x = self.first(x).tanh()
        out = self.second(x)
        if self.overwrites:
            out += x
            out = torch.tanh_(out)
        else:
            out = (out + x).tanh()
        self.calls += self.training
        if self.skips and self.training and self.calls >= self.skips:
            out = 0 * x + 1
        return self.head(nn.functional.avg_pool2d(out, 2).flatten(1))


def net(num_classes, in_channels, width=4, overwrites=False, unused=False, skips=0):
    return Net(num_classes, in_channels, width, overwrites, unused, skips)


def two_answers(num_classes, in_channels):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(num_classes, in_channels)

        def forward(self, x):
            return (self.net(x), self.net(x)) if self.training else self.net(x)

    return Two()


def colors_only(num_classes, in_channels):
    return net(num_classes, 3)


def overwrites(num_classes, in_channels):
    return nn.Sequential(nn.Hardtanh(0, 0.5, inplace=True), net(num_classes, in_channels))


class Detached(nn.Sequential):
    def forward(self, x):
        return super().forward(x).detach()


def detached(num_classes, in_channels):
    return Detached(net(num_classes, in_channels))


def nothing_trains(num_classes, in_channels):
    return net(num_classes, in_channels).requires_grad_(False)


def lazy(num_classes, in_channels, run=False):
    made = nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))
    if run:
        made(torch.zeros(1, in_channels, 8, 8))
    return made
'''

SMALL = ["student.factory=own_nets:net", "student.features=second", "student.groups={low: first, high: second}"]
SMALL += ["distill.epochs=2", "distill.lr=0.05"]


@pytest.fixture
def nets(place: Place) -> Place:
    """A place whose configurations know the networks above."""
    (place.folder / "own_nets.py").write_text(NETS)
    return place


def args(**args: object) -> str:
    return f"student.args={args}".replace("'", "").lower()


# --- maps that are overwritten ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [[], ["engine.compile=true"]], ids=["eager", "compiled"])
def test_a_student_that_overwrites_its_maps_learns_as_one_that_does_not(nets: Place, engine: list[str]) -> None:
    plain = nets.train(*SMALL, *engine, *own_weights(nets), args(overwrites=False), "name=plain")
    overwriting = nets.train(*SMALL, *engine, *own_weights(nets), args(overwrites=True))
    assert_near(plain, overwriting)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_hint_of_a_teacher_that_overwrites_it_is_the_modules_output(nets: Place, compiled: bool) -> None:
    maps = []
    for overwrites in (False, True):
        torch.manual_seed(0)
        own = {"width": 3, "overwrites": overwrites}
        file = nets.folder / f"{overwrites}.safetensors"
        save_file(build("own_nets:net", own, num_classes=10, in_channels=1, weights=None).state_dict(), file)
        model = f"model: {{factory: 'own_nets:net', args: {{width: 3, overwrites: {str(overwrites).lower()}}}, weights: {file}}}"
        settings = nets.load(
            f"teachers=[{{name: t, hint: second, {model}}}]", f"engine.compile={str(compiled).lower()}"
        )
        data = load_data(settings)
        found = frozen.load(settings, data, hints=True)
        batch = next(iter(Loader(data.train, data, 64)))
        assert [each.maps[0].shape for each in (found.run(batch.images), found.live(batch.images))] == [
            (64, 3, 8, 8)
        ] * 2
        maps += [found.run(batch.images).maps[0], found.live(batch.images).maps[0]]
    for other in maps[1:]:
        torch.testing.assert_close(other, maps[0], rtol=1e-5, atol=1e-6)
    assert maps[0].abs().max() > 1  # no tanh has gone over it


# --- names --------------------------------------------------------------------------------------------------------------


def test_a_group_may_be_called_features(place: Place) -> None:
    plain = place.train("student.groups={low: block1, high: block3}", "name=plain", *own_weights(place))
    named = place.train("student.groups={features: block1, high: block3}", *own_weights(place))
    assert_equal(plain, named)
    mapped = place.train("loss.mapping={a: features, b: high}", "student.groups={features: block1, high: block3}",
                         "name=mapped", *own_weights(place))  # fmt: skip
    assert mapped.finished()


def test_the_recipe_tells_the_adapters_map_from_the_groups(place: Place) -> None:
    recipes = [
        student_job(place.load(f"student.groups={{features: {path}, high: block3}}"), "amtml_kd", 0).recipe()
        for path in ("block1", "block2", "block3")
    ]
    assert all(one != two for i, one in enumerate(recipes) for two in recipes[:i])


# --- parameters that a step does not depend on --------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [[], ["engine.fsdp=true"]], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("kind", [{"unused": True}, {"skips": 1}], ids=["unused", "skips"])
def test_a_student_with_unused_parameters_trains_the_same_on_two_processes(
    nets: Place, engine: list[str], kind: dict[str, object]
) -> None:
    settings = [*SMALL, *engine, "student.groups={}", args(**kind), *own_weights(nets)]
    one = nets.train(*settings, "name=one", method="avg_mkd")
    done = in_two(nets, "distill", *settings, "--method=avg_mkd")
    assert done.returncode == 0, done.said
    two = Run(nets.folder / "small" / "avg_mkd-seed0")
    assert two.read_record()["processes"] == 2
    assert_near(one, two)


def test_a_step_that_leaves_parameters_out_later_ends_two_processes_with_a_message(nets: Place) -> None:
    settings = [*SMALL, "student.groups={}", args(skips=9), *own_weights(nets), "--method=avg_mkd"]
    done = in_two(nets, "distill", *settings)
    assert done.returncode != 0
    assert "error: AvgMKD, seed 0: a step leaves parameters out that the first one used" in done.said, done.said


def test_nothing_is_looked_for_where_every_parameter_is_used(nets: Place) -> None:
    done = in_two(nets, "distill", *PLAIN, *own_weights(nets))
    assert done.returncode == 0 and "find_unused_parameters" not in done.said, done.said


# --- networks that do not fit -------------------------------------------------------------------------------------------

MISFITS = [
    ("two_answers", r"the network must return logits \[2, 10\], for 2 images and 10 classes of digits, got tuple"),
    ("colors_only", r"the network must take images \[2, 1, 8, 8\] of digits, got RuntimeError: .*channels"),
    ("overwrites", r"the network must leave its images as they are, got one that writes into them"),
    ("detached", r"the network must return logits with a gradient, got detached ones"),
    ("nothing_trains", r"the network must have parameters that train, got none"),
]


@pytest.mark.parametrize(("factory", "message"), MISFITS, ids=[name for name, _ in MISFITS])
def test_a_network_that_does_not_fit_is_named_before_anything_is_trained(
    nets: Place, factory: str, message: str
) -> None:
    own = [f"student.factory=own_nets:{factory}", "student.args={}", "student.features=null", "student.groups={}"]
    with pytest.raises(ValueError, match=rf"student alone, seed 0: {message}"):
        nets.train(*own, method="student")
    settings = nets.load(*own, "name=untaught", "compare.methods=[student]")
    with pytest.raises(ValueError, match=message):
        compare(settings, QUIET)
    settings = nets.load(
        f"teachers.1.model.factory=own_nets:{factory}",
        "teachers.1.model.args={}",
        "name=untaught",
        "compare.methods=[student]",
    )
    with pytest.raises(ValueError, match=rf"teacher b: {message}"):
        compare(settings, QUIET)
    assert not (nets.folder / "untaught").exists()


def test_a_lazy_layer_is_named_before_anything_is_trained(nets: Place) -> None:
    """Peers are not run before their optimizer is made, and weights are not loaded into parameters without a shape."""
    own = ["student.factory=own_nets:lazy", "student.args={}", "student.features=null", "student.groups={}"]
    with pytest.raises(
        ValueError, match=r"own_nets:lazy must make .* a shape, got 1\.weight of a lazy layer: let the factory run"
    ):
        nets.train(*own, method="dml")
    assert nets.train(*own, "student.args={run: true}", method="dml").finished()


# --- one of a teacher's own kind ------------------------------------------------------------------------------------------


def test_a_student_that_starts_as_a_teacher_did_is_that_teacher_and_a_line_says_so(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """Teacher t trains with seed + t: the first one with 0 here, the second with 1."""
    twin = ["student.args={width: 6}", "distill={epochs: 1, batch_size: 128}", "compare.methods=[student]"]
    twin += ["compare.students=[{name: narrow, factory: small_cnn, args: {width: 4}}]", "compare.seeds=[0,1,2]"]
    line = "the same network from the same first weights: "
    settings = place.load(*twin)
    compare(settings, Display())
    said = capsys.readouterr().out
    assert (
        f"{line}student with seed 0 and teacher a; narrow with seed 1 and teacher b; another seed starts elsewhere"
        in said
    )
    for name, student in (("a", "student-seed0"), ("b", "student-narrow-seed1")):
        found = [load_file(file) for file in sorted((place.folder / "small").glob(f"*/{name}/model.safetensors"))]
        found += [load_file(place.folder / "small" / student / "student.safetensors")]
        assert len(found) == 2 and all(torch.equal(value, found[1][key]) for key, value in found[0].items())
    data = load_data(settings)
    for seed, says in ((0, True), (5, False)):
        distill(settings, data, "avg_mkd", seed, Display(), resume=False, fresh=False)
        assert (line in capsys.readouterr().out) == says
    start = str(place.folder / "small" / "teachers" / "a" / "model.safetensors")
    own = [*twin, f"student.weights={start}", *own_weights(place)]
    distill(place.load(*own, "name=own"), data, "student", 0, Display(), resume=False, fresh=False)
    assert line not in capsys.readouterr().out  # both start from elsewhere
