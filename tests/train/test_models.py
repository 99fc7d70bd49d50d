"""The networks, their parameter counts, and what building one from a config can get wrong."""

import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from amtml_fast.train.models import networks

COUNTS = [  # depth, blocks, width, parameters at 10 and 100 classes
    (20, None, 16, 269_722, 275_572),
    (32, None, 16, 464_154, 470_004),
    (44, None, 16, 658_586, 664_436),
    (56, None, 16, 853_018, 858_868),
    (110, None, 16, 1_727_962, 1_733_812),
    (None, [3, 3, 3], 8, 68_050, 71_020),
    (None, [5, 5, 5], 8, 116_882, 119_852),
    (None, [3, 5, 7], 8, 151_634, 154_604),
]


@pytest.mark.parametrize("depth, blocks, width, ten, hundred", COUNTS)
def test_resnet_has_the_published_parameter_counts(depth, blocks, width, ten, hundred):
    for classes, wanted in [(10, ten), (100, hundred)]:
        model = networks.resnet(classes, depth=depth, blocks=blocks, width=width)
        assert sum(p.numel() for p in model.parameters()) == wanted


def test_resnet_stages_halve_the_size_and_double_the_width():
    model = networks.resnet(7, blocks=[1, 2, 1], width=4, in_channels=1)
    assert [name for name, _ in model.named_children()] == ["conv1", "bn1", "stage1", "stage2", "stage3", "fc"]
    out = model.stage1(model.conv1(torch.zeros(2, 1, 28, 28)))
    assert out.shape == (2, 4, 28, 28)
    out = model.stage2(out)
    assert out.shape == (2, 8, 14, 14)
    assert model.stage3(out).shape == (2, 16, 7, 7)
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 7)


def test_option_a_shortcut_is_a_strided_identity_padded_with_zeros():
    block = networks.BasicBlock(2, 4, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)  # silences the convolutions: the block's output is relu(shortcut)
    x = torch.arange(1.0, 33.0).reshape(1, 2, 4, 4)
    wanted = torch.zeros(1, 4, 2, 2)  # channel 0 and 3 are new, 1 and 2 are the old ones at even rows and columns
    wanted[0, 1] = torch.tensor([[1.0, 3.0], [9.0, 11.0]])
    wanted[0, 2] = torch.tensor([[17.0, 19.0], [25.0, 27.0]])
    assert torch.equal(block(x), wanted)
    assert torch.equal(block.shortcut(-x), -wanted)
    same = networks.BasicBlock(2, 2, stride=1)
    assert same.shortcut(x) is x


def test_odd_widths_pad_one_channel_more_behind():
    block = networks.BasicBlock(1, 4, stride=1)
    padded = block.shortcut(torch.ones(1, 1, 2, 2))
    assert padded.sum(dim=(0, 2, 3)).tolist() == [0, 4, 0, 0]


def test_small_cnn_takes_8x8_digits():
    model = networks.small_cnn(10, width=8)
    assert [name for name, _ in model.named_children()] == ["block1", "block2", "block3", "fc"]
    maps = model.block3(model.block2(model.block1(torch.zeros(3, 1, 8, 8))))
    assert maps.shape == (3, 32, 2, 2)
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "exactly one of depth and blocks must be given"),
        ({"depth": 20, "blocks": [3, 3, 3]}, "exactly one of depth and blocks must be given"),
        ({"depth": 18}, r"6n \+ 2 .* got 18"),
        ({"depth": 2}, r"6n \+ 2 .* got 2"),
        ({"blocks": [3, 3]}, r"three block counts .* got \[3, 3\]"),
        ({"blocks": [3, 0, 3]}, r"three block counts .* got \[3, 0, 3\]"),
        ({"depth": 20, "width": 0}, "width must be an integer of at least 1, got 0"),
    ],
)
def test_resnet_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        networks.resnet(10, **arguments)


# --- build


