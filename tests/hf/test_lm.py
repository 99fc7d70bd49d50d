"""The example of language models: its text, and all of it with a few steps."""

import json
import re
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from transformers import TrainingArguments, default_data_collator

import amtml_fast
from amtml_fast.hf import lm

FEW = lm.Settings(
    length=64, batch=4, teacher_size=(32, 1), teacher_steps=2, student_size=(32, 1), student_steps=2,
    student_examples=4, heldout_examples=8, seeds=(0, 1),
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A part of the standard library."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    tests = sorted(stdlib.glob("test/test_[ab]*.py"))
    if not tests:
        pytest.skip("this Python has no test package")
    folder = tmp_path_factory.mktemp("stdlib")
    (folder / "test").mkdir()
    for path in [*sorted(stdlib.glob("[a-d]*.py")), *tests[:30]]:
        (folder / path.relative_to(stdlib)).symlink_to(path)
    return folder


def test_nothing_held_out_is_in_a_training_text(root):
    text = lm.read_text(root)
    files = list(lm.library(root))
    for name, domain, content in files:
        own = lm.split_of(name)
        assert content in text[own][domain]
        if len(content) > 100:
            assert not any(content in text[split][domain] for split in text if split != own), name
    assert all(text[split][domain] for split in text for domain in lm.DOMAINS)


def test_code_and_docstrings():
    code, docstrings = lm.without_docstrings(
        '"""A module."""\n\n\ndef f(x):  # why\n    """It\n    doubles."""\n    return 2 * x\n\n\nclass A:\n    """Empty."""\n'
    )
    assert code == "def f(x):\n    return 2 * x\n\nclass A:\n    pass"
    assert docstrings == "A module.\n\nIt\ndoubles.\n\nEmpty."


def test_examples_are_pieces_of_all_of_the_text():
    text = bytes(range(100))
    assert [bytes(e["input_ids"]) for e in lm.examples(text, 30)] == [text[:30], text[30:60], text[60:90]]
    assert [e["input_ids"][0] for e in lm.examples(text, 10, 3, teacher_index=1)] == [0, 30, 60]


def test_the_whole_example(root, tmp_path, capsys):
    lm.run(FEW, tmp_path, "validation", root)
    lines = (tmp_path / "table.md").read_text().splitlines()
    names = [f"teacher of {d}" for d in lm.DOMAINS] + [f"student, {m}" for m in lm.METHODS]
    assert [line.split(" | ")[0] for line in lines[2:9]] == [f"| {name}" for name in names]
    assert all(len(line.split("|")) == 7 for line in lines[:9])
    assert lines[10].startswith("adaptive - uniform, seed by seed: code ")
    assert lines[8] in capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    bits = metrics["bits_per_byte"]
    assert [len(bits[name]) for name in names] == [1, 1, 1, 2, 2, 2, 2]
    assert all(5 < b < 9 for seeds in bits.values() for of_seed in seeds for b in of_seed)  # 8 knows nothing
    assert all(sum(row) == pytest.approx(1) for row in metrics["mean_weights"])
    assert (tmp_path / "weights.png").stat().st_size > 10_000


def test_the_page_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student, *teachers = (lm.llama((32, 1), 16, seed) for seed in range(3))
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (6, 16))
    logits, teacher_logits, labels = torch.randn(6, 256), torch.randn(6, 256), ids[:, 0]
    log_probs, indices = teacher_logits.log_softmax(-1).topk(4)
    names = dict(
        vars(amtml_fast), student=student, teachers=teachers, teacher=teachers[0], other_teacher=teachers[1],
        dataset=lm.examples(bytes(ids.flatten().tolist()), 16), collator=default_data_collator,
        args=TrainingArguments("runs", max_steps=1, report_to="none"), ids=ids, next_tokens=ids.roll(-1, 1),
        weights=torch.full((6, 16, 2), 0.5), h=torch.randn(6, 8), w=torch.randn(256, 8), teacher_h=torch.randn(6, 4),
        teacher_w=torch.randn(256, 4), labels=labels, logits=logits, student_logits=logits, teacher_logits=teacher_logits,
        indices=indices, log_probs=log_probs,
    )  # fmt: skip
    page = Path(__file__).parents[2] / "docs" / "language_models.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    # The others are run by test_vocabulary_calls.py.
    blocks = [b for b in blocks if "parallelize_module" not in b and "process_group" not in b]
    assert len(blocks) == 8
    for block in blocks:
        exec(block.replace("max_steps=1000", "max_steps=2"), names)
        assert not torch.is_tensor(names.get("loss")) or names["loss"].isfinite()


def test_without_pythons_tests_it_says_so(tmp_path):
    with pytest.raises(SystemExit, match=r"must have Python's own tests; Debian: apt-get install"):
        lm.run(replace(FEW, seeds=(0,)), tmp_path / "out", root=tmp_path)
