"""The teacher cache: what is looked up is what the teachers say, whoever wrote it and whatever happened to it since."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_run import QUIET, ROOT
from torch import Tensor

from amtml_fast import file_lock
from amtml_fast.train.config import reading
from amtml_fast.train.config.schema import Config, ConfigError
from amtml_fast.train.data.images import Batch, ImageData, ImageSet, Loader
from amtml_fast.train.models.evaluate import EVAL_BATCH
from amtml_fast.train.models.networks import small_cnn
from amtml_fast.train.progress import Display
from amtml_fast.train.run import trainer
from amtml_fast.train.run.job import student_job, teacher_job
from amtml_fast.train.run.prepare import load_data, load_teachers
from amtml_fast.train.run.tasks import distill
from amtml_fast.train.teachers import fill, frozen
from amtml_fast.train.teachers.fill import stores, use_cache
from amtml_fast.train.teachers.frozen import Outputs, Teachers
from amtml_fast.train.teachers.store import CacheError, Storage, Store, locked, no_room

YAML = """
name: small
data: {name: digits, val_fraction: 0.15}
teachers:
  - {name: a, model: {factory: small_cnn, args: {width: 4}, weights: FOLDER/a.safetensors}, hint: block3}
  - {name: b, model: {factory: small_cnn, args: {width: 3}, weights: FOLDER/b.safetensors}, hint: block2}
student: {factory: small_cnn, args: {width: 1}, features: block3, groups: {low: block1, high: block3}}
distill: {epochs: 3, batch_size: 128}
engine: {threads: 1, device: cpu}
"""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the logits, and a small part of the maps, in each shard; no shard ends where a batch does."""
    whole = Store.__init__
    monkeypatch.setattr(Store.__init__, "__kwdefaults__", {**(whole.__kwdefaults__ or {}), "shard_bytes": 24_000})


def load(folder: Path, *overrides: str) -> Config:
    """A configuration with two teachers of random weights."""
    path = folder / "small.yaml"
    if not path.exists():
        path.write_text(YAML.replace("FOLDER", str(folder)))
        for seed, (name, width) in enumerate((("a", 4), ("b", 3))):
            torch.manual_seed(seed)
            save_file(small_cnn(10, width=width).state_dict(), folder / f"{name}.safetensors")
    return reading.load(path, [f"out={folder}", *overrides])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    return load_data(load(tmp_path_factory.mktemp("data")))


def taught(settings: Config, data: ImageData, method: str = "amtml_kd") -> Teachers:
    found = load_teachers(settings, data, [student_job(settings, method, 0)], QUIET)
    assert found is not None
    return found


def batches(settings: Config, data: ImageData, epoch: int = 1, **options: int) -> list[Batch]:
    """As a student sees them; what is random has a seed that no cache knows."""
    views = student_job(settings, "student", 0).fixed_views()
    augment = settings.data.augment
    loader = Loader(data.train, data, 96, shuffle=True, seed=77, augment=augment, **views, **options)
    loader.set_epoch(epoch)
    return list(loader)


def shards(folder: Path) -> dict[str, tuple[bytes, int]]:
    found = sorted(folder.glob("teacher-cache/*/*"))
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in found}


