"""A causal language model's output layer, and the hidden states that reach it. No logits are made."""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from torch import Tensor, nn

from amtml_fast.terms import LinearTeacher

NAME = "DistillationTrainer"


class OutputLayer:
    """The layer that makes a model's logits, and what the model does to them: ``softcap * tanh(scale * logits / softcap)``.
    ``name`` is what errors call the model.

    Both numbers are found by a probe, four tokens through the model: they have other names in the configuration of each
    architecture.
    """

    def __init__(self, model: Any, name: str):
        self.model, self.name = model, name
        self._caught: list[Tensor] = []
        self._loss_of: Callable[[Tensor], Tensor] | None = None
        config = getattr(model, "config", None)
        if getattr(config, "is_encoder_decoder", False):  # whose hidden states are of other tokens
            raise TypeError(
                f"{name} must be a causal language model, got {type(model).__name__}, an encoder-decoder "
                "(config.is_encoder_decoder=True)"
            )
        layer = self.layer
        if getattr(config, "return_dict", True) is False:
            raise ValueError(f"{name} must have config.return_dict=True, got False")
        self.logit_scale, self.softcap = _probe(model, layer, self.weight.detach(), self.bias, name)

    @property
    def layer(self) -> nn.Linear:
        """peft's copies have the layer's place, and ``set_adapter`` chooses among them at any time."""
        model: Any = self.model
        layer: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        copies = getattr(layer, "modules_to_save", None)
        if isinstance(copies, nn.ModuleDict):
            active = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in copies]
            layer = copies[active[0]] if active else layer.original_module
        # Of a kind of nn.Linear with a forward of its own, the weight may not be what makes the logits.
        if isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward:
            return layer
        kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
        hint = ", whose forward is its own" if isinstance(layer, nn.Linear) else ""
        if kind.startswith("peft."):  # W + B A
            kind = "peft's " + type(layer).__name__
            hint = "; peft may have the output layer in modules_to_save, not in target_modules"
        if kind == "peft's TrainableTokensWrapper":
            hint = "; trainable_token_indices are for a model with tie_word_embeddings=False, whose output layer they leave alone"
        raise TypeError(
            f"{self.name} must be a causal language model whose get_output_embeddings() is an nn.Linear, "
            f"got {type(model).__name__} with {kind}{hint}"
        )

    @property
    def classes(self) -> int:
        return self.layer.weight.shape[0]

    @property
    def weight(self) -> Tensor:
        with align_module_device(self.layer):  # an offloaded one is loaded, and outlives the block
            return gathered(self.layer.weight)

    @property
    def bias(self) -> Tensor | None:
        if self.layer.bias is None:
            return None
        with align_module_device(self.layer):
            return gathered(self.layer.bias)

    @property
    def is_offloaded(self) -> bool:
        """Whether some of the model is elsewhere until accelerate's hooks load it."""
        return any(p.is_meta for p in self.model.parameters())

    def moves_labels(self) -> bool:
        """Whether the model's own loss compares a token's logits with the label after it, as most do. Decoders of encoder-decoders
        (``BartForCausalLM``) compare them with the label of the same place, which their users have moved."""
        given = inspect.signature(type(self.model).forward).parameters.values()
        if not any(p.name == "labels" or p.kind is p.VAR_KEYWORD for p in given):
            return True
        probe = torch.linspace(0, 64, self.classes, dtype=torch.float32, device="cpu")
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=device_of_inputs(self.model))
        losses = []
        with _answering(self.model, self.layer, lambda _, args, out: probe.to(out).expand_as(out)):
            for first in (0, self.classes - 1):  # the label of the first place, and no other one
                labels = tokens.masked_fill(tokens == 0, -100)
                labels[0, 0] = first
                output = self.model(input_ids=tokens, labels=labels)
                if output.get("loss") is None:
                    return True
                losses.append(output["loss"].item())
        apart = (output.logits.amax() - output.logits.amin()).item()
        return not losses[0] - losses[1] > apart / 2  # NaN where no label counts

    def return_loss(self) -> None:
        """From now on the model returns what ``catch`` is given as its loss. It is made inside the model's forward, and this is
        called before anything wraps the model: what shares work out among processes has to see each use of a parameter."""
        # Methods, so that the model can be pickled with them.
        self.model.register_forward_pre_hook(self._without_count, with_kwargs=True)
        self.model.register_forward_hook(self._with_loss)

    def _without_count(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple:
        if self._loss_of is not None:
            kwargs.pop("num_items_in_batch", None)
        return args, kwargs

    def _with_loss(self, model: nn.Module, args: tuple, output: Any) -> Any:
        if self._loss_of is not None:
            loss, aux = self._loss_of(self._caught[-1]), output.get("aux_loss")
            if isinstance(aux, Tensor):  # of a mixture of experts; without labels the model has not added it
                loss = loss + self._router_coefficient() * aux.to(loss.device)
            output["loss"] = loss
        return output

    def _router_coefficient(self) -> float:
        """What the model multiplies the load-balancing loss of its routers by."""
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        for owner in (model, text_config(model)):
            for name in ("router_aux_loss_coef", "aux_loss_coef"):
                if getattr(owner, name, None) is not None:
                    return getattr(owner, name)
        raise ValueError(
            f"{self.name} must have router_aux_loss_coef or aux_loss_coef, as its output has aux_loss, got "
            f"{type(model).__name__} without"
        )

    @contextlib.contextmanager
    def catch(self, loss_of: Callable[[Tensor], Tensor] | None = None) -> Iterator[list[Tensor]]:
        """A list that has the hidden states [B, S, H] of each forward inside, whose logits are [B, 0, C]."""

        def before(layer: nn.Module, args: tuple) -> tuple:
            self._caught.append(args[0])
            return (args[0][..., :0, :], *args[1:])

        self._caught, self._loss_of = [], loss_of
        handle = self.layer.register_forward_pre_hook(before)
        try:
            yield self._caught
        finally:
            handle.remove()
            self._caught, self._loss_of = [], None

    def teach(self, inputs: Mapping[str, Any], device: torch.device) -> LinearTeacher:
        """What this frozen model has to say about the inputs, on ``device``; in eval mode, whoever has trained it in between."""
        with torch.inference_mode(), self.catch() as caught, self.without_cache(), self._in_eval_mode():
            self.model(**inputs)
        bias = None if self.bias is None else self.bias.detach().to(device)
        return LinearTeacher(caught[0].to(device), self.weight.detach().to(device), bias)

    @contextlib.contextmanager
    def _in_eval_mode(self) -> Iterator[None]:
        """Frozen layers may be the student's, too, which is in training, and goes on to its backward pass."""
        training = [module for module in self.model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    @contextlib.contextmanager
    def without_cache(self) -> Iterator[None]:
        """As Trainer has it for the student: with a cache, models do not keep the texts of a packed row apart."""
        config = text_config(self.model)
        before = getattr(config, "use_cache", None)
        if before is not None:
            config.use_cache = False
        try:
            yield
        finally:
            if before is not None:
                config.use_cache = before


def text_config(model: Any) -> Any:
    """The configuration that the language model reads, or None: of a model of texts and images that of its texts."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def device_of_inputs(model: Any) -> torch.device:
    """Of an offloaded embedding any: accelerate's hooks send the inputs to where it will be."""
    device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


def gathered(parameter: Tensor) -> Tensor:
    """A sharded parameter as a whole; its gradient is shared out again."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def rounding_of(x: Tensor) -> float:
    """The relative difference up to which two results count as equal."""
    return max(torch.finfo(x.dtype).eps, 1e-3)


@contextlib.contextmanager
def _answering(model: Any, layer: nn.Module, hook: Callable) -> Iterator[None]:
    """Inside, the model is in eval mode without gradients, and its output layer answers what this forward hook does."""
    handle, training = layer.register_forward_hook(hook), model.training
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        handle.remove()
        model.train(training)


@torch.no_grad()
def _probe(model: Any, layer: nn.Linear, weight: Tensor, bias: Tensor | None, name: str) -> tuple[float, float | None]:
    """The scale and the softcap that the model gives its logits. Its tokens are not to see later ones, and no hook may change what the
    layer makes of its weight and bias: here the layer itself makes nothing."""
    small, large = 2.0**-7, 2.0**13
    probe = torch.linspace(-64, 64, layer.weight.shape[0], dtype=torch.float32, device="cpu")
    probe[0], probe[-1] = small, large
    hidden: list[Tensor] = []
    hooked: list[bool] = []

    def replace(_: nn.Module, args: tuple, out: Tensor) -> Tensor:
        hidden.append(args[0])
        made = F.linear(args[0], weight, bias)
        hooked.append((out - made).norm().item() > rounding_of(out) * made.norm().item())
        return probe.to(out.device).expand(*out.shape[:-1], -1)

    tokens = torch.tensor([[0, 0], [0, 1]], dtype=torch.int64, device=device_of_inputs(model))
    with _answering(model, layer, replace):
        logits = model(input_ids=tokens).logits.float().cpu()
    if hooked[0]:
        raise ValueError(
            f"{name} must have an output layer whose hooks leave its results as they are, got {type(model).__name__}, where a forward "
            "hook changes them"
        )
    one, other = hidden[0][:, 0].float()
    if (one - other).norm() > rounding_of(hidden[0]) * one.norm():
        raise TypeError(
            f"{name} must be a causal language model, got {type(model).__name__}, whose tokens see those after them"
        )
    scale, cap = logits[0, 0, 0].item() / small, logits[0, 0, -1].item()
    softcap = None if math.isclose(cap, scale * large, rel_tol=1e-3) else cap
    made = probe * scale if softcap is None else softcap * torch.tanh(probe * scale / softcap)
    same = logits.shape == (2, 2, len(made)) and torch.allclose(made.expand_as(logits), logits, rtol=1e-3, atol=1e-3)
    if not scale > 0 or not same:
        raise ValueError(
            f"{name} must give its output layer's results as they are, scaled or soft-capped, got "
            f"{type(model).__name__}, which does something else to them"
        )
    return scale, softcap
