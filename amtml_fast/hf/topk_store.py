"""A teacher's largest classes of every token, made once and kept in a folder of safetensors files."""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from amtml_fast.hf.output_layer import NAME, OutputLayer, device_of_inputs
from amtml_fast.reference import TopKTeacher

ROW = "distillation_row"  # of an example, and in a batch: which row of the training set it is
_FACTS = "topk.json"


def store_topk(
    teacher: Any,
    dataset: Any,
    folder: str | Path,
    *,
    k: int = 64,
    temperature: float = 1.0,
    batch_size: int = 8,
    data_collator: Callable[[list], dict],
    rows_per_file: int = 1024,
) -> "StoredTopK":
    """Runs a teacher over a data set once, and keeps of every token the ``k`` largest log-probabilities.

    Args:
        teacher: a causal language model of transformers.
        dataset: what the student will be trained on, in this order: ``dataset[i]`` with ``input_ids``.
        folder: a new folder, or one that a killed call has begun: whole files in it are kept.
        k: classes a token, 1 to the vocabulary.
        temperature: that of the loss that will use them: ``log_softmax(logits / temperature)``.
        batch_size, data_collator: how examples become batches; padding on either side.
        rows_per_file: examples in a file.

    Returns:
        ``StoredTopK(folder)``. A token takes 6 bytes a class: int32 and float16 (whose error is at most 2 ** -11 of a
        logarithm).

    Raises:
        ValueError, TypeError: an argument that does not fit; FileExistsError: the folder has other teachers' classes.
    """
    layer = OutputLayer(teacher, "store_topk: teacher")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= layer.classes:
        raise ValueError(f"store_topk: k must be an int from 1 to {layer.classes}, got {k!r}")
    if not temperature > 0:
        raise ValueError(f"store_topk: temperature must be > 0, got {temperature}")
    for name, value in (("batch_size", batch_size), ("rows_per_file", rows_per_file)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"store_topk: {name} must be an int >= 1, got {value!r}")
    folder = Path(folder)
    facts = dict(
        k=k, temperature=float(temperature), classes=layer.classes, rows=len(dataset), rows_per_file=rows_per_file,
        teacher=_fingerprint(teacher),
    )  # fmt: skip
    if (folder / _FACTS).exists():
        found = json.loads((folder / _FACTS).read_text())
        if found != facts:
            differ = next(name for name in facts if facts[name] != found.get(name))
            raise FileExistsError(
                f"store_topk: folder must be new or of the same call, got {folder} with {differ} {found.get(differ)} "
                f"instead of {facts[differ]}"
            )
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / _FACTS, lambda path: path.write_text(json.dumps(facts)))
    training = teacher.training
    teacher.eval()
    try:
        for start in range(0, len(dataset), rows_per_file):
            path = folder / f"rows-{start:09d}.safetensors"
            if not path.exists():
                rows = range(start, min(start + rows_per_file, len(dataset)))
                tensors = dict(_file(layer, dataset, rows, k, temperature, batch_size, data_collator))
                _write(path, functools.partial(save_file, tensors))
    finally:
        teacher.train(training)
    return StoredTopK(folder)


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Whole or not at all."""
    begun = path.with_suffix(".begun")
    write(begun)
    begun.replace(path)


def _fingerprint(teacher: Any) -> str:
    """Of some of its numbers: another teacher, or one that was trained on, has another."""
    total = 0.0
    for name, _ in teacher.named_parameters():
        path, _, own = name.rpartition(".")
        module = teacher.get_submodule(path)
        with align_module_device(module):  # which loads what is offloaded
            total += getattr(module, own).detach().float().abs().sum().item()
    return f"{type(teacher).__name__} {total:.6e}"


@torch.inference_mode()
def _file(
    layer: OutputLayer, dataset: Any, rows: range, k: int, temperature: float, batch_size: int, collate: Callable
) -> Iterator[tuple[str, Tensor]]:
    device = device_of_inputs(layer.model)
    for start in range(rows.start, rows.stop, batch_size):
        some = range(start, min(start + batch_size, rows.stop))
        batch = dict(collate([dict(dataset[i]) for i in some]))
        batch.pop("labels", None)
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        logits = layer.model(**batch).logits
        mask = batch.get("attention_mask")
        for at, row in enumerate(some):
            own = logits[at] if mask is None else logits[at][mask[at] != 0]
            top = (own.float() / temperature).log_softmax(-1).topk(k)
            yield f"{row}.indices", top.indices.to(torch.int32).cpu()
            yield f"{row}.log_probs", top.values.to(torch.float16).cpu()


class StoredTopK:
    """What ``store_topk`` has written: ``store[i]`` is a ``TopKTeacher`` of the tokens of example i.

    Raises:
        FileNotFoundError: no such folder, or one whose ``store_topk`` has not finished.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / _FACTS).exists():
            raise FileNotFoundError(f"StoredTopK: folder must be one that store_topk has written, got {folder}")
        facts = json.loads((self.folder / _FACTS).read_text())
        self.k, self.temperature, self.classes = facts["k"], facts["temperature"], facts["classes"]
        self.rows, self.rows_per_file = facts["rows"], facts["rows_per_file"]
        starts = range(0, self.rows, self.rows_per_file)
        self.paths = [self.folder / f"rows-{start:09d}.safetensors" for start in starts]
        missing = [path.name for path in self.paths if not path.exists()]
        if missing:
            raise FileNotFoundError(
                f"StoredTopK: folder must be finished, got {folder} without {missing[0]} and {len(missing) - 1} others; "
                "the same store_topk goes on"
            )

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> TopKTeacher:
        if not 0 <= row < self.rows:
            raise IndexError(f"StoredTopK: row must be in [0, {self.rows}), got {row}")
        with safe_open(self.paths[row // self.rows_per_file], "pt") as file:
            return TopKTeacher(file.get_tensor(f"{row}.indices"), file.get_tensor(f"{row}.log_probs").float())

    def batch(self, rows: Tensor, mask: Tensor | None, shape: Sequence[int], device: torch.device) -> TopKTeacher:
        """Of these examples, [B, S, k]: at the tokens of the mask [B, S], and one sure class where there is none."""
        indices = torch.arange(self.k, dtype=torch.int64, device="cpu").expand(*shape, -1).clone()
        log_probs = torch.full((*shape, self.k), -torch.inf, dtype=torch.float32, device="cpu")
        log_probs[..., 0] = 0
        tokens = torch.ones(tuple(shape), dtype=torch.bool, device="cpu") if mask is None else mask.cpu() != 0
        for at, row in enumerate(rows.tolist()):
            own = self[row]
            count = int(tokens[at].sum())
            if count != len(own.indices):
                raise ValueError(
                    f"StoredTopK: example {row} must have {len(own.indices)} tokens, as when {self.folder} was written, got {count}"
                )
            indices[at, tokens[at]] = own.indices.long()
            log_probs[at, tokens[at]] = own.log_probs
        return TopKTeacher(indices.to(device), log_probs.to(device))


class WithRows(torch.utils.data.Dataset):
    """A data set whose examples know their number."""

    def __init__(self, dataset: Any, stores: Sequence[StoredTopK]):
        if not hasattr(dataset, "__len__"):
            raise TypeError(
                f"{NAME}: train_dataset must have a length and rows with a StoredTopK, got {type(dataset).__name__}"
            )
        for store in stores:
            if len(store) != len(dataset):
                raise ValueError(
                    f"{NAME}: train_dataset must have the {len(store)} rows that {store.folder} was made of, "
                    f"got {len(dataset)}"
                )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict:
        return {**self.dataset[row], ROW: row}