def one(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(f"teacher-cache/{pattern}")
    return found


def equal(a: Outputs, b: Outputs) -> bool:
    pairs = list(zip([*a.logits, *a.maps], [*b.logits, *b.maps], strict=True))
    return all(torch.equal(x, y) and x.dtype == y.dtype == torch.float32 for x, y in pairs)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images in each run of the teachers, but for a single probe."""
    counts: list[int] = []
    outputs = Teachers._outputs

    def counted(self: Teachers, images: Tensor, networks: Sequence) -> Outputs:
        counts.append(len(images)) if len(images) > 2 else None
        return outputs(self, images, networks)

    monkeypatch.setattr(Teachers, "_outputs", counted)
    return counts


# --- what is looked up ------------------------------------------------------------------------------------------------


def test_what_is_kept_is_what_the_teachers_said_bit_for_bit(tmp_path: Path, data: ImageData) -> None:
    settings = load(tmp_path)
    found = taught(settings, data)
    assert len(list(tmp_path.glob("teacher-cache/a-logits-*/shard-*"))) == 3
    plain = list(Loader(data.train, data, EVAL_BATCH))
    parts = [found.live(batch.images) for batch in plain]  # in the same batches: other sizes round otherwise
    whole = Outputs(*([torch.cat([getattr(p, k)[t] for p in parts]) for t in range(2)] for k in ("logits", "maps")))
    seen = 0
    for batch in batches(settings, data):
        rows = Outputs([x[batch.index] for x in whole.logits], [x[batch.index] for x in whole.maps])
        assert equal(found.outputs(batch), rows)
        seen += len(batch.index)
    assert seen == len(data.train) and found.outputs(batch).maps[0].shape[1:] == (16, 2, 2)


def test_the_teachers_run_once_for_all_methods_and_processes(tmp_path: Path, data: ImageData, calls: list[int]) -> None:
    settings, n = load(tmp_path), len(data.train)
    taught(settings, data, "avg_mkd")
    assert sum(calls) == 2 * n
    taught(settings, data)  # its maps are missing, and they alone
    before, calls[:] = shards(tmp_path), []
    found = taught(load(tmp_path, "seed=0", "compare.seeds=[3]", "loss.temperature=2"), data)
    for batch in batches(settings, data):
        found.outputs(batch)
    assert calls == [] and shards(tmp_path) == before
    assert {p.name.rpartition("-")[0] for p in tmp_path.glob("teacher-cache/*")} == {
        "a-logits", "a-hint", "b-logits", "b-hint"}  # fmt: skip


@pytest.mark.parametrize("kind", ["float16", 3])
def test_rounded_outputs_are_near_and_the_same_from_the_disk_and_live(
    tmp_path: Path, data: ImageData, kind: str | int
) -> None:
    settings = load(tmp_path, f"cache.logits={kind}", "cache.hints=float16")
    exact = taught(load(tmp_path, "cache.teachers=never"), data)
    kept, live = (
        taught(settings, data),
        taught(load(tmp_path, f"cache.logits={kind}", "cache.hints=float16", "cache.teachers=never"), data),
    )
    assert kept.cache and not live.cache
    for batch in batches(settings, data):
        a, b, c = kept.outputs(batch), live.outputs(batch), exact.outputs(batch)
        for x, y in zip(a.maps, c.maps, strict=True):
            torch.testing.assert_close(x, y, rtol=2**-10, atol=1e-5)
        for x, y, z in zip(a.logits, b.logits, c.logits, strict=True):
            torch.testing.assert_close(x, y, rtol=2**-9, atol=1e-4)
            if kind == "float16":
                torch.testing.assert_close(x, z, rtol=2**-10, atol=1e-5)
                continue
            logs = z.log_softmax(1)
            largest = logs.topk(3, 1).indices
            torch.testing.assert_close(x.gather(1, largest), logs.gather(1, largest), rtol=2**-10, atol=1e-5)
            torch.testing.assert_close(x.exp().sum(1), torch.ones(len(x)), rtol=0, atol=4e-3)
            rest = x.scatter(1, largest, torch.nan)
            assert (rest.nan_to_num(-torch.inf).amax(1) == rest.nan_to_num(torch.inf).amin(1)).all()


def test_the_largest_by_hand() -> None:
    storage = Storage(2)
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log() + 3
    kept = storage.encode(logits)
    assert kept["index"].tolist() == [[0, 1]] and kept["index"].dtype == torch.int16
    assert storage.encode(torch.randn(1, 40_000))["index"].dtype == torch.int32
    torch.testing.assert_close(kept["rest"].exp(), torch.tensor([0.25]))
    torch.testing.assert_close(storage.decode(kept, [4]), logits - 3, rtol=2**-10, atol=0)
    # A rest of 1e-30 is lost in float16, and in 1 - sum in any type.
    sure = storage.encode(torch.tensor([[0.0, -1.0, -69.0, -69.0]]))
    assert sure["rest"].item() == pytest.approx(-69.0 + torch.tensor(2 / (1 + torch.e**-1)).log().item(), abs=1e-3)
    rows = [shape for _, shape in storage.parts([4]).values()]
    assert storage.row_bytes([4]) == 4 + 2 * 2 + 2 * 2 and rows[0] == ()  # the widest type first


def test_as_many_as_there_are_classes_are_refused(tmp_path: Path, data: ImageData) -> None:
    with pytest.raises(ConfigError, match=r"cache\.logits must be fewer than the 10 classes of digits, got 10"):
        taught(load(tmp_path, "cache.logits=10"), data)


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path, "x", {}, rows=2, shape=[3], storage=Storage("float16"))
    with locked(store):
        store.prepare()
        with pytest.raises(CacheError, match=r"below 65504 for float16, got 70000"):
            store.add(0, torch.tensor([[1.0, 7e4, 0.0]] * 2))


def test_opening_maps_and_reads_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path, "x", {}, rows=4096, shape=[4096], storage=Storage(), shard_bytes=2**25)
    with locked(store):
        store.prepare()
        for first in range(0, 4096, 512):
            store.add(first, torch.full((512, 4096), float(first)))

    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024

    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc here")
    before = resident()
    assert store.open() and len(store.shards) == 2
    assert resident() - before < store.nbytes() // 8
    assert str(store.path(1)) in Path("/proc/self/maps").read_text()
    assert store.rows(torch.tensor([4095, 0])).mean(1).tolist() == [3584.0, 0.0]


def test_lookups_across_shards_are_those_of_one(tmp_path: Path) -> None:
    values = torch.randn(50, 2, 3)
    for name, size in (("one", 2**20), ("many", 24 * 7)):
        store = Store(tmp_path, name, {}, rows=50, shape=[2, 3], storage=Storage(), shard_bytes=size)
        with locked(store):
            store.prepare()
            for first in range(0, 50, 20):
                store.add(first, values[first : first + 20])
        assert store.open() and len(store.shards) == (1 if name == "one" else 8)
        index = torch.randint(50, (33,))
        assert torch.equal(store.rows(index), values[index])
        store.to(torch.device("cpu"))
        assert len(store.shards) == 1 and torch.equal(store.rows(index), values[index])


def test_hints_may_be_left_out(tmp_path: Path, data: ImageData, calls: list[int]) -> None:
    settings = load(tmp_path, "cache.hints=never")
    assert not taught(settings, data).cache and not (tmp_path / "teacher-cache").exists()  # nothing would be looked up
    both = [student_job(settings, method, 0) for method in ("avg_mkd", "amtml_kd")]
    found = load_teachers(settings, data, both, QUIET)
    assert found is not None and not list(tmp_path.glob("teacher-cache/*hint*"))
    batch = batches(settings, data)[0]
    calls.clear()
    assert len(found.outputs(batch).maps) == 2 and calls == [96]
    assert found.only(["b"], hints=False).outputs(batch).maps == [] and calls == [96]


# --- views ------------------------------------------------------------------------------------------------------------

VIEWS = ("data.augment=true", "data.views=2")


def test_views_are_drawn_by_image_whatever_the_order(tmp_path: Path, data: ImageData) -> None:
    settings = load(tmp_path, *VIEWS)

    def images(epoch: int, settings: Config = settings, **options: int) -> Tensor:
        out = torch.empty(len(data.train), *data.train.images.shape[1:])
        for batch in batches(settings, data, epoch, **options):
            out[batch.index] = batch.images
        return out

    first, second = images(1), images(2)
    assert torch.equal(first, images(3)) and torch.equal(second, images(4)) and not torch.equal(first, second)
    assert [batch.view for e in (1, 2, 3) for batch in batches(settings, data, e)[:1]] == [1, 2, 1]
    assert torch.equal(images(1, load(tmp_path, *VIEWS[:1], "data.views=5")), first)  # more views keep the first
    other = load(tmp_path, *VIEWS, "data.augment_seed=9")
    assert not torch.equal(images(1, other), first) and torch.equal(images(3, other), images(1, other))
    orders = [[b.index.tolist() for b in batches(settings, data, epoch)] for epoch in (1, 3)]
    assert orders[0] != orders[1]
    plain = batches(load(tmp_path), data)[0]
    assert plain.view == 0 and torch.equal(plain.index, batches(settings, data)[0].index)
    assert batches(load(tmp_path, VIEWS[0]), data)[0].view is None


def test_two_processes_see_the_views_of_one(tmp_path: Path, data: ImageData) -> None:
    settings = load(tmp_path, *VIEWS)
    found = taught(settings, data)
    ranks = [batches(settings, data, 2, rank=rank, world_size=2) for rank in (0, 1)]
    for whole, *parts in zip(batches(settings, data, 2), *ranks, strict=True):
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        for t, logits in enumerate(found.outputs(whole).logits):
            assert torch.equal(torch.cat([found.outputs(part).logits[t] for part in parts]), logits)


def test_augmented_outputs_are_looked_up_by_view(tmp_path: Path, data: ImageData, calls: list[int]) -> None:
    settings = load(tmp_path, *VIEWS, "cache.teachers=always")
    found = taught(settings, data)
    assert list(found.cache) == [1, 2] and sum(calls) == 4 * len(data.train)
    calls.clear()
    for epoch in (1, 2, 3):
        batch = batches(settings, data, epoch)[1]
        kept = found.outputs(batch)
        assert calls == []
        live = found.live(batch.images)
        for x, y in zip([*kept.logits, *kept.maps], [*live.logits, *live.maps], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
        calls.clear()
    for anew in (batches(load(tmp_path), data)[0], batches(load(tmp_path, VIEWS[0]), data)[0]):
        found.outputs(anew)  # images as they are, and images drawn anew, are not what was kept
    assert calls == [96, 96]
    calls.clear()
    taught(load(tmp_path, "data.augment=true", "data.views=3"), data)  # one more
    assert sum(calls) == 2 * len(data.train)
    taught(load(tmp_path, "data.augment=true", "data.views=9"), data)  # three epochs see three
    assert sum(calls) == 2 * len(data.train)


def test_a_student_on_views_learns_the_same_from_the_disk_and_live(tmp_path: Path, data: ImageData) -> None:
    rows = []
    for name, kept in (("kept", "always"), ("live", "never")):
        settings = load(tmp_path, *VIEWS, f"name={name}", f"cache.teachers={kept}", "distill.lr=0.01")
        rows.append(distill(settings, data, "avg_mkd", 4, QUIET, resume=False, fresh=False).read_metrics())
    for a, b in zip(*rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert len({row["loss"] for row in rows[0]}) == 3


def test_what_changes_results_is_in_the_recipe(tmp_path: Path) -> None:
    def recipe(*overrides: str, method: str = "amtml_kd") -> dict[str, object]:
        return student_job(load(tmp_path, *overrides), method, 0).recipe()

    plain = recipe()
    assert "cache" not in plain and set(plain["data"]) == {"name", "val_fraction", "augment"}  # as before there was one
    for same in ("cache.teachers=never", "cache.folder=/x", "cache.hints=never", "data.augment_seed=5"):
        assert recipe(same) == plain
    assert recipe("cache.logits=float16")["cache"] == {"logits": "float16"}
    assert recipe("cache.logits=4", "cache.hints=float16")["cache"] == {"logits": 4, "hints": "float16"}
    assert recipe("cache.logits=4", "cache.hints=float16", method="avg_mkd")["cache"] == {"logits": 4}
    assert recipe("cache.logits=4", method="student") == recipe(method="student")
    views = recipe(*VIEWS, method="student")
    assert views["data"]["views"] == 2 and views["data"]["augment_seed"] == 0  # type: ignore[index]
    assert recipe(*VIEWS, "data.augment_seed=0", method="student") == views != recipe(*VIEWS[:1], method="student")
    assert recipe(*VIEWS, "data.augment_seed=1", method="student") != views
    settings = load(tmp_path, *VIEWS)
    of_teacher = teacher_job(settings, settings.teachers[0]).recipe()
    assert set(of_teacher["data"]) == {"name", "val_fraction", "augment"}  # they are trained without views


# --- what decides the outputs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    ["weights", "seed=1", "data.val_fraction=0.2", "teachers.0.hint=block1", "cache.hints=float16",
     "engine.channels_last=true", "mean"],
)  # fmt: skip
def test_what_decides_the_outputs_is_in_the_key(tmp_path: Path, data: ImageData, change: str) -> None:
    def folders(settings: Config, data: ImageData) -> list[str]:
        found = frozen.load(settings, data, hints=True)
        return [store.folder.name for store in stores(settings, found, data)[0].of(0)]

    before, overrides = folders(load(tmp_path), data), []
    if change == "weights":
        save_file(small_cnn(10, width=4).state_dict(), tmp_path / "a.safetensors")
    elif change == "mean":
        overrides = ["teachers.0.model.mean=[0.3]", "teachers.0.model.std=[0.2]"]
    else:
        overrides = [change]
    settings = load(tmp_path, *overrides)
    logits, maps = folders(settings, load_data(settings))
    assert maps != before[1]
    assert (logits == before[0]) == (change in ("teachers.0.hint=block1", "cache.hints=float16"))


def test_the_order_of_images_and_labels_is_in_the_key(tmp_path: Path, data: ImageData) -> None:
    settings, train = load(tmp_path), data.train
    found = frozen.load(settings, data, hints=False)
    turned = ImageSet(train.images.flip(0), train.labels), ImageSet(train.images, train.labels.flip(0))
    all_data = (data, *(replace(data, train=split) for split in turned))  # the statistics are the same
    assert len({stores(settings, found, each)[0].logits[0].folder for each in all_data}) == 3


def test_room_decides(
    tmp_path: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = 2 * len(data.train) * 10 * 4  # bytes of two teachers' logits
    monkeypatch.setattr(fill, "free_disk", lambda folder: 2 * size - 1)
    job = [student_job(load(tmp_path), "avg_mkd", 0)]
    found = load_teachers(load(tmp_path), data, job, Display())
    assert found is not None and not found.cache and not (tmp_path / "teacher-cache").exists()
    assert "half of the free disk" in capsys.readouterr().out
    monkeypatch.setattr(fill, "free_disk", lambda folder: size - 1)
    with pytest.raises(CacheError, match=rf"teacher-cache: no room .* {size:,} bytes needed.*nothing was written"):
        taught(load(tmp_path, "cache.teachers=always"), data, "avg_mkd")
    monkeypatch.setattr(fill, "free_disk", lambda folder: size)
    assert taught(load(tmp_path, "cache.teachers=always"), data, "avg_mkd").cache
    monkeypatch.setattr(fill, "free_disk", lambda folder: 0)
    assert taught(load(tmp_path), data, "avg_mkd").cache  # nothing more is wanted
    monkeypatch.setattr(fill, "free_memory", lambda device: size - 1)
    assert not taught(load(tmp_path), data, "avg_mkd").cache
    assert taught(load(tmp_path, "cache.teachers=always"), data, "avg_mkd").cache


# --- several writers, killed writers ----------------------------------------------------------------------------------

FILL = """
import os, signal, sys
from amtml_fast.train.config import reading
from amtml_fast.train.run import prepare
from amtml_fast.train.run.job import student_job
from amtml_fast.train.progress import Display
from amtml_fast.train.teachers.store import Store

Store.__init__.__kwdefaults__["shard_bytes"] = 24_000
dies = int(sys.argv[2])
write, written = Store._write, []

def counted(self, path, *content):
    if path.suffix == ".safetensors":
        written.append(path)
        if len(written) == dies:
            replace = os.replace
            os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
    return write(self, path, *content)

Store._write = counted
settings = reading.load(sys.argv[1] + "/small.yaml", ["out=" + sys.argv[1]])
print("ready", flush=True)
sys.stdin.readline()
data = prepare.load_data(settings)
found = prepare.load_teachers(settings, data, [student_job(settings, "amtml_kd", 0)], Display())
print(len(written), bool(found.cache), flush=True)
"""


def writer(folder: Path, dies: int = 0) -> subprocess.Popen[str]:
    """A process that waits for a line and fills the cache; with `dies` it is killed before that shard has its name."""
    return subprocess.Popen(
        [sys.executable, "-c", FILL, str(folder), str(dies)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def test_a_killed_writers_whole_shards_are_kept_and_the_others_made(tmp_path: Path, data: ImageData) -> None:
    settings = load(tmp_path)
    process = writer(tmp_path, dies=3)
    process.communicate("\n", timeout=120)
    assert process.returncode == -signal.SIGKILL
    left = shards(tmp_path)
    whole = {name: found for name, found in left.items() if "/shard-" in name}
    assert len(whole) == 2 and sum("/.shard-" in name for name in left) == 1  # and what it was writing
    found = taught(settings, data)
    assert found.cache and whole.items() <= shards(tmp_path).items()  # not even touched
    assert not [name for name in shards(tmp_path) if "/.shard-" in name or "/.key" in name]
    shutil.move(tmp_path / "teacher-cache", tmp_path / "other")
    unbroken = taught(settings, data)
    for batch in batches(settings, data):
        assert equal(found.outputs(batch), unbroken.outputs(batch))


def test_two_writers_at_once_share_the_work(tmp_path: Path, data: ImageData) -> None:
    settings = load(tmp_path)
    team = [writer(tmp_path) for _ in range(2)]
    for process in team:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    said = []
    for process in team:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in team:
        said.append(process.communicate(timeout=120)[0])
        assert process.returncode == 0
    counts = [int(text.split()[-2]) for text in said]
    assert [text.split()[-1] for text in said] == ["True", "True"]
    assert sum(counts) == len(list(tmp_path.glob("teacher-cache/*/shard-*")))  # none was written twice
    both = shards(tmp_path)
    assert not [name for name in both if "/.shard-" in name]
    shutil.rmtree(tmp_path / "teacher-cache")
    taught(settings, data)
    alone = shards(tmp_path)
    assert {name: found[0] for name, found in both.items()} == {name: found[0] for name, found in alone.items()}


def test_the_second_waits_and_goes_on_when_the_first_dies(
    tmp_path: Path, data: ImageData, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = load(tmp_path)
    found = frozen.load(settings, data, hints=False)
    held = stores(settings, found, data)[0].logits
    with locked(held[0]) as first, locked(held[1]) as second:
        assert first and second
        with locked(held[0]) as again:
            assert not again
        waiting = threading.Thread(target=use_cache, args=(settings, found, data, Display()))
        waiting.start()
        time.sleep(0.5)
        assert waiting.is_alive() and not list(tmp_path.glob("teacher-cache/*/shard-*"))
    waiting.join(60)  # the locks went without a file, as they do when a process is killed
    assert found.cache and not waiting.is_alive()
    assert capsys.readouterr().out.count("waiting for another process") == 1


def test_without_locks_two_writers_still_end_with_a_whole_cache(
    tmp_path: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_lock, "fcntl", None)
    settings = load(tmp_path)
    found = [frozen.load(settings, data, hints=True) for _ in range(2)]
    errors: list[BaseException] = []

    def use(one: Teachers) -> None:
        try:
            use_cache(settings, one, data, QUIET)
        except BaseException as error:
            errors.append(error)

    team = [threading.Thread(target=use, args=(each,)) for each in found]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    assert errors == []
    for batch in batches(settings, data):
        assert equal(found[0].outputs(batch), found[1].outputs(batch))
    assert not list(tmp_path.glob("teacher-cache/*/.shard-*"))


def test_teachers_in_threads_leave_the_compiler_as_it_was(tmp_path: Path, data: ImageData) -> None:
    found = frozen.load(load(tmp_path), data, hints=False)
    inside, leave = [threading.Event() for _ in range(2)], [threading.Event() for _ in range(2)]
    mine = threading.local()
    forward = found.models[0].forward

    def waits(images: torch.Tensor) -> object:
        inside[mine.number].set()
        assert leave[mine.number].wait(60)
        return forward(images)

    found.models[0].forward = waits  # type: ignore[method-assign]

    def run(number: int) -> None:
        mine.number = number
        found.live(torch.zeros(2, *data.train.images.shape[1:]))

    team = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread, there in zip(team, inside):
        thread.start()
        assert there.wait(60)
    for thread, go in zip(team, leave):  # the first to come is the first to leave
        go.set()
        thread.join()
    compiled = torch.compile(lambda x: x + int(torch.compiler.is_compiling()), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())) == 1


def test_a_file_that_another_machines_writer_took_away_is_written_again(
    tmp_path: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, taken = os.replace, []

    def once(source: str, target: str) -> None:
        if not taken:
            taken.append(source)
            os.unlink(source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", once)
    assert taught(load(tmp_path), data).cache and taken


def test_a_stop_while_filling_comes_between_batches(
    tmp_path: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    write = Store._write_shard

    asked: list[Store] = []

    def interrupted(self: Store, *args: object) -> None:
        if not asked:  # a second one would not wait
            signal.raise_signal(signal.SIGINT)
        asked.append(self)
        write(self, *args)  # type: ignore[arg-type]

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Store, "_write_shard", interrupted)
            with pytest.raises(KeyboardInterrupt):
                taught(load(tmp_path), data, "avg_mkd")
    finally:
        signal.signal(signal.SIGINT, before)
    left = shards(tmp_path)
    assert len([name for name in left if "/shard-" in name]) == 1 and not [name for name in left if "/.shard" in name]
    assert taught(load(tmp_path), data, "avg_mkd").cache and shards(tmp_path).items() >= left.items()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_leaves_nothing_half(
    tmp_path: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    (tmp_path / "mine").write_text("stays")
    sync, count = os.fsync, []

    def full(handle: int) -> None:
        count.append(handle)
        if len(count) == 9:  # of a file: every other one is of its folder
            raise OSError(code, "No space left on device")
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CacheError, match=r"teacher-cache.a-hint-\w+: no room .* bytes needed, [\d,]+ free; files"):
            taught(load(tmp_path), data)
    left = shards(tmp_path)
    assert not [name for name in left if "/.shard" in name or "/.key" in name]
    assert (tmp_path / "mine").read_text() == "stays" and any("/shard-" in name for name in left)
    assert taught(load(tmp_path), data).cache and shards(tmp_path).items() >= left.items()


# --- what is refused --------------------------------------------------------------------------------------------------


def tampered_key(folder: Path) -> Path:
    path = one(folder, "a-logits-*/key.json")
    key = json.loads(path.read_text())
    key["teacher"]["weights"] = "0" * 64
    path.write_text(json.dumps(key))
    return path


def broken_key(folder: Path) -> Path:
    path = one(folder, "a-logits-*/key.json")
    path.write_text(path.read_text()[:-10])
    return path


def cut(folder: Path) -> Path:
    path = one(folder, "a-logits-*/shard-00001.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    return path


def empty(folder: Path) -> Path:
    path = one(folder, "a-hint-*/shard-00002.safetensors")
    path.write_bytes(b"")
    return path


def foreign(folder: Path) -> Path:
    path = one(folder, "b-logits-*/shard-00000.safetensors")
    save_file({"values": torch.zeros(600, 10)}, path)
    return path


def of_another_teacher(folder: Path) -> Path:
    paths = one(folder, "a-logits-*/shard-00000.safetensors"), one(folder, "b-logits-*/shard-00000.safetensors")
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content)
    return paths[0]


def swapped(folder: Path) -> Path:
    paths = [one(folder, f"b-logits-*/shard-0000{i}.safetensors") for i in (0, 1)]
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content)
    return paths[0]


def rewritten(change: Callable[[Tensor], Tensor]) -> Callable[[Path], Path]:
    def rewrite(folder: Path) -> Path:
        path = one(folder, "a-logits-*/shard-00001.safetensors")
        with safe_open(path, "pt") as file:
            metadata, values = file.metadata(), file.get_tensor("values").clone()
        save_file({"values": change(values)}, path, metadata=metadata)
        return path

    return rewrite


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (tampered_key, r"teacher\.weights must be '[0-9a-f]{64}', got '0{64}'"),
        (broken_key, r"not readable as JSON"),
        (cut, r"a whole safetensors file with 24000 bytes of rows, got \d+ bytes"),
        (empty, r"a whole safetensors file with \d+ bytes of rows, got 0 bytes"),
        (foreign, r"key must be [0-9a-f]{64}, got None"),
        (of_another_teacher, r"key must be [0-9a-f]{64}, got [0-9a-f]{64}"),
        (swapped, r"rows must be 0:600, got 600:1200"),
        (rewritten(lambda x: x[1:]), r"tensors must be {'values': \('F32', \[600, 10\]\)}, got .*\[599, 10\]"),
        (rewritten(lambda x: x[:, 1:].contiguous()), r"\[600, 10\]\)}, got .*\[600, 9\]"),
        (rewritten(lambda x: x.half()), r"'F32', .*, got .*'F16'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_left_alone(
    tmp_path: Path, data: ImageData, damage: Callable[[Path], Path], message: str
) -> None:
    settings = load(tmp_path)
    taught(settings, data)
    path = damage(tmp_path)
    before = shards(tmp_path)
    with pytest.raises(CacheError, match=message) as refused:
        taught(settings, data)
    said = str(refused.value)
    assert said.startswith(f"{path}: not used") and f"Delete the folder {path.parent}" in said
    assert shards(tmp_path) == before
    shutil.rmtree(path.parent)
    if damage is of_another_teacher:
        shutil.rmtree(one(tmp_path, "b-logits-*"))
    assert taught(settings, data).cache


def test_a_damaged_shard_is_refused_before_its_missing_neighbors_are_made(
    tmp_path: Path, data: ImageData, calls: list[int]
) -> None:
    settings = load(tmp_path)
    taught(settings, data)
    one(tmp_path, "a-logits-*/shard-00000.safetensors").unlink()
    path, before = cut(tmp_path), shards(tmp_path)
    calls.clear()
    with pytest.raises(CacheError, match=r"shard-00001\.safetensors: not used"):
        taught(settings, data)
    assert calls == [] and shards(tmp_path) == before and path.exists()


def test_a_shard_that_went_missing_is_made_again_alone(tmp_path: Path, data: ImageData, calls: list[int]) -> None:
    settings = load(tmp_path)
    taught(settings, data)
    before = shards(tmp_path)
    for gone in ("a-logits-*/shard-00001.safetensors", "b-hint-*/key.json"):
        one(tmp_path, gone).unlink()
    calls.clear()
    assert taught(settings, data).cache
    after = shards(tmp_path)
    assert {name: x[0] for name, x in after.items()} == {name: x[0] for name, x in before.items()}
    assert sum(after[name] != before[name] for name in after) == 2 and len(calls) == 2  # of three batches


def test_a_worker_reports_it(tmp_path: Path) -> None:
    import pickle

    error = pickle.loads(pickle.dumps(no_room(tmp_path, 5, "x")))
    assert isinstance(error, CacheError) and "5 bytes needed" in str(error)


def test_the_run_folders_know_nothing_of_it(tmp_path: Path, data: ImageData) -> None:
    settings = load(tmp_path, "cache.folder=" + str(tmp_path / "elsewhere"), "distill.epochs=1")
    job = student_job(settings, "avg_mkd", 0)
    assert trainer.train(job, data, taught(settings, data, "avg_mkd"), QUIET).finished()
    assert len(list((tmp_path / "elsewhere").iterdir())) == 2 and not (tmp_path / "teacher-cache").exists()
