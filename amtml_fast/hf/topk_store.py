"""A teacher's largest classes of every token, made once and kept in a folder of safetensors files."""

import contextlib
import functools
import inspect
import itertools
import json
import math
import os
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from amtml_fast import checks
from amtml_fast.file_lock import flock
from amtml_fast.hf.output_layer import NAME, OutputLayer, device_of_inputs
from amtml_fast.terms import TopKTeacher

ROW = "distillation_row"  # of an example, and in a batch: which row of the training set it is
_FACTS = "topk.json"
_CHECKED = "input_ids", "position_ids", "token_type_ids"  # what an answer depends on
_WAIT = 0.1  # seconds between two looks at what other processes are making


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
    remove_unused_columns: bool = True,
) -> "StoredTopK":
    """Runs a teacher over a data set once, and keeps of every token the ``k`` largest log-probabilities.

    Args:
        teacher: a causal language model of transformers.
        dataset: what the student will be trained on, in this order: ``dataset[i]`` with ``input_ids``.
        folder: a new folder, or one that a killed call has begun: whole files in it are kept. Several processes may write one, and
            share its files (where the drive has no locks, each makes all).
        k: classes a token, 1 to the vocabulary.
        temperature: that of the loss that will use them: ``log_softmax(logits / temperature)``.
        batch_size, data_collator: how examples become batches; padding on either side.
        rows_per_file: examples in a file.
        remove_unused_columns: as in ``TrainingArguments``: the collator gets what the model takes, and labels.

    Returns:
        ``StoredTopK(folder)``. A token takes 6 bytes a class: int32 and float16 (whose error is at most 2 ** -11 of a
        logarithm). A checksum of each example's ``input_ids`` (and ``position_ids`` and ``token_type_ids``, where the
        collator gives them) is kept, too: other data is an error, here and in training.

    Raises:
        ValueError, TypeError: an argument that does not fit; FileExistsError: the folder has other teachers' classes, or those of
            other data.
    """
    layer = OutputLayer(teacher, "store_topk: teacher")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= layer.classes:
        raise ValueError(f"store_topk: k must be an int from 1 to {layer.classes}, got {k!r}")
    checks.number("store_topk", "temperature", temperature, *checks.POSITIVE)
    for name, value in (("batch_size", batch_size), ("rows_per_file", rows_per_file)):
        checks.count("store_topk", name, value)
    if not hasattr(dataset, "__len__"):
        raise TypeError(f"store_topk: dataset must have a length and rows, got {type(dataset).__name__}")
    if not len(dataset):
        raise ValueError("store_topk: dataset must have at least one row, got none")
    folder = Path(folder)
    facts = dict(
        k=k, temperature=float(temperature), classes=layer.classes, rows=len(dataset), rows_per_file=rows_per_file,
        teacher=_fingerprint(teacher),
    )  # fmt: skip
    if (folder / _FACTS).exists():
        found = _facts("store_topk", folder)
        if found != facts:
            differ = next(name for name in facts if facts[name] != found.get(name))
            raise FileExistsError(
                f"store_topk: folder must be new or of the same call, got {folder} with {differ} {found.get(differ)} "
                f"instead of {facts[differ]}"
            )
    columns = _columns(teacher) if remove_unused_columns else None
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / _FACTS, lambda path: path.write_text(json.dumps(facts)))
    training, compared = teacher.training, False
    teacher.eval()
    try:
        left = list(range(0, len(dataset), rows_per_file))
        while left:
            others = []  # that other processes are making
            for start in left:
                path = folder / f"rows-{start:09d}.safetensors"
                rows = range(start, min(start + rows_per_file, len(dataset)))
                batches = _batches(dataset, rows, batch_size, data_collator, columns)
                with _claimed(path) as mine:
                    if path.exists():
                        _check_file(path, batches)
                        if not compared:
                            first = itertools.islice(_batches(dataset, rows, batch_size, data_collator, columns), 1)
                            _check_answers(path, _file(layer, first, k, temperature))
                            compared = True
                    elif mine:
                        _write(path, functools.partial(save_file, dict(_file(layer, batches, k, temperature))))
                    else:
                        others.append(start)
            if others == left:
                time.sleep(_WAIT)
            left = others
    finally:
        teacher.train(training)
    for begun in folder.glob("*.begun"):  # by a call that was killed, or that another process made, too
        begun.unlink(missing_ok=True)
    return StoredTopK(folder)


