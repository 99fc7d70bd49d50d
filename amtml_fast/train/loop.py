"""One training run, of a teacher or of a student: the loop, its checkpoints and what it leaves in its folder."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import Tensor, nn

from . import data as datasets
from . import teachers as frozen
from .config import ConfigError, EngineConfig, StagesConfig, TrainConfig, to_yaml
from .jobs import Distiller, Job, make_distiller, teachers_of
from .memory import PeakMemory
from .methods import StepLoss
from .progress import Bar, Display
from .run import Diverged, Run, RunError, chosen_backends, differences, git_commit, versions

# Mean normalised entropy of the teacher weights beyond which the adapter has stopped telling examples apart.
UNIFORM, ONE_HOT = 0.999, 0.01
ADAPTER = "adapter"  # its group of the optimiser


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run: what is on disk can be resumed."""

    def __init__(self, job: Job, done: int) -> None:
        super().__init__(f"{job.title}: stopped; {done} of {job.train.epochs} epochs are safe in {job.folder}")
        self.job, self.done = job, done


class Stop:
    """While it is open, Ctrl-C (and SIGTERM, where the caller handles it) is raised by ``check()`` alone, between steps.

    Raised anywhere, KeyboardInterrupt can come in the middle of another library's lock and leave it locked for good:
    TensorBoard's writer then waits for ever. A second Ctrl-C is raised at once.
    """

    def __init__(self) -> None:
        self.asked, self.previous = False, dict[int, Any]()

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if callable(signal.getsignal(number)):  # neither ignored nor left to the system
                    self.previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def check(self) -> None:
        if self.asked:
            raise KeyboardInterrupt


def make_optimizer(train: TrainConfig, module: Distiller) -> torch.optim.Optimizer:
    """One optimiser over student, hint projections F_t and adapter; the adapter has its regulariser for decay."""
    adapter = getattr(module.objective, "adapter", None)
    own = list(adapter.parameters()) if adapter is not None else []
    ids = {id(p) for p in own}
    groups = [{"params": [p for p in module.parameters() if id(p) not in ids], "weight_decay": train.weight_decay}]
    groups += [{"params": own, "weight_decay": 0.0, "name": ADAPTER}] if own else []
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=train.lr)
    nesterov = train.nesterov and train.momentum > 0.0
    return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, nesterov=nesterov)


def learning_rate(train: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """The rate at a step: a pure function, so that there is no scheduler state to save."""
    epoch, total = step / steps_per_epoch, train.epochs
    if train.schedule == "onecycle":
        # Up from lr/25 over 30 % of the run, then down to almost nothing, both along half a cosine.
        top = 0.3 * total
        if epoch < top:
            return train.lr * (1 / 25 + (1 - 1 / 25) * 0.5 * (1 - math.cos(math.pi * epoch / top)))
        return train.lr * (1e-4 + (1 - 1e-4) * 0.5 * (1 + math.cos(math.pi * (epoch - top) / (total - top))))
    if epoch < train.warmup:
        return train.lr * (step + 1) / (train.warmup * steps_per_epoch + 1)
    if train.schedule == "cosine":
        done = (epoch - train.warmup) / max(1e-9, total - train.warmup)
        return train.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if train.schedule == "step":
        return train.lr * train.gamma ** sum(epoch >= milestone for milestone in train.milestones)
    return train.lr


def adapter_rate(stages: StagesConfig, epoch: int) -> float | None:
    """The adapter's own rate in an epoch (from 1); None: it has the student's."""
    if stages.adapter_lr is None:
        return None
    return stages.adapter_lr * 0.1 ** sum(epoch > milestone for milestone in stages.adapter_milestones)


def of_classes(data: datasets.ImageData, classes: Sequence[int] | None) -> datasets.ImageData:
    """The data with the training images of these classes alone; validation and test stay whole."""
    if classes is None:
        return data
    known = len(data.classes)
    if not classes or not all(0 <= label < known for label in classes):
        raise ConfigError(f"config: teachers.classes: labels in [0, {known}) wanted, got {list(classes)}")
    train = data.train
    keep = torch.isin(train.labels, torch.tensor(list(classes), device=train.labels.device))
    return replace(data, train=datasets.ImageSet(train.images[keep], train.labels[keep]))


class Sums:
    """Sums of an epoch on the device, read once at its end."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.totals, self.examples = device, dict[str, Tensor](), 0

    def add(self, out: StepLoss, logits: Tensor, labels: Tensor) -> None:
        n = len(labels)
        self.examples += n
        self._add("train_accuracy", (logits.argmax(1) == labels).sum())
        for name, value in {"loss": out.loss.detach(), **out.terms}.items():
            self._add(name, value.float() * n)
        if out.weights is not None:
            w = out.weights.float().reshape(-1, out.weights.shape[-1])
            entropy = torch.special.entr(w).sum() / math.log(max(2, w.shape[1]))
            self._add("entropy", entropy)
            self._add("weight_mean", w.sum(0))
            # Not bincount, which waits for the device to learn how many bins there are.
            self._add("weight_won", (w.argmax(1, keepdim=True) == torch.arange(w.shape[1], device=w.device)).sum(0))

    def _add(self, name: str, value: Tensor) -> None:
        value = value.double() if self.device.type != "mps" else value.float()
        self.totals[name] = self.totals[name] + value if name in self.totals else value

    def means(self, accelerator: Accelerator) -> dict[str, Any]:
        """Means per example over all processes; one transfer."""
        self._add("examples", torch.tensor(float(self.examples), device=self.device))
        flat = torch.cat([value.reshape(-1) for value in self.totals.values()])
        numbers = accelerator.reduce(flat, reduction="sum").tolist()
        means: dict[str, Any] = {}
        for name, value in self.totals.items():
            part, numbers = numbers[: value.numel()], numbers[value.numel() :]
            means[name] = part if value.ndim else part[0]
        n = means.pop("examples")
        return {k: [x / n for x in v] if isinstance(v, list) else v / n for k, v in means.items()}


def make_accelerator(engine: EngineConfig, folder: Path) -> Accelerator:
    """Accelerate's engine: device, processes (accelerate launch, torchrun), mixed precision, TensorBoard."""
    if engine.threads is not None:
        torch.set_num_threads(engine.threads)
    # Without cpu=True, a launch of several processes on a machine without GPU trains each one by itself.
    cpu = engine.device == "cpu" or not torch.accelerator.is_available()
    return Accelerator(
        cpu=cpu,
        mixed_precision=engine.mixed_precision,
        gradient_accumulation_steps=engine.gradient_accumulation_steps,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(folder)),
    )


