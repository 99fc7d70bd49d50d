"""How a configuration is read: ranges of numbers, text as it is written, paths, overrides; what it refuses, and in which words."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from small_run import ROOT, YAML, Place

from amtml_fast.train.compare.plan import checked, plan
from amtml_fast.train.config import fields, reading, yaml_text
from amtml_fast.train.config.schema import Config, ConfigError, File, VariantConfig
from amtml_fast.train.models.features import FeatureExtractor
from amtml_fast.train.models.networks import build

WHOLE = """
name: small
teachers: [{name: a, model: {weights: a.pt, mean: [0.5], std: [0.5]}, classes: [1]}]
student: {name: s}
compare: {students: [{name: other}], methods: [student], teachers: [1]}
variants: {mine: {method: amtml_kd}}
data: {augment: true, views: 2}
"""
TEXTS = (
    "010",
    "no",
    "yes",
    "on",
    "5e-4",
    "1_000",
    "0x10",
    "1:30",
    "08",
    "1.0",
    "2024-01-01",
    ".inf",
    "null-1",
    "a # b",
)


def load(folder: Path, lines: str = WHOLE, *overrides: str) -> Config:
    path = folder / "small.yaml"
    path.write_text(lines)
    return checked(reading.load(path, overrides))


def sections(schema_class: type = Config) -> list[type]:
    """The configuration's classes."""
    found = [schema_class]
    for hint in fields.hints(schema_class).values():
        inner = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else fields.inner(hint)
        found += sections(inner) if dataclasses.is_dataclass(inner) else []
    return list(dict.fromkeys(found))


def kinds(hint: Any) -> set[Any]:
    return set().union(*map(kinds, typing.get_args(hint))) if typing.get_args(hint) else {hint}


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_number_has_a_range(section: type) -> None:
    hints = fields.hints(section)
    for one in dataclasses.fields(section):
        if kinds(hints[one.name]) & {int, float}:
            assert isinstance(one.metadata.get(fields.RANGE), fields.Range), one.name


def numbers() -> list[str]:
    return [name for name, _, _, one in fields.leaves(File()) if fields.RANGE in one.metadata] + [
        "teachers.0.model.mean",
        "teachers.0.model.std",
        "teachers.0.classes",
        "teachers.0.train.lr",
        "teachers.0.train.epochs",
    ]


@pytest.mark.parametrize("key", numbers())
def test_a_number_out_of_its_range_is_refused(tmp_path: Path, key: str) -> None:
    hint = fields.hint_at(Config, key, free=True)
    section, _, name = key.rpartition(".")
    owner = fields.hint_at(Config, section, free=True) if section else Config
    allowed = next(one for one in dataclasses.fields(owner) if one.name == name).metadata[fields.RANGE]
    bad = [".nan", ".inf", "-.inf"] if float in kinds(hint) else []
    if allowed.low != float("-inf"):
        bad.append(str(allowed.low if allowed.above else allowed.low - max(1, abs(allowed.low))))
    if allowed.high != float("inf"):
        bad.append(str(allowed.high if allowed.below else 2 * allowed.high))
    assert bad
    for value in bad:
        written = f"[{value}]" if list in (typing.get_origin(hint), typing.get_origin(fields.inner(hint))) else value
        with pytest.raises(ConfigError, match=rf"^config: \S*{name} must be {_escaped(allowed)}.*, got "):
            load(tmp_path, WHOLE, f"{key}={written}")


def _escaped(allowed: fields.Range) -> str:
    return "".join(f"\\{letter}" if letter in "[](){}.*+?" else letter for letter in str(allowed))


def test_ranges_say_what_they_are() -> None:
    assert [str(each[fields.RANGE]) for each in (fields.FINITE, fields.COUNT, fields.POSITIVE, fields.SHARE)] == [
        "in [-1e+18, 1e+18]", "1 or more", "in [1e-18, 1e+18]", "in [0, 1]"]  # fmt: skip
    inside = fields.Range(0, 1, above=True, below=True)
    assert str(inside) == "in (0, 1)" and 0 not in inside and 1 not in inside and 0.5 in inside
    assert 10**400 in fields.COUNT[fields.RANGE] and float("inf") not in fields.COUNT[fields.RANGE]


