"""Pretrained networks of other libraries, by name: pytorchcv's (many of them for CIFAR) and timm's.

Both are optional (the extra `zoo`) and imported when a net of theirs is asked for. A pretrained net comes with the
statistics by which its training images were normalized, as `input_mean` and `input_std`; `renormalize` makes it take
images that were normalized by others.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import pickle
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data.readers import IMAGENET_MEAN, IMAGENET_STD
from ..names import near_names

# What pytorchcv trained its nets for 32x32 images with, SVHN's too.
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR_SUFFIXES = ("_cifar10", "_cifar100", "_svhn")


def pytorchcv(
    name: str, num_classes: int | None = None, in_channels: int | None = None, *, pretrained: bool = False, **args: Any
) -> nn.Module:
    """pytorchcv's net `name`, such as resnet56_cifar100; **args go to its get_model (`root`: where weights are kept).

    pretrained: with its published weights, fetched once; `num_classes` and `in_channels` must then be the net's own.
    Raises ImportError: pytorchcv is not installed; ValueError: an unknown name (with the near ones), or a number of
    classes or channels that the net does not have; FileNotFoundError: the weights cannot be fetched.
    """
    get_model = _library("pytorchcv.model_provider").get_model
    known = _library("pytorchcv.model_provider")._models
    if name.lower() not in known:
        raise ValueError(f"model.args.name: pytorchcv has no net {name!r}; near names: {near_names(name, known)}")
    if not pretrained:
        wanted = _given(num_classes=num_classes, in_channels=in_channels)
        with _named(f"pytorchcv's {name} with {wanted | args}"):
            return get_model(name, **wanted, **args)
    folder = {"local_model_store_dir_path": args.pop("root")} if "root" in args else {}
    with _named(f"pytorchcv's {name}"):
        net = get_model(name, **args)
        _check_fit(f"pytorchcv's {name}", net, num_classes, in_channels)
        # Not get_model(pretrained=True): that unpickles whatever the file holds.
        file = _library("pytorchcv.models.common.model_store").get_model_file(name.lower(), **folder)
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = with_batch_counts(net, state)
        net.load_state_dict({key: state[key] for key in net.state_dict()})  # some files hold more than the net
    small = name.lower().endswith(CIFAR_SUFFIXES)
    return _with_statistics(net, *((CIFAR_MEAN, CIFAR_STD) if small else (IMAGENET_MEAN, IMAGENET_STD)))


def timm(
    name: str, num_classes: int | None = None, in_channels: int | None = None, *, pretrained: bool = False, **args: Any
) -> nn.Module:
    """timm's net `name`, such as resnet18 or resnet18.a1_in1k; **args go to its create_model.

    The rest is as with `pytorchcv`.
    """
    library = _library("timm")
    if ":" not in name and not library.is_model(name):  # a colon: "hf-hub:owner/name"
        near = near_names(name, library.list_models())
        raise ValueError(f"model.args.name: timm has no net {name!r}; near names: {near}")
    if not pretrained:
        wanted = _given(num_classes=num_classes, in_chans=in_channels)
        with _named(f"timm's {name} with {wanted | args}"):
            return library.create_model(name, **wanted, **args)
    with _named(f"timm's {name}"):
        # With random weights first: what does not fit is said before anything is fetched.
        _check_fit(f"timm's {name}", library.create_model(name, **args), num_classes, in_channels)
        net = library.create_model(name, pretrained=True, **args)
    return _with_statistics(net, net.pretrained_cfg["mean"], net.pretrained_cfg["std"])


FACTORIES: dict[str, Callable[..., nn.Module]] = {"pytorchcv": pytorchcv, "timm": timm}


def fingerprint(factory: str, args: Mapping[str, Any]) -> str:
    """SHA-256 of a pretrained net's state dict, names and bytes; computed once for the same arguments."""
    return _fingerprint(factory, json.dumps(dict(args), sort_keys=True))


@functools.cache
def _fingerprint(factory: str, args: str) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(FACTORIES[factory](**json.loads(args)).state_dict().items()):
        digest.update(key.encode() + b"\0")
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def with_batch_counts(net: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict, with the net's own counts of BatchNorm's batches where it has none, as older files have none."""
    own = net.state_dict()
    norms = [f"{name}." if name else "" for name, module in net.named_modules() if isinstance(module, _BatchNorm)]
    counts = {f"{norm}num_batches_tracked" for norm in norms if f"{norm}running_mean" in state} & own.keys()
    return {**{key: own[key] for key in counts}, **state}


Statistics = tuple[Sequence[float], Sequence[float]]  # mean and std of each channel, for images in [0, 1]


def statistics(model: Any) -> Statistics | None:
    """What a net says that its training images were normalized by: its `input_mean` and `input_std`."""
    return (model.input_mean, model.input_std) if hasattr(model, "input_mean") else None


def renormalize(model: nn.Module, given: Statistics, wanted: Statistics) -> None:
    """Make `model` take images normalized by the (mean, std) `given`, though its weights want those of `wanted`.

    A pre-hook, so that the model keeps its class, its dotted paths and its state dict. Scale and shift are buffers, so
    that they follow it to a device.
    """
    for key, values in zip(("mean", "std"), wanted, strict=True):
        if len(values) != len(given[0]):
            raise ValueError(
                f"model.{key} must be {len(given[0])} numbers, one for each channel of the data, got {list(values)}"
            )
    (mean, std), (own_mean, own_std) = (
        [torch.tensor(values, dtype=torch.float64, device="cpu").view(-1, 1, 1) for values in pair]
        for pair in (given, wanted)
    )
    model.register_buffer("_input_scale", (std / own_std).float(), persistent=False)
    model.register_buffer("_input_shift", ((mean - own_mean) / own_std).float(), persistent=False)
    model.register_forward_pre_hook(_rescale)


def _rescale(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    images: Tensor = inputs[0]
    return (images * model.get_buffer("_input_scale") + model.get_buffer("_input_shift"), *inputs[1:])


def _library(module: str) -> types.ModuleType:
    package = module.partition(".")[0]
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise  # it is there; something that it imports is not
        raise ImportError(
            f'model.factory: {package} needs the package {package} (pip install "amtml-fast[zoo]")'
        ) from error
    return importlib.import_module(module)


def _given(**values: int | None) -> dict[str, int]:
    return {name: value for name, value in values.items() if value is not None}


def _check_fit(what: str, net: nn.Module, num_classes: int | None, in_channels: int | None) -> None:
    """That a pretrained net has the classes and channels of the data; None is not asked."""
    if num_classes is not None and net.num_classes != num_classes:
        raise ValueError(
            f"model.args: the net must have {num_classes} classes like the data, got {what}, trained for {net.num_classes} "
            "(pretrained=false makes one with random weights)"
        )
    first = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
    if in_channels is not None and first.in_channels != in_channels:
        raise ValueError(
            f"model.args: the net must take {in_channels} channels like the data, got {what}, trained for "
            f"{first.in_channels} (pretrained=false makes one with random weights)"
        )


def _with_statistics(net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    vars(net).update(input_mean=tuple(mean), input_std=tuple(std))
    return net


@contextmanager
def _named(what: str) -> Iterator[None]:
    """The libraries' complaints, some of them bare assertions, as errors that name the net."""
    try:
        yield
    except OSError as error:  # no network, or a file that is not there
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"model.args: the weights of {what} could not be fetched ({reason}); "
            "or name a file by model.weights, with model.mean and model.std"
        ) from error
    except (AssertionError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"model.args: {what} cannot be made ({type(error).__name__}: {error})") from error
