"""Pretrained networks of other libraries as teachers: stand-ins for the libraries, and the libraries where they are."""

from __future__ import annotations

import copy
import hashlib
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_run import QUIET
from torch import nn

from amtml_fast.train.config import reading
from amtml_fast.train.config.schema import Config, ConfigError
from amtml_fast.train.data import readers
from amtml_fast.train.data.images import ImageData, ImageSet, Loader
from amtml_fast.train.files import RunError
from amtml_fast.train.models import networks, zoo
from amtml_fast.train.models.features import FeatureExtractor
from amtml_fast.train.run.prepare import load_data
from amtml_fast.train.run.tasks import distill, teach
from amtml_fast.train.teachers import frozen
from amtml_fast.train.teachers.frozen import fingerprint, weights_file

CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Net(nn.Module):
    """As much of a library's net as is asked for: num_classes, a first convolution, parts with dotted paths."""

    def __init__(self, num_classes=10, in_channels=3, width=4):
        super().__init__()
        self.num_classes = num_classes
        self.features = nn.Sequential()
        self.features.add_module("stage1", nn.Conv2d(in_channels, width, 3, padding=1))
        self.output = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.output(self.features(x).mean((2, 3)))


def module(monkeypatch, name, **names):
    made = types.ModuleType(name)
    vars(made).update(names)
    monkeypatch.setitem(sys.modules, name, made)


@pytest.fixture(autouse=True)
def forget():
    zoo._fingerprint.cache_clear()


@pytest.fixture
def libraries(monkeypatch, tmp_path):
    """Stand-ins for both libraries; what they were asked to fetch is in the list."""
    fetched = []
    own = {"resnet20_cifar10": 10, "resnet56_cifar100": 100, "resnet20_svhn": 10, "resnet18": 1000}

    def get_model(name, **args):
        assert args.get("num_classes", 10) != 7  # as pytorchcv's CIFAR nets: a bare assertion
        return Net(**{"num_classes": own[name.lower()], **args})

    def get_model_file(model_name, local_model_store_dir_path="default"):
        fetched.append((model_name, local_model_store_dir_path))
        file = tmp_path / f"{model_name}.pth"
        if not file.is_file():
            raise ConnectionError("no route")
        return str(file)

    def create_model(name, pretrained=False, num_classes=1000, in_chans=3, width=4):
        if pretrained:
            fetched.append(name)
        if name.endswith(".nothing"):
            raise RuntimeError("No pretrained weights exist")
        torch.manual_seed(5)
        net = Net(num_classes, in_chans, width)
        net.pretrained_cfg = {"mean": (0.5, 0.6, 0.7), "std": (0.5, 0.4, 0.3)}
        return net

    module(monkeypatch, "pytorchcv")
    module(monkeypatch, "pytorchcv.model_provider", get_model=get_model, _models=dict.fromkeys(own))
    module(monkeypatch, "pytorchcv.models.common.model_store", get_model_file=get_model_file)
    known = ["resnet18", "resnet34"]
    module(
        monkeypatch,
        "timm",
        create_model=create_model,
        is_model=lambda name: name.partition(".")[0] in known,
        list_models=lambda: known,
    )
    return fetched


def published(folder, name, num_classes=10):
    """The weights that the stand-in for pytorchcv finds in its store."""
    net = Net(num_classes)
    torch.save({**net.state_dict(), "left_over": torch.zeros(1)}, folder / f"{name}.pth")
    return net


# --- factories


@pytest.mark.parametrize("library", ["pytorchcv", "timm"])
def test_a_missing_library_is_named_with_its_remedy(monkeypatch, library):
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf'needs the package {library} \(pip install "amtml-fast\[zoo\]"\)'):
        networks.build(library, {"name": "resnet18"}, num_classes=10, in_channels=3)


def test_a_hole_inside_a_library_is_not_taken_for_the_library(monkeypatch, tmp_path):
    (tmp_path / "timm.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        networks.build("timm", {"name": "resnet18"}, num_classes=10, in_channels=3)


@pytest.mark.parametrize(
    "factory, name, near", [("pytorchcv", "resnet56_cifr100", "resnet56_cifar100"), ("timm", "resnet19", "resnet18")]
)
def test_an_unknown_net_gives_the_near_names(libraries, factory, name, near):
    with pytest.raises(ValueError, match=rf"{factory} has no net '{name}'; near names: {near}"):
        networks.build(factory, {"name": name}, num_classes=10, in_channels=3)


@pytest.mark.parametrize("factory, name", [("pytorchcv", "ResNet56_CIFAR100"), ("timm", "resnet18.a1")])
def test_a_net_that_is_not_pretrained_takes_the_classes_and_channels_of_the_data(libraries, factory, name):
    net = networks.build(factory, {"name": name, "width": 6}, num_classes=3, in_channels=1)
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 3) and net.output.in_features == 6
    assert zoo.statistics(net) is None and libraries == []


