"""What may happen to a training: killed at any moment, a full disk, a machine wanted back, a process that dies.

AMTML_SOAK=20 (make soak): that many runs killed at random moments.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import io
import multiprocessing
import os
import random
import re
import signal
import socket
import time
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import psutil
import pytest
import torch
from recorder import Recorder
from rich.console import Console
from small_run import (
    FORKS,
    QUIET,
    Place,
    assert_equal,
    in_two,
    interrupt_after,
    metrics,
    own_weights,
    wait_for_epochs,
)

from amtml_fast import cli
from amtml_fast.train import lock
from amtml_fast.train.files import RunError
from amtml_fast.train.progress import Display
from amtml_fast.train.report import gather, page
from amtml_fast.train.run import timing, trainer
from amtml_fast.train.run.distiller import Distiller, make_distiller
from amtml_fast.train.run.folder import Run
from amtml_fast.train.run.job import student_job
from amtml_fast.train.run.prepare import load_data
from amtml_fast.train.run.stop import Interrupted
from amtml_fast.train.run.tasks import distill, evaluate, teach

SOAK = int(os.environ.get("AMTML_SOAK", "1"))
STEPS = 9  # an epoch
INTERVAL = 4  # steps between checkpoints


# --- killed -----------------------------------------------------------------------------------------------------------


def _train_and_count(folder: Path, overrides: list[str], steps: Synchronized) -> None:
    """A training in a process of its own that counts its steps where the test can read them."""
    os.chdir(folder)
    learn = trainer.Trainer.learn
    restore = trainer.Trainer.restore

    def counting_restore(self: trainer.Trainer) -> None:
        restore(self)
        steps.value = self.done * self.steps + self.step

    def counting_learn(self: trainer.Trainer, *args: object) -> None:
        learn(self, *args)
        steps.value += 1

    trainer.Trainer.learn, trainer.Trainer.restore = counting_learn, counting_restore  # type: ignore[method-assign]
    Place(folder).train(*overrides, resume=True)


def saved_steps(run: Run, steps_per_epoch: int) -> int:
    state = run.load_checkpoint()
    return 0 if state is None else state["epoch"] * steps_per_epoch + state["step"]


def test_killed_at_random_moments_it_loses_an_interval_at_most_and_ends_the_same(place: Place) -> None:
    settings = ["distill.epochs=6", f"engine.checkpoint_steps={INTERVAL}", *own_weights(place)]

    def start(name: str) -> tuple[multiprocessing.process.BaseProcess, Synchronized]:
        steps = FORKS.Value("q", -1)
        process = FORKS.Process(target=_train_and_count, args=(place.folder, [*settings, f"name={name}"], steps))
        process.start()
        return process, steps

    process, steps = start("unbroken")
    while steps.value < 0:
        time.sleep(0.001)
    began = time.monotonic()
    process.join()
    seconds = time.monotonic() - began  # of training: the kills fall into it
    unbroken = Run(place.folder / "unbroken" / "amtml_kd-seed0")
    per_epoch = unbroken.read_record()["steps_per_epoch"]
    chance, kills = random.Random(SOAK), 0
    for number in range(SOAK):
        run = Run(place.folder / f"killed{number}" / "amtml_kd-seed0")
        for _ in range(3):
            process, steps = start(f"killed{number}")
            while steps.value < 0 and process.is_alive():
                time.sleep(0.001)
            process.join(chance.uniform(0, 0.6 * seconds))
            if not process.is_alive():
                break
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            assert steps.value - saved_steps(run, per_epoch) <= INTERVAL
        process, _ = start(f"killed{number}")
        process.join()
        assert process.exitcode == 0
        assert_equal(run, unbroken)
    assert kills >= SOAK
    print(f"{kills} kills in {SOAK} runs")


def test_checkpoints_within_an_epoch(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    save, saved = trainer.Trainer.save, list[tuple[int, int]]()

    def noted(self: trainer.Trainer) -> None:
        save(self)
        saved.append((self.done, self.step))

    monkeypatch.setattr(trainer.Trainer, "save", noted)
    place.train("distill.epochs=2", f"engine.checkpoint_steps={INTERVAL}")
    assert saved == [(0, 4), (0, 8), (1, 0), (1, 4), (1, 8), (2, 0)]


def test_what_can_be_read_of_a_damaged_metrics_file_is_kept(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["distill.epochs=6", *own_weights(place)]
    unbroken = place.train(*settings, "name=unbroken")
    with monkeypatch.context() as patch:
        interrupt_after(4, patch)
        with pytest.raises(Interrupted):
            place.train(*settings)
    run = Run(place.folder / "small" / "amtml_kd-seed0")
    first, second, third, fourth = run.metrics.read_bytes().splitlines(keepends=True)
    torn = third[:40] + b"\n", third[:40] + fourth, b"\x00\xff\n" + fourth, b"[3]\n" + fourth
    for lines, kept in zip(torn, ([1, 2], [1, 2], [1, 2, 4], [1, 2, 4]), strict=True):
        run.metrics.write_bytes(first + second + lines)
        assert [row["epoch"] for row in run.read_metrics() if "loss" in row] == kept
        assert [row["epoch"] for row in run.read_metrics()] == [*range(1, kept[-1] + 1)]  # a curve goes by places
        for number in (b"true", b"0", b"-1", b"2.5", b"30000000"):
            run.metrics.write_bytes(first + second + b'{"epoch": ' + number + b', "loss": 1.0}\n')
            assert [row["epoch"] for row in run.read_metrics() if "loss" in row] == [1, 2]
        run.metrics.write_bytes(first + second + lines)
    config, said = place.load(*settings), io.StringIO()
    distill(config, load_data(config), "amtml_kd", 0, Display(Console(file=said)), resume=True, fresh=False)
    assert "no row can be read of epoch 3; curves and times will be of the others" in said.getvalue()
    found, wanted = metrics(run), metrics(unbroken)
    assert found == [*wanted[:2], {"epoch": 3}, *wanted[3:]]
    record = run.read_record()
    seconds = [row["seconds"] for row in run.read_metrics() if row["epoch"] != 3]
    assert record["seconds_per_step"] == pytest.approx(sum(seconds) / 5 / STEPS)
    assert page.write([run.folder]).is_file()
    (note,) = [note for note in gather.gather([run.folder]).notes if "metrics.jsonl" in note]
    assert (
        note
        == "amtml_kd-seed0/metrics.jsonl has no row that can be read of epoch 3: curves and times are of the others."
    )


def test_without_any_metrics_a_run_goes_on_and_is_reported(place: Place) -> None:
    run = place.train("distill.epochs=2")
    for path in (run.metrics, run.result):  # which is made again from the checkpoint
        path.unlink()
    place.train("distill.epochs=2")
    assert run.finished() and run.read_record()["seconds_per_step"] > 0
    assert timing.shares(run.read_record()["step_seconds"]) == "no times of steps were kept"
    assert page.write([run.folder]).is_file()


# --- a stop within an epoch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sigterm_within_an_epoch_saves_there(place: Place, monkeypatch: pytest.MonkeyPatch, accumulation: int) -> None:
    settings = [f"engine.gradient_accumulation_steps={accumulation}", "distill.epochs=3", *own_weights(place)]
    unbroken = place.train(*settings, "name=unbroken")
    batches = 0
    with monkeypatch.context() as patch:
        learn = trainer.Trainer.learn

        def terminated(self: trainer.Trainer, *args: object) -> None:
            nonlocal batches
            learn(self, *args)
            batches += 1
            if batches == STEPS + 5:
                signal.raise_signal(signal.SIGTERM)

        patch.setattr(trainer.Trainer, "learn", terminated)
        before = signal.signal(signal.SIGTERM, lambda *_: None)  # as the command has it
        try:
            with pytest.raises(Interrupted, match="1 of 3 epochs and 5 steps of the next one are safe"):
                place.train(*settings)
        finally:
            signal.signal(signal.SIGTERM, before)
    run = Run(place.folder / "small" / "amtml_kd-seed0")
    state = run.load_checkpoint()
    assert state is not None and (state["epoch"], state["step"]) == (1, 5)
    assert len(run.read_metrics()) == 1
    torch.rand(3)
    assert_equal(place.train(*settings, resume=True), unbroken)


def test_a_stop_that_does_not_wait_names_only_what_was_saved(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    learn, batches = trainer.Trainer.learn, 0

    def insisted(self: trainer.Trainer, *args: object) -> None:
        nonlocal batches
        learn(self, *args)
        batches += 1
        if batches == STEPS + 5:
            raise KeyboardInterrupt  # as a second Ctrl-C does, anywhere

    monkeypatch.setattr(trainer.Trainer, "learn", insisted)
    with pytest.raises(Interrupted, match="1 of 3 epochs are safe"):
        place.train("distill.epochs=3")


def test_sigterm_ends_the_command_with_what_it_had(place: Place) -> None:
    process = place.start("distill", "distill.epochs=500")
    wait_for_epochs(place, process, 1)
    process.send(signal.SIGTERM)
    status, said = process.end()
    assert status == 130 and "are safe in" in said and "Traceback" not in said
    state = Run(place.folder / "small" / "amtml_kd-seed0").load_checkpoint()
    told = re.search(r"(\d+) of 500 epochs(?: and (\d+) steps)?", said)
    assert state is not None and told is not None
    assert (state["epoch"], state["step"]) == (int(told[1]), int(told[2] or 0))


# --- two at once --------------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_until_the_first_one_is_gone(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    process = place.start("distill", "distill.epochs=5000")
    wait_for_epochs(place, process, 2)
    process.send(signal.SIGSTOP)  # it need not work on to be there
    run = Run(place.folder / "small" / "amtml_kd-seed0")
    epochs = len(run.read_metrics())
    for option in ([], ["--resume"], ["--fresh"]):
        with pytest.raises(SystemExit) as status:
            cli.main(place.words("distill", "distill.epochs=5000", *option))
        said = capsys.readouterr().err
        assert status.value.code == 1
        assert f"error: {run.folder}: process {process.pid} on {socket.gethostname()} is at work there." in said
    assert run.exists() and len(run.read_metrics()) == epochs
    assert place.train("distill.epochs=1", method="student").finished()  # another run of the same configuration
    process.send(signal.SIGKILL)
    process.end()
    assert (run.folder / lock.LOCK_FILE).is_file()  # no more than a file
    rows = run.read_metrics()
    assert [row["epoch"] for row in rows] == [*range(1, len(rows) + 1)] and len(rows) >= epochs  # by one process
    done = place.start("distill", "distill.epochs=1", "--fresh").end()
    assert done.returncode == 0 and run.finished() and not (run.folder / lock.LOCK_FILE).exists()


def test_several_processes_are_one_to_the_lock_and_are_all_refused(place: Place) -> None:
    process = place.launch("distill", "distill.epochs=5000", processes=2)
    wait_for_epochs(place, process, 2)
    done = in_two(place, "distill", "distill.epochs=5000", "--resume")
    assert done.returncode != 0 and done.said.count("is at work there") == 2 and "has gone" not in done.said
    assert process.poll() is None
    process.terminate()  # torchrun, which passes it on
    _, said = process.communicate(timeout=60)
    assert "are safe in" in said, said
    assert not (place.folder / "small" / "amtml_kd-seed0" / lock.LOCK_FILE).exists()


def test_a_lock_is_free_again_whoever_had_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = lock.Lock(tmp_path / "run"), lock.Lock(tmp_path / "run")
    assert one.take() and two.take() is False and f"process {os.getpid()}" in two.holder()
    two.release()  # has nothing
    assert one.file.is_file()
    one.release()
    assert not (tmp_path / "run").exists()
    opened = os.open

    def slow(path: Path, *args: int) -> int:
        """The file is opened, and then removed by the process that had the lock."""
        handle = opened(path, *args)
        monkeypatch.setattr(os, "open", opened)
        Path(path).unlink()
        return handle

    monkeypatch.setattr(os, "open", slow)
    assert one.take() and one.file.is_file() and two.take() is False
    one.release()
    assert two.take()
    two.release()


def test_where_there_are_no_locks_a_line_says_so(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(handle: int, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    settings = place.load("distill.epochs=1")
    run = trainer.train(student_job(settings, "student", 0), load_data(settings), None, Display())
    assert run.finished() and capsys.readouterr().out.count("no locks on this file system") == 1


# --- a full disk --------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    settings = ["distill.epochs=4", *own_weights(place)]
    unbroken = place.train(*settings, "name=unbroken")
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        with pytest.raises(Interrupted):
            place.train(*settings)
    run = Run(place.folder / "small" / "amtml_kd-seed0")
    before = run.checkpoint.read_bytes()
    # No file may grow beyond half a checkpoint: the system refuses to write the rest, as on a full disk.
    limit = (len(before) // 2, len(before) // 2)
    full = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, limit)
    done = place.start("distill", *settings, "--resume", first=full).end()
    assert done.returncode == 1 and "Traceback" not in done.said
    assert f"error: {run.checkpoint}: File too large: " in done.said and "is whole" in done.said, done.said
    assert run.checkpoint.read_bytes() == before
    assert not [path for path in run.folder.iterdir() if path.name.startswith(".")]
    assert_equal(place.train(*settings, resume=True), unbroken)


# --- a process that dies ------------------------------------------------------------------------------------------------


def test_one_dead_process_stops_the_others_with_a_message(place: Place) -> None:
    process = place.launch("distill", "distill.epochs=5000", processes=2)
    wait_for_epochs(place, process, 2)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    workers[1].kill()
    began = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode not in (0, None) and time.monotonic() - began < 60
    assert "another of the 2 processes has gone" in said and "is whole" in said, said
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    assert Run(place.folder / "small" / "amtml_kd-seed0").load_checkpoint() is not None


# --- what a step may not do ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["student", "avg_mkd", "ca_mkd", "aekd", "mmkd", "mtkd_rl", "amtml_kd", "amtml_label_weights"]
)
def test_no_step_waits_for_the_device(place: Place, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    learn, seen = trainer.Trainer.learn, list[list[str]]()

    def watched(self: trainer.Trainer, *args: object) -> None:
        seen.append(Recorder(torch.device("cpu")).waits(lambda: learn(self, *args)))

    monkeypatch.setattr(trainer.Trainer, "learn", watched)
    place.train("distill.epochs=1", method=method)
    assert seen == [[]] * STEPS


def test_a_step_is_timed_by_its_parts(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[str] = []
    mark, make = timing.StepTimer.mark, make_distiller

    def noted(self: timing.StepTimer, part: str) -> None:
        marks.append(part)
        mark(self, part)

    def watched(*args: object) -> Distiller:
        distiller = make(*args)
        distiller.student.model.register_full_backward_pre_hook(lambda *_: marks.append("backward"))
        return distiller

    monkeypatch.setattr(timing.StepTimer, "mark", noted)
    monkeypatch.setattr(trainer, "make_distiller", watched)
    run = place.train("distill.epochs=2")
    # Backward comes through the losses first, and only then through the student, whose first maps the hints are for too.
    # What is kept of the teachers is looked up before the images are made.
    step = ["data", "teachers", "data", "student", "losses", "losses", "backward", "student", "optimizer"]
    assert marks == 2 * STEPS * step
    record = run.read_record()
    assert list(record["step_seconds"]) == ["data", "teachers", "student", "losses", "optimizer"]
    assert all(seconds > 0 for seconds in record["step_seconds"].values())
    rows = run.read_metrics()
    assert record["step_seconds"] == rows[1]["step_seconds"]  # not the epoch that warms up
    for row in rows:
        assert 0 < STEPS * sum(row["step_seconds"].values()) <= row["seconds"]


def test_a_finished_run_whose_files_were_removed(place: Place) -> None:
    settings = place.load("distill.epochs=1")
    data, run = load_data(settings), place.train("distill.epochs=1", method="avg_mkd")
    taught = settings.teacher_folder("a")
    for folder, name in ((taught, "model.safetensors"), (taught, "result.json"), (run.folder, "student.safetensors")):
        before = (folder / name).read_bytes()
        (folder / name).unlink()  # its checkpoint has it
        if name == "model.safetensors":
            with pytest.raises(RunError, match="run `amtml-fast teach` first"):
                place.train("distill.epochs=1", method="avg_mkd", seed=1)
        teach(settings, data, QUIET)
        place.train("distill.epochs=1", method="avg_mkd")
        assert (folder / name).read_bytes() == before
    before = (taught / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "checkpoint.pt"):
        (taught / name).unlink()
    teach(settings, data, QUIET)  # from the start
    assert (taught / "model.safetensors").read_bytes() == before
    for name in ("student.safetensors", "checkpoint.pt"):
        (run.folder / name).unlink()
    place.train("distill.epochs=1", method="avg_mkd")  # its results are there
    assert not run.checkpoint.exists()
    with pytest.raises(FileNotFoundError, match=r"student\.safetensors in .*avg_mkd-seed0: its weights were removed"):
        evaluate(settings, data, run.folder, "test")
