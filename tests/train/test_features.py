"""FeatureExtractor: the right tensor from the right module, through every wrapper that a trainer puts around it."""

import copy

import pytest
import torch
from torch import nn

from amtml_fast.train.models import networks
from amtml_fast.train.models.features import FeatureExtractor

GROUPS = {"low": "block1", "high": "block3"}


def small():
    torch.manual_seed(0)
    return networks.small_cnn(10, width=4).eval()


def check(extractor, model, dtype=torch.float32):
    """The extractor's output and maps are those of the model run by hand."""
    x = torch.randn(2, 1, 8, 8)
    output, maps = extractor(x)
    low = model.block1(x)
    high = model.block3(model.block2(low))
    assert list(maps) == ["low", "high"] and maps["low"].dtype == maps["high"].dtype == dtype
    torch.testing.assert_close(maps["low"], low)
    torch.testing.assert_close(maps["high"], high)
    torch.testing.assert_close(output, model(x))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_features_are_the_modules_outputs(prefix):
    model = small()
    extractor = FeatureExtractor(model, {name: prefix + path for name, path in GROUPS.items()})
    assert extractor.model is model
    check(extractor, model)


def test_gradients_flow_through_the_features():
    model = small()
    _, maps = FeatureExtractor(model, GROUPS)(torch.randn(2, 1, 8, 8))
    maps["low"].sum().backward()
    assert model.block1[0].weight.grad.abs().sum() > 0
    assert model.block3[1].weight.grad is None


def test_the_bare_models_state_dict_knows_nothing_of_the_extractor():
    extractor = FeatureExtractor(small(), GROUPS)
    small().load_state_dict(extractor.model.state_dict())


def test_nothing_is_held_after_forward():
    extractor = FeatureExtractor(small(), GROUPS)
    extractor(torch.randn(2, 1, 8, 8))
    assert extractor._caught == {}


class Overwriting(nn.Module):
    """Its maps are overwritten: `bn` always, `late` in training mode alone, `drop` in evaluation mode alone; `last` never."""

    def __init__(self):
        super().__init__()
        self.bn, self.late, self.drop, self.last = (nn.BatchNorm2d(2) for _ in range(4))
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        out = self.bn(x)
        out += x  # as published residual blocks do
        out = torch.relu_(out)
        out = self.late(out)
        out = out.mul_(0.5) if self.training else out * 2
        out = self.drop(out)
        out = out * 2 if self.training else out.mul_(0.5)
        return self.head(self.last(out).mean((2, 3)))


MAPS = ("bn", "late", "drop", "last")


def overwriting():
    torch.manual_seed(0)
    model = Overwriting()
    for norm in (model.bn, model.late, model.drop, model.last):
        nn.init.uniform_(norm.weight)
        nn.init.uniform_(norm.bias, -1, 1)
    return model


def maps_by_hand(model, x):
    """What the modules return, by code that overwrites nothing."""
    found = {"bn": model.bn(x)}
    found["late"] = model.late((found["bn"] + x).relu())
    found["drop"] = model.drop(found["late"] * (0.5 if model.training else 2))
    found["last"] = model.last(found["drop"] * (2 if model.training else 0.5))
    return found


def same_maps_and_gradients(extractor, model):
    """In extractor's mode, with gradients unless they are off."""
    twin, x = copy.deepcopy(model), torch.randn(4, 2, 3, 3)
    _, maps = extractor(x)
    wanted = maps_by_hand(twin, x)
    for name in MAPS:
        torch.testing.assert_close(maps[name], wanted[name])
    if torch.is_grad_enabled():
        names = [name for name, _ in twin.named_parameters() if "head" not in name]
        got = torch.autograd.grad(sum(maps[k].square().sum() for k in MAPS), [model.get_parameter(k) for k in names])
        want = torch.autograd.grad(sum(wanted[k].square().sum() for k in MAPS), [twin.get_parameter(k) for k in names])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


STUDENT, TEACHER = (torch.enable_grad, True), (torch.inference_mode, False)
RUNS = [
    (mode, training, backend) for mode, training in (STUDENT, TEACHER) for backend in (None, "aot_eager", "inductor")
]
RUNS += [(mode, training, None) for mode in (torch.no_grad, torch.enable_grad) for training in (True, False)]


# What Inductor makes of it is looked at where the extractor was probed, as it is in trainings.
@pytest.mark.parametrize(
    ("mode", "training", "backend", "probed"),
    [(*run, probed) for run in RUNS for probed in (False, True) if probed or run[2] != "inductor"],
)
def test_a_map_that_is_overwritten_later_is_the_modules_output(mode, backend, probed, training):
    torch.compiler.reset()
    model = overwriting().train(training)
    extractor = FeatureExtractor(model, {name: name for name in MAPS}).train(training)
    if probed:
        extractor.probe(torch.randn(2, 2, 3, 3), training=True)
        extractor.probe(torch.randn(2, 2, 3, 3))
    if backend is not None:
        extractor.compile(backend=backend, fullgraph=True)
    with mode():
        same_maps_and_gradients(extractor, model)


def test_a_probe_leaves_mode_and_statistics_and_ends_needless_copies(monkeypatch):
    model = overwriting()
    extractor = FeatureExtractor(model, {name: name for name in MAPS}).eval()
    before = copy.deepcopy(model.state_dict())
    extractor.probe(torch.randn(4, 2, 3, 3), training=True)
    assert not extractor.training and not model.bn.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    copied, clone = [], torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda x: copied.append(tuple(x.shape)) or clone(x))
    extractor.train()(torch.randn(3, 2, 3, 3))
    assert len(copied) == 2  # bn and late