def train(
    job: Job,
    data: datasets.ImageData,
    teachers: frozen.Teachers | None,
    display: Display,
    *,
    resume: bool = True,
    fresh: bool = False,
) -> Run:
    """Trains `job` to its last epoch and returns its finished folder; a finished one is returned as it is.

    An unfinished folder is continued if `resume`, started over if `fresh`, and a RunError otherwise. Raises Interrupted
    on Ctrl-C.
    """
    accelerator = make_accelerator(job.config.engine, job.folder)
    run = Run(job.folder, writes=accelerator.is_main_process)
    with accelerator.main_process_first():  # the recipe of a pretrained teacher may have to fetch it
        recipe = job.recipe()
    ready = not fresh and finished(job, resume=resume)
    accelerator.wait_for_everyone()  # nobody writes before everybody has looked
    if ready:
        return run
    if fresh:
        run.clear()
        accelerator.wait_for_everyone()
    data, memory = data.to(accelerator.device), PeakMemory(accelerator.device)
    trainer = _Trainer(job, run, accelerator, data, teachers, display)
    with Stop() as stop:
        try:
            trainer.restore()
            run.start(to_yaml(job.config), trainer.record | {"recipe": recipe})
            trainer.fit(stop)
            trainer.finish(recipe, memory.read())
            stop.check()
        except KeyboardInterrupt:
            raise Interrupted(job, trainer.done) from None
        finally:
            # Not end_training(): it would also end the process group, which the next run needs.
            for tracker in accelerator.trackers:
                tracker.finish()
            accelerator.free_memory()
    accelerator.wait_for_everyone()
    return run


def collapsed(row: Mapping[str, Any], teachers: Sequence[str]) -> str | None:
    """What to say about an adapter with these metrics of an epoch; None while its entropy is between the bounds."""
    entropy = row.get("entropy")
    if entropy is None or ONE_HOT <= entropy <= UNIFORM:
        return None
    if entropy > UNIFORM:
        return (
            "the teacher weights are uniform (normalised entropy above 0.999); "
            "if that lasts, try a smaller loss.regularizer_weight or a larger loss.init_scale"
        )
    share, name = max(zip(row["weight_won"], teachers, strict=True))
    return (
        f"one teacher has all the weight (normalised entropy below 0.01), {name} on {100 * share:.0f} % of the examples; "
        "if that lasts, try a larger loss.regularizer_weight, a smaller loss.init_scale, or loss.adapter_label_weight=1"
    )


