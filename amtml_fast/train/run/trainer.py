"""One training run, of a teacher or of a student: the loop, its checkpoints and what it leaves in its folder."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from ..config.reading import to_yaml
from ..data.images import Draws, ImageData, ImageSet, Loader, drawn_seed
from ..files import RunError, differences
from ..models.compiling import compile_in_place
from ..models.evaluate import count_correct
from ..models.layout import memory_format
from ..progress import Bar, Display
from ..teachers import frozen
from ..teachers.frozen import Teachers
from . import graphs, preflight, processes
from .distiller import make_distiller, teachers_of
from .folder import Diverged, Run, alone, some
from .job import Job, with_networks
from .memory import PeakMemory
from .metrics import collapsed
from .optim import ADAPTER, adapter_rate, learning_rate, make_optimizer
from .prepare import data_of, make_accelerator, same_data
from .step import TrainingStep
from .stop import Interrupted, Stop
from .timing import PARTS
from .versions import chosen_backends, git_commit, versions

# Several processes agree on a stop at every so many steps: each time they wait for each other.
AGREE_EVERY = 10


def train(
    job: Job,
    data: ImageData,
    teachers: Teachers | None,
    display: Display,
    *,
    resume: bool = True,
    fresh: bool = False,
) -> Run:
    """Trains `job` to its last epoch and returns its finished folder; a finished one is returned as it is.

    An unfinished folder is continued if `resume`, started over if `fresh`, and a RunError otherwise, as is one in which
    another process is at work. Raises Interrupted on Ctrl-C.
    """
    accelerator = make_accelerator(job.config.engine, job.folder)
    run = Run(job.folder, writes=accelerator.is_main_process)
    with accelerator.main_process_first():  # the recipe of a pretrained teacher may have to fetch it
        recipe = job.recipe()
    if fresh:
        keeps_its_start(job)
    ready = not fresh and run.finished() and finished(job, data)
    accelerator.wait_for_everyone()  # nobody writes before everybody has looked
    if ready:
        return run
    with alone(run.folder, accelerator, display):
        if not fresh and finished(job, data, resume=resume):  # by another process, after we had looked
            return run
        fresh = fresh or run.outdated()
        accelerator.wait_for_everyone()
        known = data.fingerprint(of_teachers=job.teacher is not None)
        data, memory = data.to(accelerator.device), PeakMemory(accelerator.device)
        trainer = Trainer(job, run, accelerator, data, teachers, display)  # which may find that something does not fit
        trainer.record |= {"recipe": recipe, "data": known, "mean": data.mean, "std": data.std}
        if fresh:
            run.clear()
            accelerator.wait_for_everyone()
        with Stop(accelerator.num_processes) as stop:
            try:
                with explained(job, accelerator.num_processes):
                    trainer.restore()
                    run.start(to_yaml(job.asked), trainer.record)
                    trainer.fit(stop)
                    trainer.finish(memory.read())
                    stop.check()
            except KeyboardInterrupt:
                raise Interrupted(job, *trainer.saved) from None
            finally:
                # Not end_training(): it would also end the process group, which the next run needs.
                for tracker in [*accelerator.trackers]:
                    trainer.tensorboard(tracker.finish)
                accelerator.free_memory()
    accelerator.wait_for_everyone()
    return run


@contextmanager
def explained(job: Job, count: int) -> Iterator[None]:
    """What only happens among several processes, as a RunError that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if count == 1:
            raise
        if "finished reduction" in str(error):  # DDP waited for gradients that did not come
            raise RunError(
                f"{job.title}: a step leaves parameters out that the first one used, which several processes do not "
                "train alike: train it on one"
            ) from error
        if not processes.lost(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"{job.title}: another of the {count} processes has gone ({reason}). What was saved last "
            f"in {job.folder} is whole, and the same command (without --fresh) goes on from there."
        ) from None


def start_over(jobs: Sequence[Job], display: Display) -> None:
    """Marks what earlier runs of these jobs left: each is removed when its job is trained, by this command or a later one.
    RunError where another process is at work in one of the folders."""
    for job in jobs:
        keeps_its_start(job)
    for job in jobs:
        accelerator = make_accelerator(job.config.engine, job.folder)
        run = Run(job.folder, writes=accelerator.is_main_process)
        if run.exists() or run.checkpoint.is_file():
            with alone(job.folder, accelerator, display):
                run.start_over()
            accelerator.wait_for_everyone()


def keeps_its_start(job: Job) -> None:
    """RunError where a run that starts over would remove the weights that it starts from."""
    if job.weights and Path(job.weights).resolve().parent == job.folder.resolve():
        raise RunError(
            f"{job.folder}: --fresh would remove {job.weights}, which this run starts from. Move it elsewhere."
        )