def test_build_fills_in_classes_and_channels_unless_args_do():
    model = networks.build("small_cnn", {"width": 4}, num_classes=7, in_channels=3)
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 7)
    model = networks.build("small_cnn", {"width": 4, "num_classes": 5}, num_classes=7, in_channels=3)
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 5)


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A module of the user's own, importable as `zoo_of_tests`."""
    (tmp_path / "zoo_of_tests.py").write_text(
        "from torch import nn\n"
        "seen = []\n"
        "def plain(hidden):\n    seen.append(hidden)\n    return nn.Linear(hidden, 2)\n"
        "def anything(**kwargs):\n    seen.append(kwargs)\n    return nn.Identity()\n"
        "def nothing():\n    return 3\n"
        "body = nn.Linear(5, 5)\n"
        "def with_body(num_classes):\n    return nn.Sequential(body, nn.ReLU(), nn.Linear(5, num_classes))\n"
        "def whole():\n    return body\n"
        "fixed = nn.Linear(5, 5).requires_grad_(False)\n"
        "def with_fixed_body(num_classes):\n    return nn.Sequential(fixed, nn.Linear(5, num_classes))\n"
    )
    (tmp_path / "zoo_with_a_hole.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("zoo_of_tests", None)


def test_build_by_import_path_passes_only_what_the_signature_takes(zoo):
    model = networks.build("zoo_of_tests:plain", {"hidden": 3}, num_classes=7, in_channels=1)
    assert isinstance(model, nn.Linear)
    networks.build("zoo_of_tests:anything", {"a": 1}, num_classes=7, in_channels=1)
    assert sys.modules["zoo_of_tests"].seen == [3, {"num_classes": 7, "a": 1}]


@pytest.mark.parametrize("factory, part", [("whole", "all of it"), ("with_body", "0")])
def test_a_network_that_was_made_before_is_refused(zoo, factory, part):
    """A student began with what the one before it had learned, or with a teacher that went on learning."""
    first = networks.build(f"zoo_of_tests:{factory}", num_classes=7, in_channels=1)
    wanted = (
        rf"zoo_of_tests:{factory} must make a new network each time, got one with a part of an earlier one \({part}\)"
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=wanted):
            networks.build(f"zoo_of_tests:{factory}", num_classes=7, in_channels=1)
        first.requires_grad_(False)  # as a teacher is frozen: its BatchNorm would be the student's


def test_a_part_that_never_learns_may_be_shared(zoo):
    for _ in range(2):
        networks.build("zoo_of_tests:with_fixed_body", num_classes=7, in_channels=1)


@pytest.mark.parametrize(
    "factory, args, error, message",
    [
        ("resnett", {}, ValueError, "no model 'resnett'; near names: resnet"),
        ("resnet", {"dept": 20}, ValueError, "no argument 'dept'; near names: depth"),
        ("zoo_of_tests:plane", {}, ValueError, "no callable 'plane'; near names: plain"),
        ("zoo_of_tests:seen", {}, ValueError, "no callable 'seen'"),
        ("zoo_of_testz:plain", {}, ValueError, "'zoo_of_testz', which cannot be found"),
        ("zoo_of_tests:", {}, ValueError, "must be 'package.module:factory', got 'zoo_of_tests:'"),
        ("zoo_of_tests:nothing", {}, TypeError, "must return a torch.nn.Module, got int"),
        ("zoo_with_a_hole:plain", {}, ModuleNotFoundError, "not_installed_anywhere"),
    ],
)
def test_build_refuses(zoo, factory, args, error, message):
    with pytest.raises(error, match=message):
        networks.build(factory, args, num_classes=10, in_channels=1)


# --- weights


def small(width=4):
    return networks.small_cnn(10, width=width)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_weights_load_from_both_formats_and_out_of_wrappers(tmp_path, suffix, prefix):
    torch.manual_seed(0)
    model, path = small(), tmp_path / f"weights{suffix}"
    state = {prefix + key: value for key, value in model.state_dict().items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    loaded = networks.build("small_cnn", {"width": 4}, num_classes=10, in_channels=1, weights=path)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("keep", [0, 5, 0.5, -1])
def test_a_truncated_weights_file_is_named(tmp_path, suffix, keep):
    path = tmp_path / f"weights{suffix}"
    save_file(small().state_dict(), path) if suffix == ".safetensors" else torch.save(small().state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=rf"weights{suffix} is truncated or no state dict"):
        networks.load_weights(small(), path)


def test_foreign_and_missing_weights_files_are_named(tmp_path):
    text = tmp_path / "notes.pt"
    text.write_text("not a state dict")
    with pytest.raises(ValueError, match=r"notes.pt is truncated or no state dict"):
        networks.load_weights(small(), text)
    torch.save({"epoch": 3, "model": small().state_dict()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"must hold a state dict .* got a dict with the keys \['epoch', 'model'\]"):
        networks.load_weights(small(), tmp_path / "checkpoint.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"must hold a state dict .* got list"):
        networks.load_weights(small(), tmp_path / "list.pt")
    with pytest.raises(FileNotFoundError, match=r"looked for the state dict .*nowhere.pt, not found"):
        networks.load_weights(small(), tmp_path / "nowhere.pt")


class Evil:
    """Unpickling this runs code."""

    def __reduce__(self):
        return (exec, ("import sys; sys.was_executed = True",))


def test_a_pickle_is_never_executed(tmp_path):
    torch.save({"weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil.pt"):
        networks.load_weights(small(), tmp_path / "evil.pt")
    assert not hasattr(sys, "was_executed")


def test_weights_of_another_architecture_name_the_first_differences_and_change_nothing(tmp_path):
    model, path = small(4), tmp_path / "weights.pt"
    before = {key: value.clone() for key, value in model.state_dict().items()}

    torch.save(small(8).state_dict(), path)
    with pytest.raises(
        ValueError, match=r"block1.0.weight: the model has \[4, 1, 3, 3\], the file \[8, 1, 3, 3\].*more"
    ):
        networks.load_weights(model, path)

    torch.save(networks.resnet(10, depth=32, width=4).state_dict(), path)
    with pytest.raises(
        ValueError,
        match=r"weights.pt does not fit ResNet: stage1.3.conv1.weight: the model has no such key; .*; and 69 more",
    ):
        networks.load_weights(networks.resnet(10, depth=20, width=4), path)
    torch.save(networks.resnet(10, depth=20, width=4).state_dict(), path)
    with pytest.raises(ValueError, match=r"fit ResNet: stage1.3.conv1.weight: the file has no such key; .*69 more"):
        networks.load_weights(networks.resnet(10, depth=32, width=4), path)

    state = small(4).state_dict()
    state["head.weight"] = state.pop("fc.weight")
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"fc.weight: the file has no .*head.weight: the model has no"):
        networks.load_weights(model, path)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_without_batch_counts_load_and_nothing_else_may_be_missing(tmp_path, prefix):
    saved, path = small(), tmp_path / "old.pt"
    for norm in (module for module in saved.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        torch.nn.init.normal_(norm.running_mean)
    old = {prefix + key: x for key, x in saved.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert len(old) == len(saved.state_dict()) - 3
    torch.save(old, path)
    model = small()
    model.block1[1].num_batches_tracked += 7
    networks.load_weights(model, path)
    for key, value in model.state_dict().items():
        assert torch.equal(
            value, saved.state_dict()[key] if prefix + key in old else torch.tensor(7 * ("block1" in key))
        )
    for key in (f"{prefix}block1.1.running_mean", f"{prefix}fc.bias", f"{prefix}block2.2.weight"):
        torch.save({name: x for name, x in old.items() if name != key}, path)
        with pytest.raises(ValueError, match=rf"{key.removeprefix(prefix)}: the file has no such key"):
            networks.load_weights(model, path)


class Counted(torch.nn.Module):
    """A count of its own, which is no BatchNorm's."""

    def __init__(self, num_classes):
        super().__init__()
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.register_buffer("running_mean", torch.tensor(0.0))


def test_a_count_that_is_no_batch_norms_is_asked_for(tmp_path):
    torch.save({"running_mean": torch.tensor(0.0)}, tmp_path / "old.pt")
    with pytest.raises(ValueError, match="num_batches_tracked: the file has no such key"):
        networks.load_weights(Counted(10), tmp_path / "old.pt")