def _facts(function: str, folder: Path) -> dict:
    """What a store was made of."""
    try:
        facts = json.loads((folder / _FACTS).read_text())
    except ValueError:  # no text, or no JSON
        facts = None
    names = ("k", "temperature", "classes", "rows", "rows_per_file")
    missing = names if not isinstance(facts, dict) else [name for name in names if name not in facts]
    if missing:
        raise ValueError(
            f"{function}: {folder / _FACTS} must be as store_topk has written it, got one without {', '.join(missing)}"
        )
    return facts


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file of a store; where it is damaged, an error that says which one is."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"StoredTopK: {path} must be as store_topk has written it, got a damaged file ({error}); remove it, and the same store_topk "
            "makes it again"
        ) from error


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Whether this process is to make the file: a lock beside it says so, and ends with the process. Without locks it is to."""
    claim = path.with_suffix(".begun")
    with claim.open("w") as file:
        mine = flock(file.fileno()) is not False
        try:
            yield mine
        finally:
            if mine:
                with contextlib.suppress(OSError):
                    claim.unlink()


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Whole or not at all, whatever other processes do."""
    begun = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.begun")
    try:
        write(begun)
        with begun.open("rb+") as file:  # on the disk before it has its name: a machine that stops leaves no empty file
            os.fsync(file.fileno())
        begun.replace(path)
    except FileNotFoundError:
        if not path.exists():  # else another process has finished, and removed what is left
            raise
    finally:
        begun.unlink(missing_ok=True)


def _fingerprint(teacher: Any) -> str:
    """Of some of its numbers: another teacher, or one that was trained on, has another."""
    total = 0.0
    for name, _ in teacher.named_parameters():
        path, _, own = name.rpartition(".")
        module = teacher.get_submodule(path)
        with align_module_device(module):  # which loads what is offloaded
            total += getattr(module, own).detach().float().abs().sum().item()
    return f"{type(teacher).__name__} {total:.6e}"


def _columns(model: Any) -> set[str]:
    """What transformers' Trainer leaves of an example."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {*inspect.signature(type(model).forward).parameters, "input_ids", "attention_mask", "labels"}


def _batches(
    dataset: Any, rows: range, batch_size: int, collate: Callable, columns: set[str] | None
) -> Iterator[tuple[range, dict]]:
    for start in range(rows.start, rows.stop, batch_size):
        some = range(start, min(start + batch_size, rows.stop))
        examples = [dict(dataset[i]) for i in some]
        if columns is not None:
            examples = [{name: value for name, value in e.items() if name in columns} for e in examples]
        batch = dict(collate(examples))
        check_rows("store_topk", batch, len(some))
        yield some, batch


def check_rows(function: str, batch: dict, examples: int) -> None:
    ids = batch.get("input_ids")
    if ids is None or len(ids) != examples:
        raise ValueError(
            f"{function}: data_collator must give input_ids with a row for each of {examples} examples, got "
            f"{None if ids is None else list(ids.shape)}; of several examples it is to be one that pads"
        )
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(
            f"{function}: data_collator must give attention_mask {list(ids.shape)}, as input_ids, got {list(mask.shape)}"
        )


def _checksum(batch: dict, at: int) -> int:
    """Of an example's tokens, padded or not, and where the batch has them of their positions and types."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    checksum = 0
    for name in _CHECKED:
        if batch.get(name) is not None:
            x = batch[name]
            x = x.expand(*x.shape[:-2], *ids.shape)[..., at, :]  # from one row for all, or of several axes
            x = x if mask is None else x[..., mask[at] != 0]
            checksum = zlib.crc32(x.long().cpu().numpy().tobytes(), checksum)
    return checksum