@pytest.mark.parametrize("text", ["010", "08", "-010", "1_000", "1:30", "'010'", "' 3'", "0o17", "1__0"])
@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("seed", ""),
        ("distill.epochs", "distill: {epochs: 3}"),
        ("loss.temperature", "loss: {temperature: 3}"),
        ("teachers.0.train.epochs", "teachers: [{name: a, train: {epochs: 3}}]"),
        ("variants.mine.loss.alpha", "variants: {mine: {loss: {alpha: 3}}}"),
        ("compare.seeds.0", "compare: {seeds: [3]}"),
    ],
)
def test_a_number_that_is_read_in_two_ways_is_refused(tmp_path: Path, key: str, place: str, text: str) -> None:
    wanted = (
        "must be int|must be float" if text == "0o17" else rf"{key}\S* must be an? (integer|number) without leading"
    )
    lines = (place or "seed: 3").replace("3", text)
    with pytest.raises(ConfigError, match=wanted):
        load(tmp_path, lines)
    if key != "compare.seeds.0":
        with pytest.raises(ConfigError, match=wanted):
            load(tmp_path, WHOLE, f"{key}={text}")


@pytest.mark.parametrize("text", ["010", "5", "1_0"])
def test_a_truth_value_is_no_number(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.augment must be true or false, got"):
        load(tmp_path, f"data: {{augment: {text}}}")
    assert load(tmp_path, "data: {augment: yes}").data.augment and load(tmp_path, "data: {augment: 1}").data.augment


@pytest.mark.parametrize(("text", "value"), [("10", 10), ("+3", 3), ("0", 0), ("0x10", 16)])
def test_plain_integers_are_read(tmp_path: Path, text: str, value: int) -> None:
    assert load(tmp_path, f"seed: {text}").seed == load(tmp_path, WHOLE, f"seed={text}").seed == value


@pytest.mark.parametrize("text", ["1e1", "10.", "10", "1.0e+1", "1E1", "10.0"])
def test_plain_numbers_are_read(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, f"loss: {{temperature: {text}}}").loss.temperature == 10.0
    assert load(tmp_path, WHOLE, f"loss.temperature={text}").loss.temperature == 10.0


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_kept_as_it_is_written(tmp_path: Path, text: str) -> None:
    settings = load(tmp_path, WHOLE, f"name={text}", f"student.weights={text}", f"data.name={text}")
    assert (settings.name, settings.student.weights, settings.data.name) == (text, text, text)
    assert settings.folder == Path("runs") / text
    if "#" not in text:  # a comment in a file
        lines = (
            f"name: {text}\ndata: {{name: {text}}}\nstudent: {{groups: {{{text}: {text}}}}}\ncompare: {{methods: []}}"
        )
        if ":" not in text:
            written = load(tmp_path, lines)
            assert (written.name, written.data.name, written.student.groups) == (text, text, {text: text})
            (tmp_path / "again.yaml").write_text(reading.to_yaml(written))
            assert reading.load(tmp_path / "again.yaml") == written
        assert load(tmp_path, f"name: {text}").name == text


def test_quotes_and_null_are_yamls(tmp_path: Path) -> None:
    assert load(tmp_path, WHOLE, "name='a: b'").name == "a: b" and load(tmp_path, 'name: "010"').name == "010"
    assert load(tmp_path, WHOLE, "student.weights=null").student.weights is None
    with pytest.raises(ConfigError, match="name must be str"):
        load(tmp_path, WHOLE, "name=null")
    for text in ("a: b", "[a", "{a: b}", "*a", "&a", "%a", "@a", "`a", "!a b"):
        assert load(tmp_path, WHOLE, f"name={text}").name == text


def test_an_anchor_serves_keys_of_several_types(tmp_path: Path) -> None:
    settings = load(tmp_path, "name: &n 5\nseed: *n\nteach: &t {epochs: 3, lr: 5e-4}\ndistill: {<<: *t, epochs: 4}")
    assert (settings.name, settings.seed, settings.distill.epochs, settings.distill.lr) == ("5", 5, 4, 5e-4)


def test_free_values_keep_what_is_no_plain_number(tmp_path: Path) -> None:
    args = load(tmp_path, "student: {args: {a: 010, b: 10, c: 1:30, d: [1e-3, yes]}}").student.args
    assert args == {"a": "010", "b": 10, "c": "1:30", "d": [1e-3, True]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("- a", "must hold a mapping of keys, got list"),
        ("text", "must hold a mapping of keys, got str"),
        ("name: a\nname: b", "found the key 'name' twice"),
        ("student: &s {args: *s}", "not readable YAML"),
        ("name: a\x00b", "not readable YAML"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, lines: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, lines)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "# nothing\n") == Config()


def test_yaml_text_reads_what_a_dump_writes() -> None:
    written = {"a": 1e-07, "b": "010", "c": [1, None, True], "d": "1:30", "e": "no", "f": -3, "g": "1e3", "h": ""}
    assert yaml_text.read(OmegaConf.to_yaml(OmegaConf.create(written)), Any) == written


# --- paths and names --------------------------------------------------------------------------------------------------


def test_the_home_folder_stands_for_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    keys = [name for name, _, _, one in fields.leaves(load(tmp_path)) if fields.HOME in one.metadata]
    assert {"out", "data.root", "cache.folder", "teachers_folder", "student.weights", "teachers.0.model.weights",
            "compare.students.0.weights"} == set(keys)  # fmt: skip
    settings = load(tmp_path, WHOLE, *(f"{key}=~/x/{key}" for key in keys))
    found = {name: value for name, value, _, one in fields.leaves(settings) if fields.HOME in one.metadata}
    assert found == {key: f"{tmp_path}/home/x/{key}" for key in keys}
    assert settings.folder == tmp_path / "home/x/out/small"
    assert load(tmp_path, WHOLE, "out=a~b").out == "a~b"
    with pytest.raises(ConfigError, match="out must be a path, with the home folder of a known user for ~, got"):
        load(tmp_path, WHOLE, "out=~nobody-of-this-name/x")


@pytest.mark.parametrize("name", ["..", "a/../..", "/a", ".", "'a\\0b'", '"a\\0b"'])
def test_a_run_stays_below_out(tmp_path: Path, name: str) -> None:
    if name == "'a\\0b'":  # in single quotes a backslash is a backslash
        assert load(tmp_path, WHOLE, f"name={name}").name == "a\\0b"
        return
    with pytest.raises(ConfigError, match="name must be a folder's name, below out, got"):
        load(tmp_path, WHOLE, f"name={name}")


def test_a_run_does_not_share_the_folder_of_the_cache(tmp_path: Path) -> None:
    """That folder may be deleted at any time."""
    with pytest.raises(
        ConfigError, match=r"name must be another folder than that of the teachers' kept outputs, got 'teacher-cache'"
    ):
        load(tmp_path, WHOLE, "name=teacher-cache")
    assert load(tmp_path, WHOLE, "name=teacher-cache", "cache.folder=elsewhere").name == "teacher-cache"


@pytest.mark.parametrize("key", ["teachers.0.name", "student.name", "compare.students.0.name"])
@pytest.mark.parametrize("name", ["..", "-a", "a/b", "a$b", "a[b", ""])
def test_names_that_are_parts_of_folders(tmp_path: Path, key: str, name: str) -> None:
    with pytest.raises(ConfigError, match=r"name must be unique names|name must be str"):
        load(tmp_path, WHOLE, f"{key}={name}")


@pytest.mark.parametrize(
    "overrides",
    [
        ["variants.new={method: amtml_kd, loss: {alpha: 0.5}}"],
        ["variants.new={method: amtml_kd}", "variants.new.loss.alpha=0.5"],
        ["variants.new.method=amtml_kd", "variants.new.loss={alpha: 0.5}"],
        ["variants={new: {method: amtml_kd, loss: {alpha: 0.5}}}"],
    ],
)
def test_a_variant_can_be_made_on_the_command_line(tmp_path: Path, overrides: list[str]) -> None:
    loaded = load(tmp_path, WHOLE, *overrides)
    assert loaded.variants["new"] == VariantConfig(method="amtml_kd", loss={"alpha": 0.5})
    assert ("mine" in loaded.variants) == ("variants={" not in overrides[0])
    with pytest.raises(ConfigError, match=r"variants\.new\.lost: no such key"):
        load(tmp_path, WHOLE, "variants.new={method: amtml_kd, lost: 1}")


# --- files, overrides and packaged configurations ---------------------------------------------------------------------


def test_an_explicit_key_beats_the_preset(place: Place) -> None:
    assert reading.load(place.yaml, ["preset=two_stage", "stages.adapter_epochs=3"]).stages.adapter_epochs == 3
    place.yaml.write_text(YAML + "stages: {adapter_epochs: 2}\n")
    assert reading.load(place.yaml, ["preset=two_stage"]).stages.adapter_epochs == 2


def test_mappings_are_replaced_and_sections_merged(place: Place) -> None:
    settings = reading.load(
        place.yaml, ["student.args={depth: 20}", "distill={lr: 0.5}", "teachers.0.model={args: {}}"]
    )
    assert settings.student.args == {"depth": 20}
    assert settings.distill.lr == 0.5 and settings.distill.epochs == 4
    assert settings.teachers[0].model.factory == "small_cnn" and settings.teachers[0].model.args == {}
    student = "student={factory: resnet, args: {depth: 8}, features: stage3, groups: {only: stage3}}"
    settings = reading.load(place.yaml, [student, "loss={mapping: {a: only}}", "preset=paper_code"])
    assert settings.student.args == {"depth": 8} and settings.student.groups == {"only": "stage3"}
    assert settings.student.name == "student" and settings.loss.mapping == {"a": "only"}


def test_another_network_over_a_base_takes_nothing_of_the_bases_arguments(place: Place) -> None:
    """A resnet over a small CNN of width 2 was a resnet of width 2, with the layer groups of both."""
    student = "{factory: resnet, args: {depth: 8}, features: stage3, groups: {only: stage3}}"
    mine = place.folder / "mine.yaml"
    mapped = "loss: {alpha: 0.5, mapping: {a: only}}"
    mine.write_text(f"base: small.yaml\npreset: paper_code\nstudent: {student}\n{mapped}\n")
    several = place.folder / "several.yaml"
    several.write_text(f"base: small.yaml\nregimes:\n  one: {{student: {student}, {mapped}}}\n  two: {{}}\n")
    for settings in (reading.load(mine), reading.load(f"{several}:one")):
        assert settings.student.args == {"depth": 8} and settings.student.groups == {"only": "stage3"}
        assert settings.student.name == "student" and settings.distill.epochs == 4  # of the base
        assert settings.loss.mapping == {"a": "only"} and settings.loss.alpha == 0.5
    assert reading.load(f"{several}:two").student.args == {"width": 2}


def test_variants_and_regimes_of_a_base_are_replaced_as_their_place_is(place: Place) -> None:
    lower, upper = place.folder / "lower.yaml", place.folder / "upper.yaml"
    text = "variants: {{mine: {{method: amtml_kd, loss: {{mapping: {{{}}}}}}}}}\nregimes: {{one: {{student: {{args: {{{}}}}}}}}}\n"
    lower.write_text("base: small.yaml\n" + text.format("a: b", "width: 3"))
    upper.write_text("base: lower.yaml\n" + text.format("x: y", "depth: 8"))
    settings = reading.load(f"{upper}:one")
    assert settings.variants["mine"].loss["mapping"] == {"x": "y"}
    assert settings.student.args == {"depth": 8}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.epohcs=3", r"distill\.epohcs: no such key; did you mean 'distill\.epochs'"),
        ("distil.epochs=3", r"distil: no such key; did you mean 'distill'"),
        ("teachers.0.nme=x", r"teachers\.0\.nme: no such key; did you mean 'teachers\.name'"),
        ("teachers.0.train.epohcs=3", r"teachers\.a\.train\.epohcs: no such key; did you mean 'epochs'"),
        ("distill.epochs=many", r"distill\.epochs must be int: Value 'many'"),
        ("stages.adapter_epochs=x", r"stages\.adapter_epochs must be int or null"),
        ("data.augment=maybe", r"data\.augment must be bool"),
        ("distill=3", r"distill must be a mapping of keys"),
        ("compare.seeds=3", r"compare\.seeds must be list\[int\]"),
        ("teachers.7.name=x", r"teachers\.7"),
        (
            "preset=two_stag",
            r"preset must be one of default, two_stage, paper_code, got 'two_stag'; did you mean 'two_stage'",
        ),
        ("loss.mode=mixtur", r"loss\.mode must be one of mixture, sum, got 'mixtur'; did you mean 'mixture'"),
        ("loss.mapping=best", r"loss\.mapping must be one of best_high"),
        ("loss.alpha=1.5", r"loss\.alpha must be in \[0, 1\], got 1\.5"),
        ("loss.temperature=0", r"loss\.temperature must be in \[1e-18, 1e\+18\], got 0"),
        ("distill.schedule=onecyle", r"distill\.schedule must be one of .* did you mean 'onecycle'"),
        ("distill.epochs=0", r"distill\.epochs must be 1 or more, got 0"),
        ("compare.methods=[amtmlkd]", r"method must be one of .* did you mean 'amtml_kd'"),
        ("teachers.1.name=a", r"teachers\.name must be unique names"),
        ("distill", r"an override must be key=value, got 'distill'"),
        ("teachers.epochs=1", r"teachers is a list, whose entries have numbers, as teachers\[0\], got 'epochs'"),
        ("teachers.a.hint=x", r"teachers is a list, whose entries have numbers, as teachers\[0\], got 'a'"),
        ("cache_teachers=never", r"cache_teachers: no such key; did you mean 'cache\.teachers'"),
        ("cache.teachers=maybe", r"cache\.teachers must be one of auto, always, never, got 'maybe'"),
        ("cache.logits=float61", r"cache\.logits must be float32, float16 or a number k of 1 or more, got 'float61'"),
        ("cache.logits=0", r"cache\.logits must be .*, got 0"),
        ("cache.hints=3", r"cache\.hints must be one of float32, float16, never, got '3'"),
        ("data.views=4", r"data\.views must be null with data\.augment=false, got 4"),
    ],
)
def test_config_errors_name_the_key_and_the_nearest(place: Place, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(reading.load(place.yaml, [override]))


def test_config_errors_of_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"packaged name \(cifar10, .*\); did you mean 'digits'"):
        reading.load("digit")
    bad = tmp_path / "bad.yaml"
    bad.write_text("distill: {epochs: [")
    with pytest.raises(ConfigError, match=r"bad\.yaml is not readable YAML"):
        reading.load(bad)
    bad.write_text("distill: {epoch: 3}")
    with pytest.raises(ConfigError, match=r"distill\.epoch: no such key; did you mean 'distill\.epochs'.*bad\.yaml"):
        reading.load(bad)


