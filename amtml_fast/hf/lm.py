"""Three small language models, each of one kind of text, teach a smaller one: ``python -m amtml_fast.hf.lm`` (``make lm``).

Nothing is downloaded: models are made from a configuration, tokens are bytes, and the text is Python's own standard library.
Each teacher has read one kind of text only. The student gets a little of each kind, from files that no teacher has seen.
"""

import argparse
import ast
import itertools
import json
import math
import platform
import statistics
import sys
import sysconfig
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator

from amtml_fast.hf.topk_store import store_topk
from amtml_fast.hf.trainer import DistillationTrainer
from amtml_fast.losses import FusedLinearKDLoss

DOMAINS = ("code", "docstrings", "tests")
METHODS = ("alone", "uniform", "adaptive", "routed")
Text = dict[str, dict[str, bytes]]  # [split][domain]


@dataclass(frozen=True)
class Settings:
    """Chosen on the validation split."""

    length: int = 256  # bytes of an example
    batch: int = 8
    teacher_size: tuple[int, int] = (96, 3)  # hidden size, layers
    teacher_steps: int = 500
    teacher_rate: float = 4e-3
    student_size: tuple[int, int] = (64, 2)
    student_examples: int = 48  # of each domain
    student_steps: int = 400
    student_rate: float = 4e-3
    alpha: float = 0.7
    heldout_examples: int = 256  # of each domain
    seeds: tuple[int, ...] = (0, 1, 2)


# --- the text


def split_of(name: str) -> str:
    """A file is in one split only, so that nothing of what is held out is in any training text."""
    return {0: "test", 1: "validation", 2: "student"}.get(zlib.crc32(name.encode()) % 8, "teachers")


def library(root: Path) -> Iterator[tuple[str, str, bytes]]:
    """Python's standard library: (name of the file, domain, text)."""
    if not list(root.glob("test/test_*.py")):
        raise SystemExit(
            f"lm: {root / 'test'} must have Python's own tests; Debian: apt-get install "
            f"libpython{sys.version_info.major}.{sys.version_info.minor}-testsuite"
        )
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(("site-packages/", "dist-packages/", "encodings/", "lib2to3/", "pydoc_data/")):
            continue  # other people's code, and tables
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.name.startswith("test_"):
            yield name, "tests", text.encode()
        elif "test" not in name:
            code, docstrings = without_docstrings(text)
            yield name, "code", code.encode()
            yield name, "docstrings", docstrings.encode()


def without_docstrings(text: str) -> tuple[str, str]:
    """The code, without comments too, and its docstrings."""
    tree, docstrings = ast.parse(text), []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                docstrings.append(docstring)
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree), "\n\n".join(docstrings)


def read_text(root: Path) -> Text:
    splits: Text = {split: dict.fromkeys(DOMAINS, b"") for split in ("teachers", "student", "validation", "test")}
    parts: dict[tuple[str, str], list[bytes]] = {}
    for name, domain, text in library(root):
        parts.setdefault((split_of(name), domain), []).append(text)
    for (split, domain), texts in parts.items():
        splits[split][domain] = b"\n\n\n".join(texts)
    return splits