def test_a_map_that_is_overwritten_in_another_mode_than_the_probes_is_an_error():
    extractor = FeatureExtractor(overwriting(), {name: name for name in MAPS})
    extractor.probe(torch.randn(4, 2, 3, 3))
    with pytest.raises(
        RuntimeError, match=r"the output of late='late' is overwritten by a later layer.*probe\(x\) again"
    ):
        extractor.train()(torch.randn(4, 2, 3, 3))
    extractor.probe(torch.randn(4, 2, 3, 3), training=True)
    extractor(torch.randn(4, 2, 3, 3))


def test_a_deep_copy_catches_for_itself():
    extractor = FeatureExtractor(small(), GROUPS)
    twin = copy.deepcopy(extractor)
    with torch.no_grad():
        twin.model.fc.bias.add_(1)
        twin.model.block1[1].bias.add_(1)
    check(twin, twin.model)
    check(extractor, extractor.model)


# --- wrappers


def test_autocast():
    model = small()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(FeatureExtractor(model, GROUPS), model, dtype=torch.bfloat16)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_around_the_extractor(one_process):
    model = small()
    wrapped = nn.parallel.DistributedDataParallel(FeatureExtractor(model, GROUPS))
    check(wrapped, model)
    output, maps = wrapped(torch.randn(2, 1, 8, 8))
    (output.sum() + maps["high"].sum()).backward()
    assert model.block1[0].weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="wrap the FeatureExtractor in DistributedDataParallel"):
        FeatureExtractor(nn.parallel.DistributedDataParallel(small()), GROUPS)


def test_compile_of_ddp_of_the_extractor(one_process):
    model = small()
    check(
        torch.compile(nn.parallel.DistributedDataParallel(FeatureExtractor(model, GROUPS)), backend="aot_eager"), model
    )


def test_compiled_extractor_has_no_graph_break():
    model = small()
    extractor = torch.compile(FeatureExtractor(model, GROUPS), backend="aot_eager", fullgraph=True)
    check(extractor, model)
    check(extractor, model)  # the compiled code, not the trace
    output, maps = extractor(torch.randn(2, 1, 8, 8))
    (output.sum() + maps["high"].sum()).backward()
    assert model.block1[0].weight.grad.abs().sum() > 0


def test_compiled_code_is_not_shared_between_different_paths():
    torch.compiler.reset()
    for path, channels in [("block1", 4), ("block2", 8)]:
        extractor = torch.compile(FeatureExtractor(small(), {"map": path}), backend="aot_eager", fullgraph=True)
        assert extractor(torch.randn(2, 1, 8, 8))[1]["map"].shape[1] == channels


@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_that_was_compiled_and_run_before(in_place):
    model = small()
    if in_place:
        model.compile(backend="aot_eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="aot_eager")
    compiled(torch.randn(2, 1, 8, 8))
    extractor = FeatureExtractor(compiled, GROUPS)
    assert extractor.model is model
    check(extractor, model)
    check(torch.compile(extractor, backend="aot_eager", fullgraph=True), model)


def test_a_part_wrapped_in_compile_is_found_by_its_plain_path():
    model = small()
    model.block1 = torch.compile(model.block1, backend="aot_eager")
    check(FeatureExtractor(model, GROUPS), model)
    # A module inside is found too, but a compiled part that has run does not see its hook.
    extractor = FeatureExtractor(model, {"conv": "block1.0"})
    with pytest.raises(RuntimeError, match=r"conv='block1.0' did not run .*compile the extractor instead"):
        extractor(torch.randn(2, 1, 8, 8))


def test_a_module_that_is_really_called_module_is_found_first():
    model = nn.Sequential()
    model.scale, model.module = nn.Identity(), nn.Sequential()
    model.module.scale = nn.ReLU()
    _, maps = FeatureExtractor(model, {"inner": "module.scale", "outer": "scale"})(torch.tensor([-1.0]))
    assert maps["inner"].item() == 0 and maps["outer"].item() == -1
    with pytest.raises(ValueError, match=r"no module map='_orig_mod'"):  # a bare prefix names nothing
        FeatureExtractor(model, {"map": "_orig_mod"})


# --- errors


def test_an_unknown_path_lists_near_names():
    with pytest.raises(ValueError, match=r"no module high='blok3'; near names: block3"):
        FeatureExtractor(small(), {"high": "blok3"})
    with pytest.raises(ValueError, match=r"no module high=''; near names: "):
        FeatureExtractor(small(), {"high": ""})


class Branches(nn.Module):
    """`shared` runs twice, `unused` never, `pair` returns two tensors."""

    def __init__(self):
        super().__init__()
        self.shared, self.unused, self.used = nn.Linear(3, 3), nn.Linear(3, 3), nn.Identity()
        self.pair = nn.LSTM(3, 3)

    def forward(self, x):
        return self.used(self.shared(self.shared(x))) + self.pair(x)[0]


def test_a_module_that_runs_twice_gives_its_last_output():
    model, x = Branches(), torch.randn(2, 3)
    _, maps = FeatureExtractor(model, {"twice": "shared"})(x)
    assert torch.equal(maps["twice"], model.shared(model.shared(x)))


def test_a_module_that_did_not_run_is_named_with_near_names():
    extractor = FeatureExtractor(Branches(), {"hint": "unused"})
    with pytest.raises(RuntimeError, match=r"hint='unused' did not run in this forward.*near names: used"):
        extractor(torch.randn(2, 3))


def test_an_output_that_is_no_tensor_is_named():
    with pytest.raises(TypeError, match="hint='pair' must return one tensor, got tuple"):
        FeatureExtractor(Branches(), {"hint": "pair"})(torch.randn(2, 3))
