"""Every method with maps of every kind: it trains a step, or one line says before anything is trained what it wants."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from amtml_fast.train.config import reading
from amtml_fast.train.config.schema import Config, ConfigError
from amtml_fast.train.data.images import ImageData, Loader
from amtml_fast.train.methods.registry import METHODS
from amtml_fast.train.models import networks
from amtml_fast.train.models.features import FeatureExtractor
from amtml_fast.train.run import preflight
from amtml_fast.train.run.distiller import make_distiller, teachers_of
from amtml_fast.train.run.job import student_job
from amtml_fast.train.run.prepare import load_data
from amtml_fast.train.teachers.frozen import Outputs, assemble

YAML = """
name: small
data: {name: digits, val_fraction: 0.15}
teachers:
  - {name: a, model: {factory: small_cnn, args: {width: 2}}, hint: block3}
  - {name: b, model: {factory: small_cnn, args: {width: 3}}, hint: block3}
student: {factory: small_cnn, args: {width: 1}, features: block3, groups: {low: block2, high: block3}}
distill: {batch_size: 16}
engine: {threads: 1, device: cpu}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    return load_data(load(tmp_path_factory.mktemp("data")))


def load(folder: Path, *overrides: str) -> Config:
    (folder / "small.yaml").write_text(YAML)
    return reading.load(folder / "small.yaml", [f"out={folder}", *overrides])


def step(settings: Config, name: str, data: ImageData) -> torch.Tensor:
    """The loss of one step from untrained teachers."""
    job = student_job(settings, name, 0)
    nets = [networks.small_cnn(10, width=width) for width in (2, 3)]
    hints = [{"hint": teacher.hint or "block3"} for teacher in settings.teachers]
    everyone = assemble(
        ["a", "b"], [FeatureExtractor(net, hint).eval() for net, hint in zip(nets, hints, strict=True)], data
    )
    teachers = teachers_of(job, everyone) if job.method.needs_teachers else None
    distiller = make_distiller(job, data, teachers)
    batch = next(iter(Loader(data.train, data, 16)))
    taught = teachers.run(batch.images) if teachers else Outputs([], [])
    out, _ = distiller(batch.images, batch.labels, taught.logits, taught.maps)
    out.loss.backward()
    return out.loss.detach()


@pytest.mark.parametrize("features", ["fc", "block3"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_with_every_kind_of_features(tmp_path: Path, data: ImageData, name: str, features: str) -> None:
    settings = load(tmp_path, f"student.features={features}")
    job, method = student_job(settings, name, 0), METHODS[name]
    if features == "fc" and method.features and not method.pooled:
        message = (
            r"^config: student\.features must name a module whose output is \[N, c, h, w\], got 'fc', .* \[2, 10\]$"
        )
        for run in (lambda: preflight.networks(settings, data, [job]), lambda: step(settings, name, data)):
            with pytest.raises(ConfigError, match=message):
                run()
        return
    preflight.networks(settings, data, [job])
    assert torch.isfinite(step(settings, name, data))


def test_a_group_at_the_place_of_the_features_is_a_map_all_the_same(tmp_path: Path, data: ImageData) -> None:
    """The features of AMTML-KD may be [N, c]; what hints guide may not."""
    settings = load(tmp_path, "student.features=fc", "student.groups={low: block2, high: fc}")
    with pytest.raises(
        ConfigError, match=r"^config: student\.groups\.high must name a module .* got 'fc', .* \[2, 10\]$"
    ):
        preflight.networks(settings, data, [student_job(settings, "amtml_kd", 0)])


def with_hints() -> list[str]:
    plain = Config()
    settings = {name: reading.changed(plain, method.settings(plain), name) for name, method in METHODS.items()}
    return [name for name, method in METHODS.items() if method.hints(settings[name].loss)]


@pytest.mark.parametrize("name", with_hints())
def test_every_method_with_a_teachers_output_that_is_no_map(tmp_path: Path, data: ImageData, name: str) -> None:
    settings = load(tmp_path, "teachers.1.hint=fc")
    message = r"^config: teachers\.b\.hint must name a module whose output is \[N, c, h, w\], got 'fc', .* \[2, 10\]$"
    with pytest.raises(ConfigError, match=message):
        preflight.networks(settings, data, [student_job(settings, name, 0)])
    with pytest.raises(ConfigError, match=message):
        step(settings, name, data)


def test_places_leave_nothing_behind(tmp_path: Path) -> None:
    settings = load(tmp_path, f"out={tmp_path}/a/b", f"cache.folder={tmp_path}/c/d")
    preflight.places(settings)
    (tmp_path / "a" / "b").mkdir(parents=True)
    preflight.places(settings)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["a", "a/b", "small.yaml"]
    (tmp_path / "c").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"cache\.folder must be a folder, got .*c/d where .*c is none"):
        preflight.places(settings)
    preflight.places(load(tmp_path, f"cache.folder={tmp_path}/c/d", "cache.teachers=never"))


def test_batches_that_cannot_be_divided(tmp_path: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(tmp_path, "engine.gradient_accumulation_steps=3")
    with pytest.raises(ConfigError, match=r"a multiple of engine\..*=3 for student alone, seed 0, got 16"):
        preflight.networks(settings, data, [student_job(settings, "student", 0)])
    monkeypatch.setattr(preflight, "PartialState", lambda: SimpleNamespace(num_processes=6))
    for rounds, message in (
        (1, "a multiple of 6 for .*, the 6 processes, got 16"),
        (4, "of 24 for .* times engine.*=4, got 16"),
    ):
        settings = load(tmp_path, f"engine.gradient_accumulation_steps={rounds}")
        with pytest.raises(ConfigError, match=message):
            preflight.networks(settings, data, [student_job(settings, "student", 0)])


@pytest.mark.parametrize("rounds", [1, 4])
def test_a_network_that_does_not_train_on_one_image_gets_no_batches_of_one(
    tmp_path: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    code = """
from torch import nn


def net(num_classes, in_channels, width):
    pooled = [nn.Conv2d(in_channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten()]
    return nn.Sequential(*pooled, nn.Linear(4, num_classes))
"""
    (tmp_path / "pooled_net.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    engine = f"engine.gradient_accumulation_steps={rounds}"
    for size, message in (
        (rounds, f"batch_size must be at least {2 * rounds}, .*Expected more than 1 value"),
        (2 * rounds, ""),
    ):
        settings = load(tmp_path, "student.factory=pooled_net:net", engine, f"distill.batch_size={size}")
        job = student_job(settings, "student", 0)
        with pytest.raises(ConfigError, match=message) if message else nullcontext():
            preflight.networks(settings, data, [job])
    settings = load(tmp_path, engine, f"distill.batch_size={rounds}")  # maps of 2 x 2 pixels are enough
    preflight.networks(settings, data, [student_job(settings, "student", 0)])