def examples(text: bytes, length: int, count: int | None = None, **more: Any) -> list[dict]:
    """Pieces of the text; ``count`` of them spread over all of it."""
    starts = range(0, len(text) - length + 1, length)
    if count is not None:
        starts = starts[:: max(len(starts) // count, 1)][:count]
    pieces = (list(text[start : start + length]) for start in starts)
    return [{"input_ids": piece, "labels": piece, **more} for piece in pieces]


# --- models


def llama(size: tuple[int, int], length: int, seed: int) -> LlamaForCausalLM:
    hidden, layers = size
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=hidden, intermediate_size=5 * hidden // 2, num_hidden_layers=layers,
            num_attention_heads=hidden // 32, max_position_embeddings=length, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def train(
    model: LlamaForCausalLM, data: list[dict], steps: int, rate: float, batch: int, seed: int, **teaching: Any
) -> None:
    """Plain training, or distillation with ``teachers``, ``weighting`` and ``loss``."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=batch, learning_rate=rate, seed=seed,
            lr_scheduler_type="cosine", warmup_steps=steps // 10, max_grad_norm=1.0, save_strategy="no", report_to="none",
            disable_tqdm=True, dataloader_pin_memory=False, logging_steps=max(steps // 4, 1),
        )  # fmt: skip
        trainer: Trainer = (DistillationTrainer if teaching else Trainer)(model, args, train_dataset=data, **teaching)  # type: ignore[arg-type]
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


@torch.inference_mode()
def bits_per_byte(model: LlamaForCausalLM, data: list[dict]) -> float:
    model.eval()
    ids = torch.tensor([e["input_ids"] for e in data], dtype=torch.int64, device=model.device)
    losses = [model(input_ids=some, labels=some).loss * len(some) for some in ids.split(32)]
    return (torch.stack(losses).sum() / len(ids)).item() / math.log(2)


@torch.inference_mode()
def weights_of(student: Any, data: list[dict]) -> Tensor:
    """What the adapter gives each teacher at each byte, [examples, bytes, teachers]."""
    ids = torch.tensor([e["input_ids"] for e in data], dtype=torch.int64, device=student.device)
    hidden = student.eval().model(input_ids=ids).last_hidden_state
    return student.teacher_adapter(hidden.flatten(0, 1)).view(*ids.shape, -1).cpu()


# --- what came out


def table(bits: dict[str, list[list[float]]]) -> str:
    """``bits`` [model][seed][domain]. Mean and sample standard deviation over seeds."""

    def cell(values: list[float]) -> str:
        mean = f"{statistics.mean(values):.3f}"
        return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean

    lines = [f"| bits per byte | {' | '.join(DOMAINS)} | mean |", "|:---|" + "---:|" * (len(DOMAINS) + 1)]
    for name, seeds in bits.items():
        columns = [*zip(*seeds), [statistics.mean(of_seed) for of_seed in seeds]]
        lines.append(f"| {name} | {' | '.join(cell(list(column)) for column in columns)} |")
    return "\n".join(lines)


def picture(path: Path, mean: Tensor, pieces: list[bytes], weights: Tensor) -> None:
    """The mean weight by domain and teacher, and a text of each domain, colored by the weights of its bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = Tensor([[0.25, 0.55, 1.0], [1.0, 0.6, 0.1], [0.3, 0.85, 0.3]])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 6), width_ratios=(1, 2.4), layout="constrained")
    left.imshow(mean.numpy(), cmap="Greys", vmin=0, vmax=1)
    left.set_xticks(range(len(DOMAINS)), DOMAINS)
    left.set_yticks(range(len(DOMAINS)), DOMAINS)
    left.set_xlabel("teacher of")
    left.set_ylabel("text")
    left.set_title("mean weight of each teacher")
    for row, column in itertools.product(range(len(DOMAINS)), repeat=2):
        value = float(mean[row, column])
        left.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.5 else "black")
    for label, color in zip(left.get_xticklabels(), colors.tolist()):
        label.set_bbox(dict(facecolor=color, edgecolor="none"))
    x, y, width = 0, 0, 76
    for piece, of_bytes in zip(pieces, weights):
        for byte, weight in zip(piece, of_bytes):
            x, y = (0, y + 1) if x == width else (x, y)
            right.add_patch(pyplot.Rectangle((x, y), 1, 1, facecolor=(weight @ colors).clamp(0, 1).tolist()))
            right.text(
                x + 0.5, y + 0.75, chr(byte) if 32 < byte < 127 else " ", ha="center", family="monospace", fontsize=8
            )
            x, y = (0, y + 1) if byte == 10 else (x + 1, y)
        x, y = 0, y + 2
    right.set(xlim=(0, width), ylim=(y, 0))
    right.set_title("held-out text, each byte in the color of the weights for the next one", loc="left")
    right.axis("off")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def run(settings: Settings, folder: Path, split: str = "test", root: Path | None = None) -> dict:
    """Trains everything, and writes ``table.md``, ``metrics.json`` and ``weights.png``."""
    began, s = time.monotonic(), settings
    text = read_text(root or Path(sysconfig.get_path("stdlib")))
    held_out = [examples(text[split][domain], s.length, s.heldout_examples) for domain in DOMAINS]
    lessons = [
        example
        for t, domain in enumerate(DOMAINS)
        for example in examples(text["student"][domain], s.length, s.student_examples, teacher_index=t)
    ]
    unrouted = [{name: value for name, value in e.items() if name != "teacher_index"} for e in lessons]
    bits: dict[str, list[list[float]]] = {}

    def show(name: str, model: LlamaForCausalLM) -> None:
        bits.setdefault(name, []).append([bits_per_byte(model, data) for data in held_out])
        told = ", ".join(f"{b:.3f}" for b in bits[name][-1])
        print(f"{time.monotonic() - began:4.0f} s  {name}: {told} bits per byte", flush=True)

    teachers = []
    for t, domain in enumerate(DOMAINS):
        teacher = llama(s.teacher_size, s.length, seed=t)
        data = examples(text["teachers"][domain], s.length)
        train(teacher, data, s.teacher_steps, s.teacher_rate, s.batch, seed=t)
        show(f"teacher of {domain}", teacher)
        teachers.append(teacher)

    weights = []
    with tempfile.TemporaryDirectory() as kept:
        # `teachers` themselves would do as well. Their answers are kept, because nine students will ask for them.
        stores = [
            store_topk(teacher, unrouted, Path(kept) / str(t), k=64, data_collator=default_data_collator)
            for t, teacher in enumerate(teachers)
        ]
        for seed, method in itertools.product(s.seeds, METHODS):
            student = llama(s.student_size, s.length, seed)
            teaching: dict[str, Any] = {}
            if method != "alone":
                loss = FusedLinearKDLoss(temperature=1.0, alpha=s.alpha)
                teaching = dict(teachers=stores, weighting=method, loss=loss, adapter_learning_rate=s.student_rate)
            data = lessons if method == "routed" else unrouted
            train(student, data, s.student_steps, s.student_rate, s.batch, seed, **teaching)
            show(f"student, {method}", student)
            if method == "adaptive":
                weights.append([weights_of(student, data) for data in held_out])

    lines = table(bits)
    if len(s.seeds) > 1:
        lines += "\n\n" + differences(bits, "adaptive", "uniform") + "\n" + differences(bits, "adaptive", "alone")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(lines + "\n")
    first = torch.stack(weights[0])  # [domain, example, byte, teacher] of the first seed
    mean = torch.stack([torch.stack(of_seed).mean((1, 2)) for of_seed in weights]).mean(0)
    shown = [bytes(data[len(data) // 2]["input_ids"]) for data in held_out]
    picture(folder / "weights.png", mean, shown, first[:, len(held_out[0]) // 2])
    metrics = dict(
        command=f"python -m amtml_fast.hf.lm --split {split}", settings=asdict(s), split=split, bits_per_byte=bits,
        mean_weights=mean.tolist(), training_bytes={k: {d: len(t) for d, t in v.items()} for k, v in text.items()},
        python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__,
        threads=torch.get_num_threads(), seconds=round(time.monotonic() - began, 1),
    )  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print(f"\n{lines}\n\n{folder / 'table.md'}, metrics.json, weights.png; {metrics['seconds']:.0f} s")
    return metrics


def differences(bits: dict[str, list[list[float]]], ours: str, theirs: str) -> str:
    """Seed by seed."""
    parts = []
    for d, domain in enumerate(DOMAINS):
        pairs = zip(bits[f"student, {ours}"], bits[f"student, {theirs}"])
        less = [a[d] - b[d] for a, b in pairs]
        parts.append(f"{domain} {statistics.mean(less):+.3f} ± {statistics.stdev(less):.3f}")
    return f"{ours} - {theirs}, seed by seed: {', '.join(parts)}."


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m amtml_fast.hf.lm", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/lm"))
    parser.add_argument(
        "--split", choices=("validation", "test"), default="test", help="while you choose settings: validation"
    )
    given = parser.parse_args()
    run(Settings(), given.out, given.split)