def test_a_config_survives_its_own_yaml(place: Place) -> None:
    settings = place.load("loss.mapping={a: high, b: low}", "engine.mixed_precision=no", "distill.lr=3e-2")
    (place.folder / "again.yaml").write_text(reading.to_yaml(settings))
    assert reading.load(place.folder / "again.yaml") == settings
    assert settings.distill.lr == 0.03 and settings.engine.mixed_precision == "no"


PACKAGED = ("digits", "fashion_mnist", "cifar10", "cifar100", "tiny_imagenet")
SPECIALISTS = ("digits_specialists", "fashion_mnist_specialists")
REGIMES = [f"regimes:{Path(config.name).name}" for config in reading.load_all("regimes")]


@pytest.mark.parametrize("name", [*PACKAGED, *SPECIALISTS, *(f"{name}_fast" for name in PACKAGED), *REGIMES])
def test_packaged_configs_load(name: str) -> None:
    settings = reading.load(name)
    assert settings.name == name.replace(":", "/") and len(settings.teachers) >= 3
    assert len({str(teacher) for teacher in settings.teachers}) == len(settings.teachers)
    engine = settings.engine
    fast = engine.compile and engine.channels_last and engine.mixed_precision == "bf16"
    assert fast == name.endswith("_fast")
    if fast:
        slow = reading.load(name.removesuffix("_fast"))
        assert settings.distill.epochs < slow.distill.epochs and settings.distill.batch_size > slow.distill.batch_size
        assert [teacher.name for teacher in settings.teachers] == [teacher.name for teacher in slow.teachers]
    # Every student offers what every method asks for, and every job has a folder of its own.
    assert plan(settings)
    assert reading.packaged() == sorted([*PACKAGED, *SPECIALISTS, *(f"{each}_fast" for each in PACKAGED), "regimes"])