PRETRAINED = [("pytorchcv", "resnet56_cifar100", 100), ("timm", "resnet18", 1000)]


@pytest.mark.parametrize("factory, name, classes", PRETRAINED)
def test_a_pretrained_net_of_other_classes_or_channels_is_refused_before_it_is_fetched(
    libraries, factory, name, classes
):
    args = {"name": name, "pretrained": True}
    message = rf"must have 10 classes like the data, got {factory}'s {name}, trained for {classes}"
    with pytest.raises(ValueError, match=message):
        networks.build(factory, args, num_classes=10, in_channels=3)
    with pytest.raises(ValueError, match=message):  # its head would be a new one, with random weights
        networks.build(factory, args | {"num_classes": 10}, num_classes=classes, in_channels=3)
    with pytest.raises(ValueError, match=rf"must take 1 channels like the data, got {factory}'s {name}, trained for 3"):
        networks.build(factory, args, num_classes=classes, in_channels=1)
    assert libraries == []


def test_published_weights_are_loaded_into_the_net(libraries, tmp_path):
    wanted = published(tmp_path, "resnet56_cifar100", 100).state_dict()
    args = {"name": "ResNet56_cifar100", "pretrained": True}
    net = networks.build("pytorchcv", args, num_classes=100, in_channels=3)
    assert net.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in net.state_dict().items())
    networks.build("pytorchcv", args | {"root": "elsewhere"}, num_classes=100, in_channels=3)
    assert libraries == [("resnet56_cifar100", "default"), ("resnet56_cifar100", "elsewhere")]


class Evil:
    def __reduce__(self):
        return (exec, ("import sys; sys.was_executed = True",))


def test_published_weights_are_never_executed(libraries, tmp_path):
    torch.save({"weight": Evil()}, tmp_path / "resnet18.pth")
    with pytest.raises(ValueError, match="pytorchcv's resnet18 cannot be made"):
        networks.build("pytorchcv", {"name": "resnet18", "pretrained": True}, num_classes=1000, in_channels=3)
    assert not hasattr(sys, "was_executed")


@pytest.mark.parametrize(
    "factory, args, error, message",
    [
        ("pytorchcv", {"name": "resnet18", "pretrained": True}, FileNotFoundError, r"resnet18 could .*\(no route\)"),
        ("timm", {"name": "resnet18.nothing", "pretrained": True}, ValueError, "18.nothing cannot .*No pretrained"),
        ("pytorchcv", {"name": "resnet20_cifar10", "num_classes": 7}, ValueError, "10 with .*7.* made .Assertion"),
    ],
)
def test_what_the_libraries_refuse_names_the_net(libraries, factory, args, error, message):
    with pytest.raises(error, match=message):
        networks.build(factory, args, num_classes=1000, in_channels=3)


def test_a_weights_file_replaces_the_published_weights(libraries, tmp_path):
    net = Net(7)
    save_file(net.state_dict(), tmp_path / "own.safetensors")
    args = {"name": "resnet18", "pretrained": True}
    loaded = networks.build("timm", args, num_classes=7, in_channels=3, weights=tmp_path / "own.safetensors")
    assert torch.equal(loaded.output.weight, net.output.weight)
    assert libraries == [] and args["pretrained"] and zoo.statistics(loaded) is None


@pytest.mark.parametrize(
    "factory, name, classes, wanted",
    [
        ("pytorchcv", "resnet56_cifar100", 100, CIFAR),
        ("pytorchcv", "resnet20_cifar10", 10, CIFAR),
        ("pytorchcv", "resnet20_svhn", 10, CIFAR),
        ("pytorchcv", "resnet18", 1000, IMAGENET),
        ("timm", "resnet18", 1000, ((0.5, 0.6, 0.7), (0.5, 0.4, 0.3))),
    ],
)
def test_a_pretrained_net_says_its_statistics(libraries, tmp_path, factory, name, classes, wanted):
    published(tmp_path, name, classes)
    net = networks.build(factory, {"name": name, "pretrained": True}, num_classes=classes, in_channels=3)
    assert zoo.statistics(net) == wanted and len(libraries) == 1


# --- normalization