def finished(job: Job, data: ImageData, *, resume: bool = True) -> bool:
    """True if the folder holds this very run, finished and with its files. RunError if it holds another, or one not to be resumed."""
    run = Run(job.folder)
    if not run.exists() or run.outdated():
        return False
    record, recipe = run.read_record(), job.recipe()
    different = differences(with_networks(record.get("recipe", {}), recipe, run.config), recipe)
    if different:
        shown = "; ".join(f"{key}: {there!r} there, {here!r} here" for key, there, here in different[:3])
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise RunError(
            f"{run.folder}: holds a run of another configuration ({shown}{more}). "
            "Start it over with --fresh, or give this one a place of its own with name=... or out=..."
        )
    same_data(run, data, of_teachers=job.teacher is not None)
    if not record.get("finished") and not resume:
        raise RunError(
            f"{run.folder}: holds an unfinished run ({len(run.read_metrics())} of {job.train.epochs} epochs). "
            "Continue it with --resume or start it over with --fresh."
        )
    if not record.get("finished"):
        return False
    # What a kill cannot have left: files that were removed. A student counts by its results, where no checkpoint has its weights.
    return run.result.is_file() and (
        (run.folder / job.file).is_file() or (job.teacher is None and not run.checkpoint.is_file())
    )


class Trainer:
    """The state of one run while it trains."""

    def __init__(
        self,
        job: Job,
        run: Run,
        accelerator: Accelerator,
        data: ImageData,
        teachers: Teachers | None,
        display: Display,
    ) -> None:
        self.job, self.run, self.accelerator, self.display = job, run, accelerator, display
        self.data = data_of(job, data)
        preflight.batches(job, self.data)
        self.teachers = teachers_of(job, teachers)
        engine = job.config.engine
        memory = memory_format(engine.channels_last, self.data.train.images.shape)
        module = make_distiller(job, self.data, self.teachers, accelerator.num_processes)
        if job.method.fits and self.teachers is not None:
            module.objective.fit(*frozen.sample(self.teachers, self.data))
        module.to(accelerator.device, memory_format=memory)  # type: ignore[call-overload]
        if job.method.fits:
            processes.same_buffers(module)  # devices of different kinds may have fitted different last digits
        self.bare = module
        self.done, self.step = 0, 0  # epochs, and steps of the next one
        self.saved = (0, 0)  # the same, as the checkpoint has them
        self.partial: dict[str, Tensor] = {}  # the sums of those steps
        self.warned = set[str]()
        self.loader = self._loader(engine.gradient_accumulation_steps)
        self.whole_step = TrainingStep(accelerator, module, self.loader, self.teachers, memory)
        # Accumulation never reaches over the end of an epoch: what does not fill a step is left out, as drop_last does.
        self.steps = len(self.loader) // engine.gradient_accumulation_steps
        if accelerator.num_processes > 1:
            # DDP looks through each step's graph for them where it must; 3 to 7 % of a step that has little to compute.
            gradients = self.whole_step.gradients(*self.whole_step.first_inputs())
            if processes.anyone(accelerator, any(gradient is None for gradient in gradients)):
                accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        if engine.compile:
            for network in (module.student, *module.objective.peers):
                compile_in_place(network)
        self._place()
        self.whole_step.capture(engine.cuda_graphs, job.title, display)
        self.seconds, self.before = 0.0, 0.0  # in all, and in the epoch that a stop cut short
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

    def _place(self) -> None:
        """Prepares the module as it is called, and its optimizer: as they are, or for several processes by DDP or FSDP2."""
        engine, accelerator = self.job.config.engine, self.accelerator
        self.model: nn.Module
        on_device = accelerator.num_processes == 1 and accelerator.device.type in graphs.CAPTURES
        if engine.fsdp and accelerator.num_processes > 1:
            self.model = processes.shard(self.bare, accelerator.device)
            self.optimizer = accelerator.prepare(make_optimizer(self.job.train, self.bare))
        else:
            optimizer = make_optimizer(self.job.train, self.bare, on_device=on_device)
            self.model, self.optimizer = accelerator.prepare(self.bare, optimizer)
        self.whole_step.trains(self.model, self.optimizer, rates_on_device=on_device)

    def _loader(self, accumulation: int) -> Loader:
        train = self.job.train
        return Loader(
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
        self.run.remove_unfinished()
        state = self.run.load_checkpoint()
        if state is None:
            if self.run.metrics.is_file():
                self.run.cut_metrics(0)
            return
        of = {name: self.record[name] for name in ("recipe", "data")}
        known = dict(state.get("of", of))
        known["recipe"] = with_networks(known["recipe"], of["recipe"], self.run.config)
        if known != of:  # whose run.json is gone
            raise RunError(
                f"{self.run.checkpoint}: is of another configuration, or of other data. Start over with --fresh, or give this run a "
                "place of its own with name=... or out=..."
            )
        try:
            processes.load_state(self.bare, self.optimizer.optimizer, state["model"], state["optimizer"])
            if self.accelerator.scaler is not None and state["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.done, self.step, self.seconds = int(state["epoch"]), int(state["step"]), float(state["seconds"])
            self.partial, self.before = state["sums"], float(state["before"])
            self.saved = self.done, self.step
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise RunError(
                f"{self.run.checkpoint}: does not fit this run: {error}. "
                "The file is left as it is; start over with --fresh."
            ) from None
        if not self.accelerator.is_main_process:  # the sums of all processes count once
            self.partial = {name: torch.zeros_like(value) for name, value in self.partial.items()}
        if lost := self.run.cut_metrics(self.done):
            self.display.warn(
                f"{self.run.metrics}: no row can be read of epoch {some(lost)}; curves and times will be of the others"
            )

    def save(self) -> None:
        """The checkpoint: all that the steps to come depend on. Every process takes part, the first one writes."""
        self.whole_step.plain_rates()
        model, optimizer = processes.state(self.bare, self.optimizer.optimizer)
        scaler = self.accelerator.scaler
        self.run.save_checkpoint(
            {
                "of": {name: self.record[name] for name in ("recipe", "data")},
                "epoch": self.done,
                "step": self.step,
                "sums": self.partial,
                "seconds": self.seconds,
                "before": self.before,
                "model": model,
                "optimizer": optimizer,
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
        )
        self.saved = self.done, self.step

    def fit(self, stop: Stop) -> None:
        job, size = self.job, self.job.train.batch_size
        if self.done or self.step:
            more = f" and {self.step} steps" if self.step else ""
            self.display.say(f"{job.title}: continuing after epoch {self.done} of {job.train.epochs}{more}")
        # Without purge_step, TensorBoard would show the epoch that a kill cut short twice.
        options = {"tensorboard": {"purge_step": self.done + 1}}
        self.tensorboard(lambda: self.accelerator.init_trackers("tensorboard", init_kwargs=options))
        with self.display.bar(job.title, self.steps * size * job.train.epochs) as bar:
            bar.add((self.done * self.steps + self.step) * size)
            for epoch in range(self.done + 1, job.train.epochs + 1):
                began = time.perf_counter() - self.before
                row = self.epoch(epoch, bar, stop)
                self.check(row)
                row["val_accuracy"] = self.accuracy(self.data.val, epoch)
                self.seconds += time.perf_counter() - began
                self.run.add_metrics(row)
                numbers = {k: v for k, v in row.items() if isinstance(v, float)}
                self.tensorboard(functools.partial(self.accelerator.log, numbers, step=epoch))
                self.done, self.step, self.partial, self.before = epoch, 0, {}, 0.0
                self.save()
                if self.asked(stop):
                    raise KeyboardInterrupt
                bar.note(f"epoch {epoch}/{job.train.epochs}, validation {100 * row['val_accuracy']:.1f} %")

    def tensorboard(self, act: Callable[[], object]) -> None:
        """What its files do not take costs the rest of its curves, no training: metrics.jsonl has the same numbers."""
        try:
            act()
        except OSError as error:
            self.accelerator.trackers.clear()
            self.display.warn(
                f"{self.run.folder / 'tensorboard'}: {error.strerror or error}: TensorBoard's curves end here"
            )

    def epoch(self, epoch: int, bar: Bar, stop: Stop) -> dict[str, Any]:
        """One pass over the training split; returns its row of metrics.jsonl without the validation accuracy."""
        job, engine = self.job, self.job.config.engine
        began, before = time.perf_counter(), self.before
        sums, timer, rounds = self.whole_step.sums, self.whole_step.timer, engine.gradient_accumulation_steps
        sums.start(self.partial)
        frozen_adapter = self.frozen_adapter(epoch)
        lr, own_lr = 0.0, adapter_rate(job.config.stages, epoch)
        self.loader.set_epoch(epoch)
        self.model.train()
        first = self.step
        draws = self.loader.draws(first * rounds)
        timer.start()
        for step in range(first, self.steps):
            lr = learning_rate(job.train, (epoch - 1) * self.steps + step, self.steps)
            own = lr if own_lr is None else own_lr
            rates = [own if group.get("name") == ADAPTER else lr for group in self.optimizer.param_groups]
            # All randomness of a step follows from (seed, epoch, step, process): resuming needs no generator's state.
            torch.manual_seed(drawn_seed(job.seed, epoch, step, self.accelerator.process_index))
            self.bare.progress.fill_(((epoch - 1) * self.steps + step) / (self.steps * job.train.epochs))
            self.learn(list(itertools.islice(draws, rounds)), rates, frozen_adapter)
            bar.add(job.train.batch_size)
            self.step = step + 1
            inside = self.step < self.steps  # the end of the epoch saves, and may stop, by itself
            stopping = inside and self.step % self.agree_every == 0 and self.asked(stop)
            if stopping or (inside and engine.checkpoint_steps and self.step % engine.checkpoint_steps == 0):
                self.partial = sums.reduced(self.accelerator)
                self.before = before + time.perf_counter() - began
                self.save()
            if stopping:
                raise KeyboardInterrupt
        timer.stop()
        row = {"epoch": epoch, "lr": lr, **sums.means(self.accelerator)}
        row["seconds"] = before + time.perf_counter() - began
        row["step_seconds"] = {part: total / max(1, self.steps - first) for part, total in timer.read().items()}
        return row

    def learn(
        self, draws: Sequence[Draws], rates: Sequence[float], frozen_adapter: Sequence[nn.Parameter] = ()
    ) -> None:
        """One optimizer step."""
        self.whole_step(draws, rates, frozen_adapter)

    def asked(self, stop: Stop) -> bool:
        """Whether this process, or any other, was asked to stop."""
        several = self.accelerator.num_processes > 1
        return processes.anyone(self.accelerator, stop.asked) if several else stop.asked

    @property
    def agree_every(self) -> int:
        return AGREE_EVERY if self.accelerator.num_processes > 1 else 1

    def accuracy(self, split: ImageSet, epoch: int) -> float:
        """Fraction of `split` that the student gets right after this epoch; each process measures its share. Diverged where
        its logits are not finite: no loss comes after the last step."""
        accelerator = self.accelerator
        processes.same_buffers(self.bare)
        with processes.complete(self.bare):
            count = count_correct(
                self.bare.student,
                split,
                self.data,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
            )
        right, lost = accelerator.reduce(count, reduction="sum").tolist()
        if lost:
            raise self.diverged("the student's logits are not finite", epoch)
        return int(right) / max(1, len(split))

    def frozen_adapter(self, epoch: int) -> list[nn.Parameter]:
        """The adapter's parameters in the second of two stages: without a gradient the optimizer leaves them alone.

        Not requires_grad=False, which DDP does not allow to change; the weights still follow the live student.
        """
        last = self.job.config.stages.adapter_epochs
        adapter = self.bare.objective.adapter
        return list(adapter.parameters()) if adapter is not None and last is not None and epoch > last else []

    def check(self, row: dict[str, Any]) -> None:
        """Stops at a diverged loss; warns once about an adapter that no longer tells examples apart."""
        if not math.isfinite(row["loss"]):
            raise self.diverged(f"the loss is {row['loss']}", row["epoch"])
        learned = self.bare.objective.adapter is not None  # other weights are what their method makes them
        collapse = collapsed(row, self.record["teachers"]) if learned else None
        kind = "" if collapse is None else collapse.partition(" (")[0]
        if collapse is not None and kind not in self.warned:
            self.warned.add(kind)
            self.display.warn(f"{self.job.title}, epoch {row['epoch']}: {collapse}")

    def diverged(self, what: str, epoch: int) -> Diverged:
        return Diverged(
            f"{self.job.title}: {what} after epoch {epoch}; try a lower learning rate (now {self.job.train.lr}). "
            f"The checkpoint of epoch {self.done} is kept."
        )

    def finish(self, peak: int | None) -> None:
        """The final figures and files; run.json says `finished` last, so a kill in here only repeats this."""
        result = {
            "val_accuracy": self.accuracy(self.data.val, self.done),
            "test_accuracy": self.accuracy(self.data.test, self.done),
        }
        state, inside, objective = processes.model_state(self.bare), "student.model.", "objective."
        student = {name.removeprefix(inside): x for name, x in state.items() if name.startswith(inside)}
        self.run.write_tensors(self.job.file, student)
        if rest := {name.removeprefix(objective): x for name, x in state.items() if name.startswith(objective)}:
            self.run.write_tensors("objective.safetensors", rest)
        self.run.write_json(self.run.result, result)
        rows = [row for row in self.run.read_metrics() if "seconds" in row]
        seconds = sum(row["seconds"] for row in rows) / len(rows) if rows else self.seconds / self.job.train.epochs
        self.record |= {
            "seconds_total": self.seconds,
            "seconds_per_step": seconds / self.steps,
            "step_seconds": step_seconds(rows),
            "peak_memory": peak,
            "finished": True,
        }
        self.run.write_record(self.record)


def step_seconds(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The parts of a step in seconds, mean over the epochs; without the first one, which compiles and warms up, where there
    are more."""
    rows = rows[1:] or rows
    return {part: sum(row["step_seconds"][part] for row in rows) / len(rows) for part in PARTS} if rows else {}
