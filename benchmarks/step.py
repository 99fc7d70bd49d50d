"""A whole training step, as the trainer takes it: checked, then timed against a loop as published. Run by `make gpu PART=step`.

    python -m benchmarks.step [--out step.json] [--seconds 165]

Checks: a training captured as a CUDA graph has the bits of one that is not, in float32, float16 and bfloat16, with both
optimizers; it resumes from a checkpoint to the same bits; no step waits for the device; random numbers follow the seed. Rows:
ResNet20 from ResNet32, 56 and 110, medians by CUDA events; `host_s` is the host's time for a step. The file is written
after each of them. What no longer fits into --seconds is left out, and named.
"""

import argparse
import dataclasses
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from amtml_fast.train.config.schema import Config
from amtml_fast.train.data.images import Draws, drawn_seed
from amtml_fast.train.run import graphs
from amtml_fast.train.run.trainer import Trainer

from . import machine
from .test_step import PAPER, PUBLISHED, SMALL, Setting, Switches

STEPS = 12  # of a check
# By batch, what matters most first: compiling the published loop takes most of the time.
ROWS: list[tuple[int, str, Switches | str | None]] = [
    *((batch, "the trainer", Switches()) for batch in (128, 1024)),
    *((batch, PAPER, None) for batch in (128, 1024)),
    *((batch, "cached teachers", Switches(cached=True)) for batch in (128, 1024)),
    *((batch, "precision=auto", Switches(precision="auto")) for batch in (128, 1024)),
    *((batch, "without a graph", Switches(graphs=False)) for batch in (128, 1024)),
    *((batch, "channels_last off", Switches(channels_last=False)) for batch in (128, 1024)),
    (128, f"{PAPER}, compiled", "default"),
    (128, f"{PAPER}, reduce-overhead", "reduce-overhead"),
    (128, "compiled", Switches(compile=True)),
    (1024, f"{PAPER}, compiled", "default"),
    (1024, f"{PAPER}, reduce-overhead", "reduce-overhead"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("step.json"))
    parser.add_argument("--seconds", type=float, default=165)
    args = parser.parse_args()
    from .gpu import machine as facts

    last = time.monotonic() + args.seconds
    found: dict[str, Any] = {"machine": facts(), "checks": {}, "rows": [], "not_run": []}

    def keep() -> None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")

    torch.backends.cudnn.deterministic = True  # two runs without a graph, too, have the same bits only so
    for name, check in CHECKS.items():
        found["checks"][name] = passed(check)
        print(f"{name}: {found['checks'][name]}", flush=True)
        keep()
    torch.backends.cudnn.deterministic = False
    for batch, provider, how in ROWS:
        if time.monotonic() > last:
            found["not_run"].append({"batch": batch, "provider": provider, "reason": "no time was left"})
            keep()
            continue
        try:
            row = {"batch": batch, "provider": provider, **timed(batch, how)}
        except Exception as error:
            found["not_run"].append({"batch": batch, "provider": provider, "reason": repr(error)[:300]})
            print(f"{provider}, batch {batch}: {error!r}", flush=True)
        else:
            found["rows"].append(row)
            print(f"{provider}, batch {batch}: {1e3 * row['median_s']:.2f} ms", flush=True)
        compared(found["rows"])
        keep()
    return int(any(result != "passed" for result in found["checks"].values()))


def passed(check: Callable[[], None]) -> str:
    try:
        check()
    except Exception as error:
        return repr(error)[:500]
    finally:
        clean()
    return "passed"


def compared(rows: list[dict[str, Any]]) -> None:
    """How many times as fast as each form of the published loop a row is."""
    for row in rows:
        others = [other for other in rows if other["batch"] == row["batch"] and other["provider"].startswith(PAPER)]
        row["times_as_fast"] = {other["provider"]: other["median_s"] / row["median_s"] for other in others}


def clean() -> None:
    """Nothing of the last trainer is left on the device, and accelerate forgets its precision."""
    gc.collect()
    if machine.GPU:
        torch.cuda.empty_cache()
    AcceleratorState._reset_state(reset_partial_state=True)


# --- rows


def timed(batch: int, how: Switches | str | None, nets: tuple[int, tuple[int, ...]] = PUBLISHED) -> dict[str, Any]:
    """Seconds of a step: median, the host's, and of its parts. how: the trainer's switches, or a mode of torch.compile for
    the published loop, or None for that loop as it is."""
    setting = Setting(*nets, batch)
    with tempfile.TemporaryDirectory() as folder:
        step: Callable[[], object]
        parts: Callable[[int], dict[str, float]] | None = None
        if isinstance(how, Switches):
            step, parts = setting.trainer_step(how, Path(folder))
        else:
            step = setting.paper_step(Path(folder), compiled=how)
        for _ in range(graphs.WARM_UP + 3):
            step()
        once = machine.seconds(step)
        rounds = max(5, min(100, int(2 / once)))
        facts: dict[str, Any] = {
            "median_s": statistics.median(machine.seconds(step) for _ in range(rounds)),
            "rounds": rounds,
            "host_s": host_seconds(step, 20 if once < 0.1 else 3),
        }
        if parts is not None:
            facts["parts_s"] = parts(20 if once < 0.1 else 3)
        del step, parts
    clean()
    return facts


def host_seconds(step: Callable[[], object], steps: int) -> float:
    """Until the host is ready for the next step, while the device is still at work."""
    synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    taken = time.perf_counter() - began
    synchronize()
    return taken / steps


def synchronize() -> None:
    if machine.GPU:
        torch.cuda.synchronize()


# --- checks


def trainer_of(folder: str, **changes: Any) -> Trainer:
    """A small one. changes: keys of `engine` and `distill`."""
    setting = Setting(*SMALL, 64)
    config: Config = setting.config(Switches(), Path(folder))
    for section in ("engine", "distill"):
        own = {key: value for key, value in changes.items() if hasattr(getattr(config, section), key)}
        setattr(config, section, dataclasses.replace(getattr(config, section), **own))
    clean()
    trainer = setting.trainer_of(config)
    trainer.model.train()
    trainer.whole_step.sums.start()
    return trainer


def draws_of(trainer: Trainer) -> Iterator[list[Draws]]:
    rounds = trainer.accelerator.gradient_accumulation_steps
    for epoch in itertools.count(1):
        trainer.loader.set_epoch(epoch)
        draws = trainer.loader.draws()
        while len(part := list(itertools.islice(draws, rounds))) == rounds:
            yield part


def learn(trainer: Trainer, steps: Sequence[int]) -> None:
    """These of the training's steps, with a rate and a seed of their own."""
    stream = itertools.islice(draws_of(trainer), steps[0], steps[-1] + 1)
    for step, draws in zip(steps, stream, strict=True):
        torch.manual_seed(drawn_seed(0, 1, step))
        trainer.learn(draws, [0.1 / (1 + step)] * len(trainer.optimizer.param_groups))


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Parameters, buffers, the optimizer's state and the sums."""
    synchronize()
    state = {f"model.{name}": x for name, x in trainer.bare.state_dict().items()}
    state |= {f"sums.{name}": x for name, x in trainer.whole_step.sums.totals.items()}
    for i, of_one in enumerate(trainer.optimizer.optimizer.state.values()):
        state |= {f"optimizer.{i}.{name}": x for name, x in of_one.items() if isinstance(x, Tensor)}
    return {name: x.detach().cpu().clone() for name, x in state.items()}


def must_be_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    wrong = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    if found.keys() != wanted.keys() or wrong:
        raise AssertionError(f"{len(wrong)} of {len(wanted)} tensors differ, first {wrong[:3]}")


def must_be_captured(trainer: Trainer) -> None:
    run = trainer.whole_step.run
    if trainer.accelerator.device.type in graphs.CAPTURES and getattr(run, "replay", None) is None:
        raise AssertionError("the step was not captured")


def same_bits(**changes: Any) -> None:
    found = []
    for captured in (False, "auto"):
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(folder, cuda_graphs=captured, **changes)
            learn(trainer, range(STEPS))
            found.append(state_of(trainer))
            if captured:
                must_be_captured(trainer)
    must_be_equal(found[1], found[0])


def resumes() -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(folder)
        trainer.run.folder.mkdir(parents=True, exist_ok=True)
        learn(trainer, range(STEPS // 2))
        trainer.step, trainer.partial = STEPS // 2, trainer.whole_step.sums.reduced(trainer.accelerator)
        trainer.save()
        config = trainer.job.config
        learn(trainer, range(STEPS // 2, STEPS))
        wanted = state_of(trainer)
        del trainer
        clean()
        again = Setting(*SMALL, 64).trainer_of(config)
        again.restore()
        again.model.train()
        again.whole_step.sums.start(again.partial)
        learn(again, range(STEPS // 2, STEPS))
        must_be_captured(again)
        must_be_equal(state_of(again), wanted)


def never_waits() -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(folder)
        trainer.whole_step.timer.start()
        learn(trainer, range(graphs.WARM_UP + 2))
        must_be_captured(trainer)
        draws = next(draws_of(trainer))
        synchronize()
        if machine.GPU:
            torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(5):
                torch.manual_seed(step)
                trainer.learn(draws, [0.1] * len(trainer.optimizer.param_groups))
        finally:
            if machine.GPU:
                torch.cuda.set_sync_debug_mode("default")
        parts = trainer.whole_step.timer.read()
        if machine.GPU and not all(seconds > 0 for seconds in parts.values()):
            raise AssertionError(f"every part must have a time, got {parts}")


def follows_the_seed() -> None:
    kind = machine.DEVICE.type
    if kind not in graphs.CAPTURES:
        return

    def noise(x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(x, 0.5) + torch.rand(1000, device=x.device)

    def failed(error: RuntimeError) -> None:
        raise error

    graph, x = graphs.Graph(noise, graphs.CAPTURES[kind](machine.DEVICE), failed), torch.ones(1000, device=kind)
    for seed in range(graphs.WARM_UP + 5):
        torch.manual_seed(seed)
        out = graph(x).clone()
        torch.manual_seed(seed)
        if not torch.equal(out, noise(x)):
            raise AssertionError(f"seed {seed} drew other numbers in the graph")


CHECKS: dict[str, Callable[[], None]] = {
    "random numbers follow the seed": follows_the_seed,
    "no step waits for the device": never_waits,
    "same bits": same_bits,
    "same bits, fp16 with its scaler, two batches a step": lambda: same_bits(
        mixed_precision="fp16" if machine.GPU else "no", gradient_accumulation_steps=2
    ),
    "same bits, bf16, adamw": lambda: same_bits(mixed_precision="bf16", optimizer="adamw"),
    "resumes to the same bits": resumes,
}

if __name__ == "__main__":
    sys.exit(main())