@pytest.fixture
def images():
    """Sixteen 3x8x8 images of ten classes, normalized as the trainer's CIFAR."""
    pixels = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    split = ImageSet(pixels, torch.arange(16) % 10)
    return ImageData("colored", split, split, split, tuple("abcdefghij"), *IMAGENET)


def by_hand(pixels, mean, std):
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (mean, std))
    return (pixels.double() / 255 - mean) / std


def test_renormalized_images_are_those_of_the_nets_own_training(images):
    net, seen = Net(), []
    before = list(net.state_dict())
    net.features.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    zoo.renormalize(net, IMAGENET, CIFAR)
    batch = next(iter(Loader(images.test, images, 16)))
    net(batch.images)
    torch.testing.assert_close(seen[0].double(), by_hand(images.test.images, *CIFAR), rtol=1e-6, atol=1e-6)
    assert list(net.state_dict()) == before and type(net) is Net
    assert net.to("meta")(batch.images.to("meta")).device.type == "meta"  # scale and shift move with the net


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda net: torch.compile(net, backend="eager", fullgraph=True)])
def test_renormalizing_survives_copies_and_torch_compile(images, twin):
    net = Net().eval()
    wanted = net(by_hand(images.test.images, *CIFAR).float())
    zoo.renormalize(net, IMAGENET, CIFAR)
    batch = next(iter(Loader(images.test, images, 16)))
    logits, maps = twin(FeatureExtractor(net, {"hint": "features.stage1"}))(batch.images)
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    assert maps["hint"].shape == (16, 4, 8, 8)


def test_statistics_of_another_number_of_channels_are_refused():
    with pytest.raises(ValueError, match=r"model.mean must be 1 numbers, .*got \[0.1, 0.2\]"):
        zoo.renormalize(Net(), ((0.5,), (0.5,)), ((0.1, 0.2), (0.1, 0.2)))


# --- teachers


def settings(folder: Path, *models: str, hint: str = "features.stage1", more: str = "") -> Config:
    fill = "\n".join(f"  - {{name: t{i}, model: {model}, hint: {hint}}}" for i, model in enumerate(models))
    (folder / "zoo.yaml").write_text(
        f"name: zoo\nout: {folder}\nteachers:\n{fill}\n"
        "student: {factory: small_cnn, args: {width: 2}, features: block3, groups: {low: block1, high: block3}}\n"
        "teach: {epochs: 1, batch_size: 32}\ndistill: {epochs: 1, batch_size: 32}\n"
        f"engine: {{threads: 1, device: cpu}}\n{more}\n"
    )
    return reading.load(folder / "zoo.yaml")


PUBLISHED = "{factory: pytorchcv, args: {name: resnet20_cifar10, pretrained: true}}"


@pytest.mark.parametrize(
    "model, brings, file",
    [
        ("{factory: small_cnn}", False, "zoo/teachers/t0/model.safetensors"),
        ("{factory: small_cnn, weights: there.pt}", True, "there.pt"),
        ("{factory: timm, args: {name: resnet18}}", False, "zoo/teachers/t0/model.safetensors"),
        ("{factory: 'mine:net', args: {pretrained: true}}", False, "zoo/teachers/t0/model.safetensors"),
        (PUBLISHED, True, None),
    ],
)
def test_which_teachers_bring_their_weights(tmp_path, model, brings, file):
    asked = settings(tmp_path, model)
    teacher = asked.teachers[0]
    assert teacher.model.brings_weights is brings
    found = weights_file(asked, teacher)
    assert (found is None) if file is None else str(found).endswith(file)


def test_a_published_teacher_sees_its_own_normalization(libraries, tmp_path, images):
    net = published(tmp_path, "resnet20_cifar10").eval()
    own = "{mean: [0.1, 0.2, 0.3], std: [0.5, 0.6, 0.7], "
    save_file(net.state_dict(), tmp_path / "own.safetensors")
    given = f"{own}factory: timm, args: {{name: resnet18}}, weights: {tmp_path}/own.safetensors}}"
    asked = settings(tmp_path, PUBLISHED, own + PUBLISHED[1:], given, given.replace(own, "{"))
    batch = next(iter(Loader(images.val, images, 16)))
    outputs = frozen.load(asked, images, hints=True).live(batch.images)
    mine = ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    for i, (mean, std) in enumerate([CIFAR, mine, mine, IMAGENET]):
        seen = by_hand(images.val.images, mean, std)
        torch.testing.assert_close(outputs.logits[i].double(), net.double()(seen), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(outputs.maps[i].double(), net.features(seen), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "model, message",
    [
        ("{weights: a.pt, mean: [0.5]}", r"teachers.t0.model: mean and std .*got mean=\[0.5\], std=None"),
        ("{weights: a.pt, mean: [0.5], std: [0.0]}", r"teachers.0.model.std must be in \[1e-18, 1e\+18\], got 0.0"),
        ("{weights: a.pt, mean: [0.5], std: [1, 1]}", r"of equal length, .*std=\[1.0, 1.0\]"),
        ("{mean: [0.5], std: [1]}", "t0.model.mean must go with weights from elsewhere .* got none"),
        ("{weights: a.pt, mean: half}", "model.mean: .*list"),
    ],
)
def test_statistics_in_the_configuration_are_checked(tmp_path, model, message):
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, model)


