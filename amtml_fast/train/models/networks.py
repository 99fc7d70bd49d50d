"""The networks of the trainer: the CIFAR ResNet family, a small CNN for 8x8 digits, those of the zoo (pytorchcv, timm),
and any other by import path.

The ResNets are those of He et al. (2016), section 4.2: three stages at 1x, 2x, 4x the width, and option A shortcuts,
that is a strided identity whose new channels are zeros, so that a shortcut has no parameters.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..names import import_factory, near_names, pretrained
from . import zoo

# The parts that train of all networks that `build` has made and that are still there.
_MADE: weakref.WeakSet[nn.Module] = weakref.WeakSet()
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # what DDP and torch.compile put in front of a model's own names


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the option A shortcut: [N, c, H, W] -> [N, out_channels, H/stride, W/stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def shortcut(self, x: Tensor) -> Tensor:
        """Every stride-th pixel of `x`; the new channels are zeros, half of them before the old ones and half after."""
        if self.stride == 1 and self.new_channels == 0:
            return x
        before = self.new_channels // 2
        strided = x[:, :, :: self.stride, :: self.stride]
        return F.pad(strided, (0, 0, 0, 0, before, self.new_channels - before))

    def forward(self, x: Tensor) -> Tensor:
        # In place, where no gradient needs what is overwritten: a map less to write for each.
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(out)).add_(self.shortcut(x)), inplace=True)


class ResNet(nn.Module):
    """Stem, three stages of BasicBlocks at width, 2*width and 4*width, global average pooling, one linear layer."""

    def __init__(self, num_classes: int, blocks: Sequence[int], width: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stage1 = self._stage(width, width, blocks[0], stride=1)
        self.stage2 = self._stage(width, 2 * width, blocks[1], stride=2)
        self.stage3 = self._stage(2 * width, 4 * width, blocks[2], stride=2)
        self.fc = nn.Linear(4 * width, num_classes)
        _kaiming(self)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, count: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(count - 1)))

    def forward(self, images: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(images)), inplace=True)
        out = self.stage3(self.stage2(self.stage1(out)))  # [N, 4*width, H/4, W/4]
        return self.fc(out.mean(dim=(2, 3)))


class SmallCNN(nn.Module):
    """Three 3x3 convolutions of width, 2 * width and 4 * width channels with 2x2 max-pooling between, one linear layer."""

    def __init__(self, num_classes: int, width: int, in_channels: int) -> None:
        super().__init__()
        self.block1 = self._block(in_channels, width)
        self.block2 = nn.Sequential(nn.MaxPool2d(2), *self._block(width, 2 * width))
        self.block3 = nn.Sequential(nn.MaxPool2d(2), *self._block(2 * width, 4 * width))
        self.fc = nn.Linear(4 * width, num_classes)
        _kaiming(self)

    @staticmethod
    def _block(in_channels: int, out_channels: int) -> nn.Sequential:
        conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(images)))  # [N, 4*width, H/4, W/4]
        return self.fc(out.mean(dim=(2, 3)))


def _kaiming(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu" if isinstance(module, nn.Conv2d) else "linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def resnet(
    num_classes: int,
    *,
    depth: int | None = None,
    blocks: Sequence[int] | None = None,
    width: int = 16,
    in_channels: int = 3,
) -> nn.Module:
    """A CIFAR ResNet: [N, in_channels, H, W] -> [N, num_classes].

    Give either `depth` = 6n + 2 (20, 32, 44, 56, 110) or `blocks`, the block counts of the three stages; neither, both,
    or any other depth is a ValueError. Modules: conv1, bn1, stage1, stage2, stage3, fc.
    """
    _positive("resnet", num_classes=num_classes, width=width, in_channels=in_channels)
    if (depth is None) == (blocks is None):
        raise ValueError(
            f"resnet: exactly one of depth and blocks must be given, got depth={depth} and blocks={blocks}"
        )
    if depth is not None:
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"resnet: depth must be 6n + 2 (8, 14, 20, 32, 44, 56, 110, ...), got {depth}")
        blocks = [(depth - 2) // 6] * 3
    counts = list(blocks or ())
    if len(counts) != 3 or not all(isinstance(count, int) and count >= 1 for count in counts):
        raise ValueError(f"resnet: blocks must be three block counts of at least 1, got {counts}")
    return ResNet(num_classes, counts, width, in_channels)


def small_cnn(num_classes: int, *, width: int = 16, in_channels: int = 1) -> nn.Module:
    """A three-layer CNN for small images such as 8x8 digits (4x4 at least): [N, in_channels, H, W] -> [N, num_classes].

    Modules: block1, block2, block3 (width, 2*width, 4*width channels at full, half and quarter size), fc.
    """
    _positive("small_cnn", num_classes=num_classes, width=width, in_channels=in_channels)
    return SmallCNN(num_classes, width, in_channels)


def _positive(function: str, **values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{function}: {name} must be an integer of at least 1, got {value!r}")


MODELS: dict[str, Callable[..., nn.Module]] = {"resnet": resnet, "small_cnn": small_cnn, **zoo.FACTORIES}


def build(
    factory: str,
    args: Mapping[str, Any] | None = None,
    *,
    num_classes: int,
    in_channels: int,
    weights: str | Path | None = None,
) -> nn.Module:
    """The model that `factory` makes, with `weights` loaded where a file is given.

    factory: a name in MODELS, or "package.module:factory". It is called with **args, and with `num_classes` and
        `in_channels` where its signature names them and `args` does not; a factory with **kwargs (torchvision's)
        gets `num_classes` too.
    weights: a state dict, see `load_weights`; it replaces the pretrained weights of a zoo's net, which are then not
        fetched.
    Raises ValueError: an unknown name, module or argument (with the near names), or weights that do not fit; TypeError:
    the factory made no nn.Module.
    """
    make = _factory(factory)
    args = dict(args or {})
    if weights is not None and pretrained(factory, args):
        args["pretrained"] = False
    keywords = _keywords(make, factory, args, num_classes, in_channels)
    try:
        model = make(**keywords)
    except (ValueError, TypeError, ImportError, OSError):
        raise
    except Exception as error:  # of torch's or of the factory's own
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"model.factory: {factory} must make a network with {keywords}, got {type(error).__name__}: {reason}"
        ) from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"model.factory: {factory} must return a torch.nn.Module, got {type(model).__name__}")
    tensors = (*model.named_parameters(), *model.named_buffers())
    if lazy := next((name for name, tensor in tensors if is_lazy(tensor)), None):
        raise ValueError(
            f"model.factory: {factory} must make a network whose parameters all have a shape, got {lazy} of a lazy layer: let the "
            "factory run it once, on images of zeros"
        )
    parts = dict(model.named_modules())
    if known := [name or "all of it" for name, part in parts.items() if part in _MADE]:
        raise ValueError(
            f"model.factory: {factory} must make a new network each time, got one with a part of an earlier one ({known[0]}), and all "
            "that it has learned since"
        )
    _MADE.update(p for p in parts.values() if any(x.requires_grad for x in p.parameters(recurse=False)))
    if weights is not None:
        load_weights(model, weights)
    return model


def _factory(name: str) -> Callable[..., Any]:
    if name in MODELS:
        return MODELS[name]
    if ":" in name:
        return import_factory(name, "model.factory")
    raise ValueError(
        f"model.factory: no model {name!r}; near names: {near_names(name, MODELS)}; or give 'package.module:factory'"
    )


def _keywords(
    make: Callable[..., Any], factory: str, args: dict[str, Any], num_classes: int, in_channels: int
) -> dict[str, Any]:
    try:
        parameters = inspect.signature(make).parameters
    except ValueError:  # some builtins have no signature: only what the user wrote can be passed
        return args
    named = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in args:
        if name not in named and not takes_any:
            raise ValueError(f"model.args: {factory} takes no argument {name!r}; near names: {near_names(name, named)}")
    filled: dict[str, Any] = {}
    if "num_classes" in named or takes_any:
        filled["num_classes"] = num_classes
    if "in_channels" in named:
        filled["in_channels"] = in_channels
    return {**filled, **args}


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a state dict file into `model`: safetensors by its suffix, else a torch file, read with weights_only=True.

    The prefixes that DDP and torch.compile add to every key are taken off. Older files have no count of BatchNorm's
    batches: the model keeps its own. A file that is missing is a
    FileNotFoundError; one that is truncated, is no state dict, or differs from the model in a key or a shape is a
    ValueError that names it, and leaves the model as it was.
    """
    path = Path(path)
    state = zoo.with_batch_counts(model, _without_prefixes(_read_state(path)))
    own = model.state_dict()
    problems = [f"{key}: the file has no such key" for key in own if key not in state]
    problems += [f"{key}: the model has no such key" for key in state if key not in own]
    problems += [
        f"{key}: the model has {list(own[key].shape)}, the file {list(value.shape)}"
        for key, value in state.items()
        if key in own and own[key].shape != value.shape
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"model.weights: {path} does not fit {type(model).__name__}: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(state)


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"model.weights: looked for the state dict {path}, not found")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise ImportError(
            f"model.weights: reading {path} needs the package safetensors (pip install safetensors)"
        ) from error
    except Exception as error:  # a broken file ends in any of a dozen exception types, by where it is cut
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"model.weights: {path} is truncated or no state dict ({type(error).__name__}: {reason})"
        ) from error
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"model.weights: {path} must hold a state dict (names to tensors), got {_describe(state)}")
    return state


def _describe(value: object) -> str:
    if isinstance(value, dict):
        return f"a dict with the keys {list(value)[:5]}"
    return type(value).__name__


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = next((p for p in WRAPPER_PREFIXES if all(key.startswith(p) for key in state)), None)
    if prefix is None:
        return state
    return _without_prefixes({key.removeprefix(prefix): value for key, value in state.items()})
