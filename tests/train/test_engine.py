"""What the engine chooses by itself: the layout of images and maps, the precision, how teachers run."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
import torch._inductor.config
from small_run import Place
from torch import nn

from amtml_fast.train.config import reading
from amtml_fast.train.config.schema import ConfigError
from amtml_fast.train.data.images import Loader
from amtml_fast.train.models.features import FeatureExtractor
from amtml_fast.train.models.layout import channels_last
from amtml_fast.train.progress import Display
from amtml_fast.train.run.job import student_job
from amtml_fast.train.run.prepare import load_data, say_choices
from amtml_fast.train.run.timing import WHOLE, StepTimer
from amtml_fast.train.teachers import frozen


@pytest.mark.parametrize(("side", "chosen"), [(8, False), (15, False), (16, True), (32, True)])
def test_channels_are_adjacent_where_that_pays(side: int, chosen: bool) -> None:
    shape = torch.Size((5, 3, side, 64))
    assert channels_last("auto", shape) is chosen
    assert channels_last(True, shape) and not channels_last(False, shape)


def test_the_choices_are_three_and_errors_name_them(place: Place) -> None:
    for key in ("channels_last", "cuda_graphs"):
        with pytest.raises(ConfigError, match=f"engine.{key} must be one of auto, true, false, got 'yes please'"):
            place.load(f"engine.{key}=yes please")
        for number in (0, 1):  # equal to false and true, but neither
            with pytest.raises(ConfigError, match=f"engine.{key} must be one of auto, true, false, got {number}"):
                place.load(f"engine.{key}={number}")
    with pytest.raises(ConfigError, match=r"engine\.precision must be one of null, auto, got 'bf16'"):
        place.load("engine.precision=bf16")
    assert place.load("engine.channels_last=true").engine.channels_last is True


@pytest.mark.parametrize("cpu", [(), ("avx512_bf16",), ("avx512_bf16", "amx_bf16")])
@pytest.mark.parametrize("gpu", [None, False, True])
def test_precision_auto_is_what_the_device_computes_with(
    place: Place, monkeypatch: pytest.MonkeyPatch, gpu: bool | None, cpu: tuple[str, ...]
) -> None:
    """gpu: whether it computes in bf16; None: there is none. cpu: what the processor has of bf16."""
    for module in (torch.cuda, torch.accelerator):
        monkeypatch.setattr(module, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True} | dict.fromkeys(cpu, True))
    settings = place.load("engine.precision=auto", "engine.device=auto")
    assert settings.engine.mixed_precision == ("bf16" if gpu or (gpu is None and cpu) else "no")
    on_cpu = place.load("engine.precision=auto", "engine.device=cpu")
    assert on_cpu.engine.mixed_precision == ("bf16" if cpu else "no")
    # What was chosen is in the recipe, and a run's own file says it again.
    recipe = student_job(settings, "student", 0).recipe()
    assert recipe["engine"]["mixed_precision"] == settings.engine.mixed_precision
    assert "precision" not in recipe["engine"] and "mixed_precision: " in reading.to_yaml(settings)


def test_what_was_chosen_is_said_in_one_line(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    settings = place.load("engine.precision=auto")
    data, display = load_data(settings), Display()
    say_choices(settings, data, display)
    said = capsys.readouterr()
    assert "engine.precision=auto on the CPU: mixed_precision=bf16, channels_last=false" in said.out + said.err
    say_choices(place.load(), data, display)
    said = capsys.readouterr()
    assert not said.out + said.err


# --- teachers -----------------------------------------------------------------------------------------------------------


def test_steps_run_folded_copies_of_the_teachers_and_the_cache_holds_what_they_are(place: Place) -> None:
    settings = place.load("cache.teachers=never")
    data = load_data(settings)
    found = frozen.load(settings, data, hints=True)
    images = next(iter(Loader(data.train, data, 16))).images
    with torch.inference_mode():
        plain = [model(images)[0] for model in found.models]
    ran = found.only(["b", "a"], hints=False).run(images)
    assert all(torch.equal(a, b) for a, b in zip(found.live(images).logits, plain, strict=True))
    for a, b in zip(ran.logits, reversed(plain), strict=True):
        assert not torch.equal(a, b)  # another rounding
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert set(found.fast) == {"a", "b"}  # made once for all that learn from them
    again = found.run(images)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, reversed(ran.logits), strict=True))


class Settings(nn.Module):
    """Notes how Inductor would treat its weights."""

    seen: ClassVar[list[tuple[bool, bool]]] = []

    def forward(self, x):  # type: ignore[no-untyped-def]
        self.seen.append((torch._inductor.config.freezing, torch.is_grad_enabled()))
        return x


def test_teachers_of_a_step_are_compiled_with_weights_that_are_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """findings/inductor_freezing_option.sh: an option of torch.compile would not do."""
    monkeypatch.setattr(frozen, "compile_in_place", lambda network: None)
    for compiled in (True, False):
        teachers = frozen.Teachers(["a"], [FeatureExtractor(Settings().eval(), {})], [0.0], [], [0], compiled=compiled)
        teachers.run(torch.zeros(2, 3, 8, 8))  # which folding calls, too
        assert Settings.seen[-1] == (compiled, False) and not torch._inductor.config.freezing


def test_a_replayed_step_is_divided_like_the_last_that_was_not() -> None:
    timer = StepTimer(torch.device("cpu"))
    timer.start()
    timer.totals |= {"data": 1.0, "student": 3.0}
    timer.mark(WHOLE)
    timer.totals[WHOLE] = 8.0
    assert timer.read() == {"data": 3.0, "teachers": 0.0, "student": 9.0, "losses": 0.0, "optimizer": 0.0}
    assert not any(timer.read().values())