def test_the_fingerprint_of_published_weights_is_of_names_and_bytes(libraries, tmp_path):
    net = published(tmp_path, "resnet20_cifar10")
    digest = hashlib.sha256()
    for key, value in sorted(net.state_dict().items()):
        digest.update(key.encode() + b"\0" + value.numpy().tobytes())
    asked = settings(tmp_path, PUBLISHED, PUBLISHED[:-1] + ", mean: [0.5, 0.5, 0.5], std: [1, 1, 1]}")
    prints = fingerprint(asked)
    assert prints["t0"] == digest.hexdigest() and prints["t1"].startswith(prints["t0"]) and prints["t1"] != prints["t0"]
    assert fingerprint(asked) == prints and len(libraries) == 1  # made once

    zoo._fingerprint.cache_clear()
    published(tmp_path, "resnet20_cifar10")  # other random weights
    assert fingerprint(asked)["t0"] != prints["t0"]


def test_an_untrained_teacher_and_a_missing_file_are_still_named(tmp_path):
    asked = settings(tmp_path, "{factory: small_cnn}")
    with pytest.raises(RunError, match=r"'t0': looked for .*model.safetensors: it is not trained yet"):
        fingerprint(asked)
    with pytest.raises(RunError, match=r"'t0': looked for gone.pt: there is no such file"):
        fingerprint(settings(tmp_path, "{factory: small_cnn, weights: gone.pt}"))


RANDOM_IMAGES = """
import torch


def both():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (80, 3, 32, 32), dtype=torch.uint8, generator=generator)
    pairs = [(image, i % 10) for i, image in enumerate(pixels)]
    return pairs[:60], pairs[60:]
"""


@pytest.fixture
def random_images(tmp_path, monkeypatch):
    (tmp_path / "random_images.py").write_text(RANDOM_IMAGES)
    monkeypatch.syspath_prepend(tmp_path)
    yield "data: {name: 'random_images:both', val_fraction: 0.2}"
    sys.modules.pop("random_images", None)


def distilled(asked: Config) -> dict:
    """The teachers that need it taught, a student distilled, one epoch each; the student's recipe."""
    loaded = load_data(asked)
    teach(asked, loaded, QUIET)
    finished = distill(asked, loaded, "amtml_kd", 0, QUIET, resume=False, fresh=False)
    (epoch,) = finished.read_metrics()
    assert all(torch.isfinite(torch.tensor(epoch[name])).all() for name in ("loss", "kl", "hint", "weight_mean"))
    return finished.read_record()["recipe"]


def test_published_teachers_need_no_teaching(libraries, tmp_path, random_images):
    published(tmp_path, "resnet20_cifar10")
    asked = settings(tmp_path, PUBLISHED, "{factory: small_cnn}", hint="", more=random_images)
    asked.teachers[0].hint, asked.teachers[1].hint = "features.stage1", "block3"
    recipe = distilled(asked)
    assert recipe["teachers"]["t0"] == fingerprint(asked)["t0"]
    assert not (tmp_path / "zoo" / "teachers" / "t0").exists() and (tmp_path / "zoo" / "teachers" / "t1").exists()


# --- the libraries themselves: random weights, nothing is fetched

NEEDS = 'needs pip install "amtml-fast[zoo]" (make test-zoo)'


@pytest.fixture
def offline(monkeypatch):
    for name in ("timm", "pytorchcv"):
        pytest.importorskip(name, reason=NEEDS)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_nets_of_both_libraries_are_taught_and_teach(offline, tmp_path, random_images):
    asked = settings(
        tmp_path,
        "{factory: pytorchcv, args: {name: resnet20_cifar10}}",
        "{factory: timm, args: {name: test_resnet}}",
        hint="",
        more=random_images,
    )
    asked.teachers[0].hint, asked.teachers[1].hint = "features.stage3", "layer4"
    distilled(asked)


