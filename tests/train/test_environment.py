"""What the environment says: ranks and devices, which are its business, and settings, which are the configuration's."""

from __future__ import annotations

import subprocess
import sys

import pytest
from small_run import QUIET, Place, metrics

from amtml_fast.train.config import environment
from amtml_fast.train.config.schema import ConfigError
from amtml_fast.train.files import RunError
from amtml_fast.train.run.folder import Run
from amtml_fast.train.run.job import student_job
from amtml_fast.train.run.prepare import load_data
from amtml_fast.train.run.tasks import distill
from amtml_fast.train.teachers import frozen
from amtml_fast.train.teachers.fill import stores

ONE = ["distill.epochs=1"]

REFUSED = [
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3", "engine.gradient_accumulation_steps"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "", "engine.gradient_accumulation_steps"),
    ("ACCELERATE_MIXED_PRECISION", "bf16", "engine.mixed_precision"),
    ("ACCELERATE_MIXED_PRECISION", "FP16", "engine.mixed_precision"),
    ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "engine.compile=true"),
    ("ACCELERATE_USE_FSDP", "true", "engine.fsdp=true"),
    ("ACCELERATE_USE_FSDP", "True", "engine.fsdp=true"),
    ("ACCELERATE_USE_DEEPSPEED", "true", "engine.fsdp=true"),
    ("ACCELERATE_USE_MEGATRON_LM", "1", "engine.fsdp=true"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "engine.fsdp=true"),
    ("ACCELERATE_TORCH_DEVICE", "meta", "engine.device or CUDA_VISIBLE_DEVICES"),
]


@pytest.mark.parametrize(("name", "said", "key"), REFUSED)
def test_a_setting_from_the_environment_is_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch, name: str, said: str, key: str
) -> None:
    monkeypatch.setenv(name, said)
    with pytest.raises(ConfigError, match=rf"config: {key} must be set, not the environment's {name}='{said}'"):
        place.train(*ONE, method="student")
    assert not (place.folder / "small" / "student-seed0").exists()


@pytest.mark.parametrize(
    ("name", "said", "override"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2", "engine.gradient_accumulation_steps=2"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "engine.mixed_precision=bf16"),
        # This is what a launcher says that was told nothing.
        ("ACCELERATE_MIXED_PRECISION", "no", "engine.mixed_precision=bf16"),
        ("ACCELERATE_USE_FSDP", "false", "engine.fsdp=true"),
        ("ACCELERATE_USE_CPU", "true", "engine.device=auto"),
    ],
)
def test_what_the_configuration_says_too_may_be_said(
    place: Place, monkeypatch: pytest.MonkeyPatch, name: str, said: str, override: str
) -> None:
    monkeypatch.setenv(name, said)
    environment.check(place.load(override).engine)


def test_accelerates_launcher_works_and_its_options_are_heard(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    run = place.train(*ONE, "name=alone", method="student")
    command = ["-m", "amtml_fast", *place.words("distill", *ONE, "--method=student")]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines=1"]

    def launch(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*launcher, *options, *command], cwd=place.folder, capture_output=True, text=True, timeout=300
        )

    notice = "accelerate launch was asked for several processes and started one"
    refused = launch("--mixed_precision=bf16", "--dynamo_backend=no", "--num_processes=2")
    assert notice in refused.stdout
    assert refused.returncode and "engine.mixed_precision must be set, not" in refused.stderr, refused.stderr
    done = launch("--mixed_precision=no", "--dynamo_backend=no", "--num_processes=1")
    assert done.returncode == 0, done.stderr
    assert notice not in done.stdout
    launched = Run(place.folder / "small" / "student-seed0")
    assert metrics(launched) == metrics(run)


@pytest.mark.parametrize("name", environment.PRECISION)
def test_a_lower_precision_is_another_recipe_and_another_cache(
    place: Place, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    settings = place.load(*ONE)
    data = load_data(settings)
    taught = frozen.load(settings, data, hints=False)

    def keys() -> list[str]:
        return [store.hash for kept in stores(settings, taught, data).values() for store in kept.logits]

    monkeypatch.delenv(name, raising=False)
    before, recipe = keys(), student_job(settings, "student", 0).recipe()
    assert "environment" not in recipe
    run = place.train(*ONE, method="student")
    monkeypatch.setenv(name, "1")
    assert student_job(settings, "student", 0).recipe() == recipe | {"environment": {name: "1"}}
    assert not set(before) & set(keys())
    with pytest.raises(RunError, match=rf"environment.{name}: None there, '1' here|environment: None there"):
        place.train(*ONE, method="student")
    distill(settings, data, "student", 0, QUIET, resume=False, fresh=True)
    assert run.read_record()["recipe"]["environment"] == {name: "1"}