def finished(job: Job, *, resume: bool = True) -> bool:
    """True if the folder holds this very run, finished. RunError if it holds another, or one not to be resumed."""
    run, recipe = Run(job.folder), job.recipe()
    if not run.exists():
        return False
    record = run.read_record()
    different = differences(record.get("recipe", {}), recipe)
    if different:
        shown = "; ".join(f"{key}: {there!r} there, {here!r} here" for key, there, here in different[:3])
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise RunError(
            f"{run.folder}: holds a run of another configuration ({shown}{more}). "
            "Start it over with --fresh, or give this one a place of its own with name=... or out=..."
        )
    if not record.get("finished") and not resume:
        raise RunError(
            f"{run.folder}: holds an unfinished run ({len(run.read_metrics())} of {job.train.epochs} epochs). "
            "Continue it with --resume or start it over with --fresh."
        )
    return bool(record.get("finished"))


class _Trainer:
    """The state of one run while it trains."""

    def __init__(
        self,
        job: Job,
        run: Run,
        accelerator: Accelerator,
        data: datasets.ImageData,
        teachers: frozen.Teachers | None,
        display: Display,
    ) -> None:
        self.job, self.run, self.accelerator, self.display = job, run, accelerator, display
        self.data = of_classes(data, job.classes)
        self.teachers = teachers_of(job, teachers)
        engine = job.config.engine
        self.memory = torch.channels_last if engine.channels_last else torch.contiguous_format
        module = make_distiller(job, self.data, self.teachers, accelerator.num_processes)
        module.to(accelerator.device, memory_format=self.memory)  # type: ignore[call-overload]
        self.bare, self.done, self.warned = module, 0, set[str]()
        self.loader = self._loader(engine.gradient_accumulation_steps)
        # Accumulation never reaches over the end of an epoch: what does not fill a step is left out, as drop_last does.
        self.steps = len(self.loader) // engine.gradient_accumulation_steps
        if self.steps == 0:
            raise ConfigError(
                f"config: batch_size: at most {len(self.data.train.labels)} (the training images) wanted, "
                f"got {job.train.batch_size}"
            )
        if engine.compile:
            torch.compiler.reset()  # or the networks of earlier runs would use up the number of recompilations
            for network in (module.student, *getattr(module.objective, "peers", ())):
                network.compile()  # in place: the state dict keeps its names
        self.model, self.optimizer = accelerator.prepare(module, make_optimizer(job.train, module))
        self.seconds = 0.0
        self.record: dict[str, Any] = {
            "method": job.method.name,
            "label": job.method.label,
            "student": job.student,
            "seed": job.seed,
            "epochs": job.train.epochs,
            "steps_per_epoch": self.steps,
            "parameters": sum(p.numel() for p in module.student.parameters()),
            "device": str(accelerator.device),
            "processes": accelerator.num_processes,
            "versions": versions(),
            "backends": chosen_backends(),
            "git_commit": git_commit(),
            "teachers": self.teachers.names if self.teachers else [],
            "finished": False,
        }

    def _loader(self, accumulation: int) -> datasets.Loader:
        train = self.job.train
        if train.batch_size % accumulation:
            raise ConfigError(
                f"config: batch_size: a multiple of engine.gradient_accumulation_steps={accumulation} wanted, "
                f"got {train.batch_size}"
            )
        return datasets.Loader(
            self.data.train,
            self.data,
            train.batch_size // accumulation,
            shuffle=True,
            augment=self.job.config.data.augment,
            **self.job.fixed_views(),
            drop_last=True,
            seed=self.job.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )

    def restore(self) -> None:
        """Continues after the last checkpoint, if there is one."""
        state = self.run.load_checkpoint()
        if state is None:
            self.run.cut_metrics(0) if self.run.metrics.is_file() else None
            return
        try:
            self.bare.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.accelerator.scaler is not None and state["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.done, self.seconds = int(state["epoch"]), float(state["seconds"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise RunError(
                f"{self.run.checkpoint}: does not fit this run: {error}. "
                "The file is left as it is; start over with --fresh."
            ) from None
        self.run.cut_metrics(self.done)

    def save(self) -> None:
        scaler = self.accelerator.scaler
        self.run.save_checkpoint(
            {
                "epoch": self.done,
                "seconds": self.seconds,
                "model": self.bare.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
        )

    def fit(self, stop: Stop) -> None:
        job, n = self.job, self.steps * self.job.train.batch_size
        if self.done:
            self.display.say(f"{job.title}: continuing after epoch {self.done} of {job.train.epochs}")
        # Without purge_step, TensorBoard would show the epoch that a kill cut short twice.
        self.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": self.done + 1}})
        with self.display.bar(job.title, n * job.train.epochs) as bar:
            bar.add(n * self.done)
            for epoch in range(self.done + 1, job.train.epochs + 1):
                began = time.perf_counter()
                row = self.epoch(epoch, bar, stop)
                row["val_accuracy"] = frozen.accuracy(self.bare.student, self.data.val, self.data)
                self.seconds += time.perf_counter() - began
                self.check(row)
                self.run.add_metrics(row)
                self.accelerator.log({k: v for k, v in row.items() if isinstance(v, float)}, step=epoch)
                self.done = epoch
                self.save()
                stop.check()
                bar.note(f"epoch {epoch}/{job.train.epochs}, validation {100 * row['val_accuracy']:.1f} %")

    def epoch(self, epoch: int, bar: Bar, stop: Stop) -> dict[str, Any]:
        """One pass over the training split; returns its row of metrics.jsonl without the validation accuracy."""
        job, accelerator = self.job, self.accelerator
        began, sums = time.perf_counter(), Sums(accelerator.device)
        # All randomness of an epoch follows from (seed, epoch, process): resuming needs no generator state.
        torch.manual_seed((job.seed * 1_000_003 + epoch) * 1_009 + accelerator.process_index)
        frozen_adapter = self.frozen_adapter(epoch)
        accumulation = job.config.engine.gradient_accumulation_steps
        self.loader.set_epoch(epoch)
        self.model.train()
        lr, own_lr = 0.0, adapter_rate(job.config.stages, epoch)
        for i, batch in enumerate(self.loader):
            if i == self.steps * accumulation:
                break
            lr = learning_rate(job.train, (epoch - 1) * self.steps + i // accumulation, self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = own_lr if group.get("name") == ADAPTER and own_lr is not None else lr
            images = batch.images.contiguous(memory_format=self.memory)
            taught = self.teachers.outputs(batch) if self.teachers else frozen.Outputs([], [])
            with accelerator.accumulate(self.model):
                out, logits = self.model(images, batch.labels, taught.logits, taught.maps)
                accelerator.backward(out.loss)
                for parameter in frozen_adapter:
                    parameter.grad = None
                self.optimizer.step()
                self.optimizer.zero_grad()
            sums.add(out, logits, batch.labels)
            bar.add(len(batch.labels) * accelerator.num_processes)
            stop.check()
        row = {"epoch": epoch, "lr": lr, **sums.means(accelerator)}
        row["seconds"] = time.perf_counter() - began
        return row

    def frozen_adapter(self, epoch: int) -> list[nn.Parameter]:
        """The adapter's parameters in the second of two stages: without a gradient the optimiser leaves them alone.

        Not requires_grad=False, which DDP does not allow to change; the weights still follow the live student.
        """
        last = self.job.config.stages.adapter_epochs
        adapter = getattr(self.bare.objective, "adapter", None)
        return list(adapter.parameters()) if adapter is not None and last is not None and epoch > last else []

    def check(self, row: dict[str, Any]) -> None:
        """Stops at a diverged loss; warns once about an adapter that no longer tells examples apart."""
        if not math.isfinite(row["loss"]):
            raise Diverged(
                f"{self.job.title}: the loss is {row['loss']} after epoch {row['epoch']}; try a lower learning rate "
                f"(now {self.job.train.lr}). The checkpoint of epoch {self.done} is kept."
            )
        learned = hasattr(self.bare.objective, "adapter")  # other weights are what their method makes them
        collapse = collapsed(row, self.record["teachers"]) if learned else None
        kind = "" if collapse is None else collapse.partition(" (")[0]
        if collapse is not None and kind not in self.warned:
            self.warned.add(kind)
            self.display.warn(f"{self.job.title}, epoch {row['epoch']}: {collapse}")

    def finish(self, recipe: Mapping[str, Any], peak: int | None) -> None:
        """The final figures and files; run.json says `finished` last, so a kill in here only repeats this."""
        student, data = self.bare.student, self.data
        result = {
            "val_accuracy": frozen.accuracy(student, data.val, data),
            "test_accuracy": frozen.accuracy(student, data.test, data),
        }
        self.run.write_tensors(self.job.file, student.model.state_dict())
        if objective := self.bare.objective.state_dict():
            self.run.write_tensors("objective.safetensors", objective)
        self.run.write_json(self.run.result, result)
        steps = self.steps * self.job.train.epochs
        trained = sum(row["seconds"] for row in self.run.read_metrics())
        self.record |= {"seconds_total": self.seconds, "seconds_per_step": trained / steps}
        self.record |= {"peak_memory": peak, "finished": True}
        self.run.write_record(self.record | {"recipe": recipe})
