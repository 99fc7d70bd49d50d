"""FeatureExtractor: the right tensor from the right module, through every wrapper that a trainer puts around it."""

import copy

import pytest
import torch
from torch import nn

from amtml_fast.train import models
from amtml_fast.train.features import FeatureExtractor

GROUPS = {"low": "block1", "high": "block3"}


def small():
    torch.manual_seed(0)
    return models.small_cnn(10, width=4).eval()


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