def _check_file(path: Path, batches: Iterator[tuple[range, dict]]) -> None:
    with _opened(path) as file:
        if not any(name.endswith(".checksum") for name in file.keys()):  # written before there were any
            return
        for some, batch in batches:
            for at, row in enumerate(some):
                if file.get_tensor(f"{row}.checksum").item() != _checksum(batch, at):
                    raise FileExistsError(
                        f"store_topk: folder must be new or of the same call, got {path.parent} with other input_ids in row {row}, "
                        "or other position_ids or token_type_ids"
                    )


def _check_answers(path: Path, made: Iterator[tuple[str, Tensor]]) -> None:
    """That this teacher says what the file says: adapters that are active, and options of the configuration, are not in its fingerprint.

    Log-probabilities alone are compared, since equal classes may come in any order. They are float16, those of a bfloat16 teacher
    depend on the batch, and one token of a mixture of experts may go to another expert: a tenth of a row may differ.
    """
    with _opened(path) as file:
        for name, x in made:
            if name.endswith(".log_probs"):
                found = file.get_tensor(name)
                if found.shape != x.shape or found.isclose(x, rtol=0.05, atol=0.05).sum() < 0.9 * x.numel():
                    raise FileExistsError(
                        f"store_topk: folder must be new or of the same call, got {path.parent} with answers of another teacher in row "
                        f"{name.partition('.')[0]}"
                    )


@torch.inference_mode()
def _file(
    layer: OutputLayer, batches: Iterator[tuple[range, dict]], k: int, temperature: float
) -> Iterator[tuple[str, Tensor]]:
    device = device_of_inputs(layer.model)
    for some, batch in batches:
        batch.pop("labels", None)
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        with layer.without_cache():
            logits = layer.model(**batch).logits
        mask = batch.get("attention_mask")
        for at, row in enumerate(some):
            own = logits[at] if mask is None else logits[at][mask[at] != 0]
            top = (own.float() / temperature).log_softmax(-1).topk(k)
            yield f"{row}.indices", top.indices.to(torch.int32).cpu()
            yield f"{row}.log_probs", top.values.to(torch.float16).cpu()
            yield f"{row}.checksum", torch.tensor(_checksum(batch, at), dtype=torch.int64, device="cpu")


class StoredTopK:
    """What ``store_topk`` has written: ``store[i]`` is a ``TopKTeacher`` of the tokens of example i.

    Raises:
        FileNotFoundError: no such folder, or one whose ``store_topk`` has not finished; ValueError: a damaged file, by its name.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / _FACTS).exists():
            raise FileNotFoundError(f"StoredTopK: folder must be one that store_topk has written, got {folder}")
        facts = _facts("StoredTopK", self.folder)
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
        return self._read(row)[0]

    def _read(self, row: int) -> tuple[TopKTeacher, int | None]:
        if not 0 <= row < self.rows:
            raise IndexError(f"StoredTopK: row must be in [0, {self.rows}), got {row}")
        with _opened(self.paths[row // self.rows_per_file]) as file:
            kept = TopKTeacher(file.get_tensor(f"{row}.indices"), file.get_tensor(f"{row}.log_probs").float())
            name = f"{row}.checksum"
            return kept, int(file.get_tensor(name)) if name in file.keys() else None

    def batch(self, rows: Tensor, inputs: dict, device: torch.device) -> TopKTeacher:
        """Of these examples, [B, S, k]: at the tokens of the mask [B, S], and k equal classes where there is none."""
        inputs = {name: inputs[name].cpu() for name in (*_CHECKED, "attention_mask") if inputs.get(name) is not None}
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        tokens = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
        indices = torch.arange(self.k, dtype=torch.int64, device="cpu").expand(*ids.shape, -1).clone()
        log_probs = torch.full((*ids.shape, self.k), -math.log(self.k), dtype=torch.float32, device="cpu")
        for at, row in enumerate(rows.tolist()):
            own, checksum = self._read(row)
            count = int(tokens[at].sum())
            if count != len(own.indices):
                raise ValueError(
                    f"StoredTopK: example {row} must have {len(own.indices)} tokens, as when {self.folder} was written, got {count}"
                )
            if checksum is not None and checksum != _checksum(inputs, at):
                raise ValueError(
                    f"StoredTopK: example {row} must have the input_ids of when {self.folder} was written, got others, or "
                    "other position_ids or token_type_ids; the rows of train_dataset are to be the same, in the same order"
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