@pytest.mark.parametrize(("name", "classes", "column"), [("cifar10", 10, 0), ("cifar100", 100, 1)])
def test_the_papers_networks(name: str, classes: int, column: int) -> None:
    """The paper's parameter counts, for 10 and for 100 classes."""
    settings, paper = reading.load(name), {
        "resnet20": (269_722, 275_572),
        "resnet32": (464_154, 470_004),
        "resnet44": (658_586, 664_436),
        "resnet56": (853_018, 858_868),
        "resnet110": (1_727_962, 1_733_812),
        "resnet8": (68_050, 71_020),
        "resnet15": (116_882, 119_852),
        "resnet16": (151_634, 154_604),
    }  # fmt: skip
    networks = {teacher.name: (teacher.model.factory, teacher.model.args) for teacher in settings.teachers}
    students = (settings.student, *settings.compare.students)
    networks |= {student.name: (student.factory, student.args) for student in students}
    for network, counts in paper.items():
        factory, args = networks[network]
        model = build(factory, args, num_classes=classes, in_channels=3)
        assert sum(p.numel() for p in model.parameters()) == counts[column], network
        if network in {student.name for student in students}:
            student = next(each for each in students if each.name == network)
            FeatureExtractor(model, {"features": student.features or "", **student.groups})
    train = settings.distill
    assert (train.epochs, train.batch_size, train.milestones, train.lr) == (200, 128, [100, 150], 0.1)


def test_the_readmes_comparison_can_be_planned(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((ROOT / "README.md").read_text().split("```yaml\n")[1].split("```")[0])
    settings = reading.load(path)
    labels = {job.method.label for job in plan(settings)}
    assert {"student alone", "OKD from resnet110", "AMTML-KD, authors' code", "AMTML-KD, softer"} <= labels
    assert settings.compare.split == "validation" and settings.compare.teachers == [2, 3]
