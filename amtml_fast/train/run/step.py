"""One step of a training: from the places of its images to new parameters and the epoch's sums.

The same code runs as it is and is captured as a graph (graphs.py). So `learn` looks at no value on the device, and all that changes
from step to step comes to it in tensors: its inputs, the learning rates, and the seed of the random numbers, which the trainer sets
before the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..config.schema import ConfigError
from ..data.images import Batch, Draws, Loader
from ..methods.base import StepLoss
from ..models.features import restoring_state
from ..progress import Display
from ..teachers.frozen import Outputs, Teachers
from . import graphs
from .distiller import Distiller
from .graphs import Capture, Graph
from .metrics import Sums
from .timing import WHOLE, StepTimer


class TrainingStep:
    """`step(draws, rates)` trains on the images of one optimizer step, a batch for each round of accumulation."""

    def __init__(
        self,
        accelerator: Accelerator,
        bare: Distiller,
        loader: Loader,
        teachers: Teachers | None,
        memory: torch.memory_format,
    ) -> None:
        self.accelerator, self.bare, self.loader, self.teachers = accelerator, bare, loader, teachers
        self.memory = memory
        self.sums, self.timer = Sums(accelerator.device), StepTimer(accelerator.device)
        self.frozen: Sequence[nn.Parameter] = ()  # take no part in the optimizer's step
        self.own_rates: list[Tensor] = []  # of the optimizer's groups, where a graph is to read them
        self.rates: list[float] = []  # the same as numbers
        self.run: Callable[..., Any] = lambda *inputs, key: self.learn(*inputs)
        # images -> the teachers' outputs
        self.compute: Callable[[Tensor], Outputs] | None = teachers.computed if teachers else None
        self.model: nn.Module
        self.optimizer: Any

    def trains(self, model: nn.Module, optimizer: Any, *, rates_on_device: bool) -> None:
        """The module as it is called, and the optimizer, as accelerate has prepared them."""
        self.model, self.optimizer = model, optimizer
        self.bare.timer = self.timer
        if rates_on_device:
            zero = torch.zeros((), dtype=torch.float32, device=self.accelerator.device)
            self.own_rates = [zero.clone() for _ in optimizer.param_groups]

    def capture(self, asked: bool | str, title: str, display: Display) -> None:
        """From now on as a graph: the whole step where that is possible, else what the teachers compute. asked:
        engine.cuda_graphs; ConfigError where it is true and the whole step cannot be captured."""
        kind = self.accelerator.device.type
        if asked is False or (asked == "auto" and kind not in graphs.CAPTURES):
            return

        def refuse(why: str) -> NoReturn:
            raise ConfigError(f"config: engine.cuda_graphs must be auto or false for {title}, got true: {why}")

        def failed(error: RuntimeError) -> None:
            why = f"CUDA could not capture it ({(str(error).splitlines() or [type(error).__name__])[0]})"
            if asked is True:
                refuse(why)
            display.warn(f"{title}: trains without a CUDA graph: {why}")
            self.optimizer.optimizer.zero_grad()

        if kind not in graphs.CAPTURES:
            refuse(f"there is no CUDA device, only {kind}")
        how = graphs.CAPTURES[kind](self.accelerator.device)
        obstacle = self.obstacle(how)
        if obstacle is None:
            self.run = Graph(self.learn, how, failed)
            return
        if asked is True:
            refuse(obstacle)
        rest = "only the teachers are captured" if self.teachers else "nothing is captured"
        display.say(f"{title}: no CUDA graph of the whole step, {rest}: {obstacle}")
        if self.teachers:
            self.compute = Graph(self.teachers.computed, how, failed)

    def obstacle(self, how: Capture) -> str | None:
        """What stands in the way of a graph of the whole step."""
        if self.accelerator.num_processes > 1:
            return "several processes exchange gradients within the step"
        inputs = self.first_inputs()
        self.gradients(*inputs)  # what waits once, at the first call, is not in the way
        places = how.waits(lambda: self.gradients(*inputs))
        return f"the step waits for the device ({'; '.join(dict.fromkeys(places))})" if places else None

    def __call__(self, draws: Sequence[Draws], rates: Sequence[float], frozen: Sequence[nn.Parameter] = ()) -> None:
        """Nothing here waits for the device."""
        self.frozen = frozen
        self.set_rates(rates)
        self.timer.mark("data")
        inputs = [x for each in draws for x in self.inputs(each)]
        self.run(*inputs, key=bool(frozen))
        self.sums.examples += sum(len(each.places) for each in draws)
        if isinstance(self.run, Graph) and self.run.replay is not None:
            self.timer.mark(WHOLE)

    def set_rates(self, rates: Sequence[float]) -> None:
        self.rates = list(rates)
        for own, rate in zip(self.own_rates, rates):
            own.fill_(rate)
        readers: Sequence[float | Tensor] = self.own_rates or rates
        for group, reader in zip(self.optimizer.param_groups, readers, strict=True):
            group["lr"] = reader

    def plain_rates(self) -> None:
        """As numbers in the optimizer, for a checkpoint, until the next step."""
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate

    def inputs(self, draws: Draws) -> list[Tensor]:
        """What `learn` takes for a batch: where its images are and how they are augmented, and what is kept of the teachers."""
        kept = self.teachers.looked_up(self.loader.view, draws.places, draws.on_host) if self.teachers else None
        if kept is None:
            return [draws.places, draws.flips, draws.offsets]
        self.timer.mark("teachers")
        return [draws.places, draws.flips, draws.offsets, *kept.logits, *kept.maps]

    def learn(self, *inputs: Tensor) -> None:
        """Forward, backward and the sums of each batch, then the optimizer's step."""
        accelerator, timer = self.accelerator, self.timer
        timer.begin()
        accelerator.step = 0  # accelerate counts the rounds
        rounds = accelerator.gradient_accumulation_steps
        size = len(inputs) // rounds
        for first in range(0, len(inputs), size):
            batch, taught = self.batch(*inputs[first : first + size])
            with accelerator.accumulate(self.model):
                out, logits = self.forward(self.model, batch, taught)
                accelerator.backward(out.loss)
                timer.mark("student")
                for parameter in self.frozen:
                    parameter.grad = None
                self.optimizer.step()
                self.optimizer.zero_grad()
            timer.mark("optimizer")
            self.sums.add(out, logits, batch.labels)

    def batch(self, index: Tensor, flips: Tensor, offsets: Tensor, *kept: Tensor) -> tuple[Batch, Outputs]:
        """The images and labels, and what the teachers say about them: what is kept, or computed now."""
        batch = self.loader.batch(index, flips, offsets)
        self.timer.mark("data")
        if kept and self.teachers is not None:
            count = len(self.teachers.names)
            return batch, Outputs(list(kept[:count]), list(kept[count:]))
        taught = self.compute(batch.images) if self.compute is not None else Outputs([], [])
        self.timer.mark("teachers")
        return batch, taught

    def forward(self, model: nn.Module, batch: Batch, taught: Outputs) -> tuple[StepLoss, Tensor]:
        """What the module says about a batch that the teachers have seen."""
        images = batch.images.contiguous(memory_format=self.memory)
        with self.accelerator.autocast():
            return model(images, batch.labels, taught.logits, taught.maps)

    def first_inputs(self) -> list[Tensor]:
        """Of the first batch."""
        self.loader.set_epoch(1)
        return self.inputs(next(self.loader.draws()))

    def gradients(self, *inputs: Tensor) -> list[Tensor | None]:
        """Of the parameters, for a batch: nothing is applied, and buffers stay as they were."""
        with restoring_state(self.bare):
            batch, taught = self.batch(*inputs)
            out, _ = self.forward(self.bare.train(), batch, taught)
            trained = [p for p in self.bare.parameters() if p.requires_grad]
            return list(torch.autograd.grad(out.loss, trained, allow_unused=True))