def test_pretrained_nets_of_both_libraries_teach_as_they_are(offline, tmp_path, random_images, monkeypatch):
    from pytorchcv.model_provider import get_model
    from pytorchcv.models.common import model_store
    from timm import create_model

    monkeypatch.setattr(model_store, "get_model_file", lambda model_name: f"{tmp_path}/pytorchcv.pth")
    nets = [get_model("resnet20_cifar10"), create_model("test_resnet", num_classes=10)]
    for net, library in zip(nets, ("pytorchcv", "timm"), strict=True):
        torch.save(net.state_dict(), tmp_path / f"{library}.pth")
    overlay = f"{{file: {tmp_path}/timm.pth, num_classes: 10, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}}"
    asked = settings(
        tmp_path,
        PUBLISHED,
        f"{{factory: timm, args: {{name: test_resnet, pretrained: true, pretrained_cfg_overlay: {overlay}}}}}",
        hint="",
        more=random_images,
    )
    asked.teachers[0].hint, asked.teachers[1].hint = "features.stage3", "layer4"
    recipe = distilled(asked)
    assert recipe["teachers"] == fingerprint(asked)
    assert not (tmp_path / "zoo" / "teachers").exists()
    loaded = load_data(asked)
    batch = next(iter(Loader(loaded.val, loaded, 8)))
    outputs = frozen.load(asked, loaded, hints=True).live(batch.images)
    for i, (mean, std) in enumerate([CIFAR, ([0.5] * 3, [0.5] * 3)]):
        wanted = nets[i].eval()(by_hand(loaded.val.images[:8], mean, std).float())
        torch.testing.assert_close(outputs.logits[i], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "factory, args, error, message",
    [
        ("pytorchcv", {"name": "resnet56_cifr100"}, ValueError, "near names: .*resnet56_cifar100"),
        ("timm", {"name": "resnet18d0"}, ValueError, "near names: .*resnet18"),
        ("pytorchcv", {"name": "resnet56_cifar100", "pretrained": True}, ValueError, "10 classes .*trained for 100"),
        ("timm", {"name": "resnet18", "pretrained": True}, ValueError, "10 classes .*trained for 1000"),
        ("timm", {"name": "resnet18.no_tag"}, ValueError, "resnet18.no_tag .*cannot be made .*tag"),
        ("pytorchcv", {"name": "resnet20_cifar10", "num_classes": 7}, ValueError, "cannot be made .Assertion"),
    ],
)
def test_the_libraries_own_names_and_class_counts(offline, factory, args, error, message):
    with pytest.raises(error, match=message):
        networks.build(factory, args, num_classes=10, in_channels=3)


def test_weights_that_cannot_be_fetched(offline, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # read when it was imported
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="the weights of timm's test_resnet could not be fetched"):
        networks.build("timm", {"name": "test_resnet", "pretrained": True}, num_classes=1000, in_channels=3)


@pytest.mark.parametrize("classes", [10, 100])
def test_torchvision_reads_what_the_binary_version_holds(tmp_path, monkeypatch, classes):
    """Its own files, in their true format but small: the same images, labels and names in the same order."""
    datasets = pytest.importorskip("torchvision.datasets", reason=NEEDS)
    import pickle

    kind = getattr(datasets, f"CIFAR{classes}")
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    names = [f"class{i}" for i in range(classes)]
    key, meta_key = ("labels", "label_names") if classes == 10 else ("fine_labels", "fine_label_names")
    parts = []
    for file, _ in (*kind.train_list, *kind.test_list):
        pixels = torch.randint(0, 256, (2 * classes, 3072), dtype=torch.uint8)
        parts.append((pixels, torch.randperm(2 * classes) % classes))
        (folder / file).write_bytes(pickle.dumps({"data": pixels.numpy(), key: parts[-1][1].tolist()}))
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({meta_key: names}))
    for listed in ("train_list", "test_list"):
        monkeypatch.setattr(kind, listed, [[file, None] for file, _ in getattr(kind, listed)])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": None})

    arrays = readers.DOWNLOADS[f"cifar{classes}"](tmp_path)
    (*train, (test_pixels, test_labels)) = parts
    assert torch.equal(torch.from_numpy(arrays.train_images).flatten(1), torch.cat([pixels for pixels, _ in train]))
    assert arrays.train_labels.tolist() == torch.cat([labels for _, labels in train]).tolist()
    assert torch.equal(torch.from_numpy(arrays.test_images).flatten(1), test_pixels)
    assert arrays.test_labels.tolist() == test_labels.tolist() and arrays.classes == tuple(names)
