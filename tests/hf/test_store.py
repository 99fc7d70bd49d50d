"""What ``store_topk`` keeps: teaches as the teacher does, goes on where it was killed, and is noticed where it does not fit."""

import copy
import os
import time
import zlib
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from backends import cpu_only
from parallel import in_processes
from safetensors.torch import load_file, save_file
from tiny_models import C, S, assert_same, collate, examples, gpt2, llama, one_step, trainer
from transformers import DataCollatorWithFlattening, LlamaForCausalLM

import amtml_fast as af
from amtml_fast.hf import StoredTopK, store_topk, topk_store

pytestmark = cpu_only


@pytest.mark.parametrize("left", [False, True], ids=["padded right", "padded left"])
def test_stored_classes_teach_as_the_teacher_does(tmp_path, left):
    teacher, data = llama(24, 1), examples(8)
    stored = store_topk(
        teacher, data, tmp_path / "top", k=C, temperature=1.0, batch_size=3, rows_per_file=3,
        data_collator=lambda given: collate(given, left=not left),
    )  # fmt: skip
    assert len(stored) == 8 and len(list((tmp_path / "top").glob("*.safetensors"))) == 3
    top = stored[3]
    want = teacher(input_ids=data[3]["input_ids"][None]).logits[0].log_softmax(-1).topk(C)
    assert torch.equal(top.indices[:, :5].long(), want.indices[:, :5])
    torch.testing.assert_close(top.log_probs, want.values, rtol=2**-10, atol=1e-5)
    hot = store_topk(teacher, data[:1], tmp_path / "hot", k=4, temperature=2.0, data_collator=collate)
    right = (teacher(input_ids=data[0]["input_ids"][None]).logits[0] / 2).log_softmax(-1).topk(4)
    torch.testing.assert_close(hot[0].log_probs, right.values, rtol=2**-10, atol=1e-5)
    ends = []
    for source in (teacher, stored):
        student = llama()
        made = trainer(
            tmp_path, student, [source], data, collator=lambda given: collate(given, left), weighting="adaptive"
        )
        made.train()
        ends.append({n: p.detach() for n, p in student.named_parameters()})
    assert_same(ends[1], ends[0], 1e-2)  # float16 log-probabilities


def test_a_store_goes_on_where_it_was_killed(tmp_path):
    teacher, data = llama(24, 1), examples(8)
    options = dict(k=4, rows_per_file=3, data_collator=collate)
    whole = store_topk(teacher, data, tmp_path / "a", **options)

    class Killed(list):
        def __getitem__(self, i):
            if i == 5:
                raise KeyboardInterrupt
            return super().__getitem__(i)

    teacher.train()
    with pytest.raises(KeyboardInterrupt):
        store_topk(teacher, Killed(data), tmp_path / "b", **options)
    assert teacher.training  # as it was
    with pytest.raises(FileNotFoundError, match=r"must be finished, got .* without rows-000000003.safetensors"):
        StoredTopK(tmp_path / "b")
    before = (tmp_path / "b" / "rows-000000000.safetensors").stat().st_mtime_ns
    again = store_topk(teacher, data, tmp_path / "b", **options)
    assert (tmp_path / "b" / "rows-000000000.safetensors").stat().st_mtime_ns == before
    for i in range(8):
        assert all(map(torch.equal, whole[i], again[i]))
    for changed, name in ((dict(k=5), "k 4 instead of 5"), (dict(temperature=2.0), "temperature 1.0 instead of 2.0")):
        with pytest.raises(FileExistsError, match=f"must be new or of the same call, got .* with {name}"):
            store_topk(teacher, data, tmp_path / "b", **{**options, **changed})
    with pytest.raises(FileExistsError, match="with teacher LlamaForCausalLM"):
        store_topk(llama(24, 2), data, tmp_path / "b", **options)


def negated(teacher):
    with torch.no_grad():
        teacher.model.layers[0].mlp.up_proj.weight.neg_()
    return teacher


def of_another_config(teacher):
    config = copy.deepcopy(teacher.config)
    config.rope_parameters["rope_theta"] = 100.0
    other = type(teacher)(config)
    other.load_state_dict(teacher.state_dict())
    return other


def with_adapters(teacher):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["up_proj", "q_proj"], init_lora_weights=False)
    made = peft.get_peft_model(teacher, config, "a")
    made.add_adapter("b", config)
    return made


def other_adapter(teacher):
    teacher.set_adapter("b")
    return teacher


def without_adapter(teacher):
    teacher.base_model.disable_adapter_layers()
    return teacher


@pytest.mark.parametrize(
    "make, change",
    [(llama, negated), (llama, of_another_config), (lambda *of: with_adapters(llama(*of)), other_adapter),
     (lambda *of: with_adapters(llama(*of)), without_adapter)],
    ids=["negated", "config", "set_adapter", "disable_adapter"],
)  # fmt: skip
def test_another_teacher_of_the_same_fingerprint_is_noticed(tmp_path, make, change):
    teacher, data = make(24, 1), examples(8)
    options = dict(k=4, rows_per_file=3, batch_size=2)
    store_topk(teacher, data, tmp_path / "top", data_collator=collate, **options)
    (tmp_path / "top" / "rows-000000000.safetensors").unlink()  # as if it had been killed
    left = partial(collate, left=True)  # the same teacher answers a little otherwise
    store_topk(teacher, data, tmp_path / "top", data_collator=left, **{**options, "batch_size": 3})
    with pytest.raises(
        FileExistsError, match=r"must be new or of the same call, got .*top with answers of another teacher in row 0"
    ):
        store_topk(change(teacher), data, tmp_path / "top", data_collator=collate, **options)


def test_equal_classes_may_come_in_any_order(tmp_path):
    teacher, data = llama(24, 1, tie_word_embeddings=False), examples(8)
    with torch.no_grad():
        teacher.lm_head.weight[20:] = teacher.lm_head.weight[:20]
    made = store_topk(teacher, data, tmp_path, k=3, data_collator=collate)
    path = made.paths[0]
    moved = {name: (x + 20) % C if name.endswith("indices") else x for name, x in load_file(path).items()}
    save_file(moved, path)
    store_topk(teacher, data, tmp_path, k=3, data_collator=collate)


def shuffled(data):
    return [data[i] for i in torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()]


def equal_lengths(seed=0):
    random = torch.Generator().manual_seed(seed)
    made = [torch.randint(3, C, (S,), generator=random) for _ in range(8)]
    return [dict(input_ids=ids, labels=ids) for ids in made]


@pytest.mark.parametrize("others", [shuffled(equal_lengths()), equal_lengths(1)], ids=["shuffled", "another"])
def test_other_data_of_the_same_lengths_is_noticed(tmp_path, others):
    teacher, data = llama(24, 1), equal_lengths()
    options = dict(k=4, rows_per_file=3, data_collator=collate)
    stored = store_topk(teacher, data, tmp_path / "top", **options)
    trainer(tmp_path, llama(), [stored], data, collator=lambda given: collate(given, left=True)).train()
    with pytest.raises(
        ValueError, match=r"StoredTopK: example \d must have the input_ids of when .*top was written, got"
    ):
        trainer(tmp_path, llama(), [stored], others).train()
    message = r"must be new or of the same call, got .*top with other input_ids in row \d"
    with pytest.raises(FileExistsError, match=message):
        store_topk(teacher, others, tmp_path / "top", **options)
    (tmp_path / "top" / "rows-000000006.safetensors").unlink()  # as if it had been killed
    with pytest.raises(FileExistsError, match=message):
        store_topk(teacher, others, tmp_path / "top", **options)
    again = store_topk(teacher, data, tmp_path / "top", **options)
    assert all(map(torch.equal, again[7], stored[7]))


def test_a_store_without_checksums_is_read_and_finished(tmp_path):
    teacher, data, folder = llama(24, 1), equal_lengths(), tmp_path / "top"
    options = dict(k=4, rows_per_file=3, data_collator=collate)
    whole = store_topk(teacher, data, tmp_path / "whole", **options)
    store_topk(teacher, data, folder, **options)
    for path in folder.glob("*.safetensors"):
        save_file({name: x for name, x in load_file(path).items() if not name.endswith("checksum")}, path)
    trainer(tmp_path, llama(), [StoredTopK(folder)], shuffled(data)).train()  # as ever
    (folder / "rows-000000006.safetensors").unlink()
    again = store_topk(teacher, data, folder, **options)
    assert all(all(map(torch.equal, again[i], whole[i])) for i in range(8))


def write_at_once(folder, rank):
    def slowly(tensors, path):
        (folder / f"made-{path.parent.name}-{path.name}-{rank}").touch()
        save_file(tensors, path)
        time.sleep(0.01)  # so that the other one is here, too

    topk_store.save_file = slowly
    teacher, data = llama(24, 1), equal_lengths()
    for trial in range(3):
        dist.barrier()
        stored = store_topk(teacher, data, folder / f"top{trial}", k=4, rows_per_file=1, data_collator=collate)
        assert len(stored) == 8


def test_two_processes_may_write_one_store(tmp_path):
    in_processes(2, partial(write_at_once, tmp_path), tmp_path)
    whole = store_topk(llama(24, 1), equal_lengths(), tmp_path / "one", k=4, rows_per_file=1, data_collator=collate)
    for trial in range(3):
        made = StoredTopK(tmp_path / f"top{trial}")
        assert all(all(map(torch.equal, made[i], whole[i])) for i in range(8))
        assert len(list(made.folder.iterdir())) == 9  # nothing else is left
        assert len(list(tmp_path.glob(f"made-top{trial}-*"))) == 8  # each by one of them


def test_what_a_killed_call_has_begun_does_not_stay(tmp_path):
    for begun in ("rows-000000000.begun", "rows-000000000.0123.begun"):
        (tmp_path / begun).write_bytes(b"half")
    store_topk(llama(24, 1), equal_lengths(), tmp_path, k=4, data_collator=collate)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows-000000000.safetensors", "topk.json"]

    def fails(given):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store_topk(llama(24, 1), equal_lengths(), tmp_path / "killed", k=4, data_collator=fails)
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["topk.json"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    flushed, replace = [], Path.replace
    monkeypatch.setattr("os.fsync", lambda handle: flushed.append(os.fstat(handle).st_ino))

    def named(begun, target):
        assert begun.stat().st_ino in flushed
        return replace(begun, target)

    monkeypatch.setattr(Path, "replace", named)
    store_topk(llama(24, 1), equal_lengths(), tmp_path, k=4, data_collator=collate)
    assert len(flushed) == 2  # what it was made of, and the classes


def plain(given):
    return {name: torch.stack([torch.as_tensor(e[name]) for e in given]) for name in given[0]}


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
def test_columns_that_the_trainer_drops_are_dropped(tmp_path, make):
    teacher, data = make(), [dict(e, text="a text", teacher_index=0) for e in equal_lengths()]
    stored = store_topk(teacher, data, tmp_path / "top", k=4, data_collator=plain)
    for example in data:
        del example["teacher_index"]  # which the trainer takes
    trainer(tmp_path, llama(), [stored], data, collator=plain).train()
    with pytest.raises(TypeError, match="invalid data type 'str'"):
        store_topk(teacher, data, tmp_path / "all", k=4, data_collator=plain, remove_unused_columns=False)


def test_rows_that_are_not_one_for_each_example_are_named(tmp_path):
    data = [{name: x.tolist() for name, x in e.items()} for e in examples(8)]
    flat = DataCollatorWithFlattening()
    with pytest.raises(
        ValueError,
        match=r"store_topk: data_collator must give input_ids with a row for each of 8 examples, got \[1, 84\]; .* pads",
    ):
        store_topk(llama(24, 1), data, tmp_path / "top", k=4, data_collator=flat)
    stored = store_topk(llama(24, 1), data, tmp_path / "one", k=4, batch_size=1, data_collator=flat)
    with pytest.raises(
        ValueError,
        match=r"DistillationTrainer: data_collator must give input_ids with a row for each of 4 examples, got \[1, \d",
    ):
        trainer(tmp_path, llama(), [stored], data, collator=flat).train()
    trainer(tmp_path, llama(), [stored], data, collator=flat, per_device_train_batch_size=1).train()
    trainer(tmp_path, llama(), [llama(24, 1)], data, collator=flat).train()  # a model takes them


def test_a_token_without_an_answer_has_no_infinite_loss(tmp_path):
    """The last padding before a text: its label is the text's first token."""
    data = examples(8)
    stored = store_topk(llama(24, 1), data, tmp_path / "top", k=C, data_collator=collate)
    loss, student = af.FusedLinearKDLoss(temperature=1.0, divergence="reverse_kl"), llama()
    made = trainer(tmp_path, student, [stored], data, collator=lambda given: collate(given, left=True), loss=loss)
    batch = next(iter(made.get_train_dataloader()))
    assert ((batch["attention_mask"][:, :-1] == 0) & (batch["labels"][:, 1:] != -100)).any()
    assert one_step(made, student, batch)[0].isfinite()


def with_pads_that_answer():
    """At padding it says something else than that all classes are equal."""
    made = llama(24, 1, tie_word_embeddings=False)
    with torch.no_grad():
        made.model.embed_tokens.weight[0].normal_(std=0.4)
    return made


@pytest.mark.parametrize("left", [False, True], ids=["padded right", "padded left"])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_where_a_store_has_no_answer_labels_alone_count(tmp_path, left, alpha):
    """The last padding before a text: its label is the text's first token."""
    teacher, data = with_pads_that_answer(), [dict(e, labels=e["input_ids"]) for e in examples(8)]
    stored, batch = (
        store_topk(teacher, data, tmp_path / "top", k=C, data_collator=collate),
        collate(data, left),
    )
    made = trainer(
        tmp_path, copy.deepcopy(teacher), [stored], data, collator=partial(collate, left=left), learning_rate=0.0,
        loss=af.FusedLinearKDLoss(temperature=1.0, alpha=alpha), per_device_train_batch_size=8, max_steps=1,
    )  # fmt: skip
    made.train()
    with torch.no_grad():
        logits = teacher(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    entropy = torch.nn.functional.cross_entropy(logits.reshape(-1, C), batch["labels"][:, 1:].reshape(-1))
    assert abs(made.state.log_history[0]["loss"] - (1 - alpha) * float(entropy)) < 2e-3


@pytest.mark.parametrize("counted", [True, False])
def test_tokens_routed_to_a_store_without_an_answer(tmp_path, counted):
    teacher, data = with_pads_that_answer(), [dict(e, labels=e["input_ids"]) for e in examples(8)]
    stored = store_topk(teacher, data, tmp_path / "top", k=C, data_collator=collate)
    student, loss = copy.deepcopy(teacher), af.FusedLinearKDLoss(temperature=1.0, alpha=1.0)
    made = trainer(tmp_path, student, [llama(24, 2), stored], data, weighting="routed", loss=loss)
    batch = {
        **collate(data, left=True),
        "teacher_index": torch.ones(8, dtype=torch.int64),
        topk_store.ROW: torch.arange(8),
    }
    count = made._get_num_items_in_batch([batch], torch.device("cpu")) if counted else None
    assert abs(made.compute_loss(student.train(), batch, num_items_in_batch=count)) < 1e-4


@pytest.mark.parametrize("mode", ["mixture", "sum", "logits"])
@pytest.mark.parametrize("weighting", ["uniform", "adaptive", "routed"])
def test_beside_a_store_the_others_have_all_the_weight_there(tmp_path, weighting, mode):
    """A store of all classes of the model that is the other teacher: it changes nothing, but where its tokens would be routed to it."""
    teacher, data = with_pads_that_answer(), [dict(e, labels=e["input_ids"]) for e in examples(8)]
    stored = store_topk(teacher, data, tmp_path / "top", k=C, data_collator=collate)
    batch, found = collate(data, left=True), []
    if weighting == "routed":
        batch["teacher_index"] = (batch["attention_mask"] != 0).long()  # the model where the store has no answer
    for sources in ([teacher, teacher], [teacher, stored]):
        student = llama(tie_word_embeddings=False)
        made = trainer(
            tmp_path, student, sources, data, weighting=weighting, loss=af.FusedLinearKDLoss(temperature=1.0, mode=mode)
        )
        given = {**batch, topk_store.ROW: torch.arange(8)}
        found.append(one_step(made, student, given))
    ofs = [{name: of.pop(name) for name in list(of) if "teacher_adapter" in name} for _, of in found]
    assert all(
        x.abs().max() < 1e-3 for of in ofs for x in of.values()
    )  # to tell equal teachers apart there is nothing to learn
    assert_same(found[1][1], found[0][1], 1e-2)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=1e-3)


def packed(given):
    """Each example is two texts in one row, as some data sets are made."""
    return dict(plain(given), position_ids=torch.cat([torch.arange(5), torch.arange(S - 5)]).expand(len(given), -1))


def test_texts_packed_in_one_example_are_apart(tmp_path):
    teacher, data = llama(24, 1), equal_lengths()
    stored = store_topk(teacher, data, tmp_path / "top", k=C, data_collator=packed)
    assert teacher.config.use_cache  # as it was
    top, alone = stored[3], teacher(input_ids=data[3]["input_ids"][None, 5:]).logits[0].log_softmax(-1)
    torch.testing.assert_close(top.log_probs[5:], alone.topk(C).values, rtol=2**-10, atol=1e-5)


def test_temperatures_of_teachers_are_those_of_stores(tmp_path):
    data = examples(8)
    stored = store_topk(llama(24, 1), data, tmp_path / "top", k=4, temperature=2.0, data_collator=collate)
    make = partial(trainer, tmp_path, llama(), [llama(24, 2), stored], data)
    loss = partial(af.FusedLinearKDLoss, temperature=2.0)
    for fits in (2.0, [3.0, 2.0], (3.0, 2.0)):
        make(loss=loss(teacher_temperature=fits))
    for other in (3.0, [2.0, 3.0]):
        with pytest.raises(
            ValueError,
            match=r"loss must have teacher_temperature 2\.0, or none, for teachers\[1\], a StoredTopK: .* got 3\.0",
        ):
            make(loss=loss(teacher_temperature=other))


def test_rows_that_are_set_later_are_refused(tmp_path):
    data = examples(8)
    made = trainer(
        tmp_path, llama(), [store_topk(llama(24, 1), data, tmp_path / "top", k=4, data_collator=collate)], data
    )
    made.train_dataset = data
    with pytest.raises(
        ValueError, match="train_dataset must be given when the trainer is made, with a StoredTopK, got"
    ):
        made.train()


def test_masks_of_pairs_of_tokens_are_refused(tmp_path):
    def causal(given):
        batch = collate(given)
        return dict(batch, attention_mask=torch.ones(len(given), 1, S, S).tril())

    data = examples(4)
    with pytest.raises(
        ValueError,
        match=r"store_topk: data_collator must give attention_mask \[4, 12\], as input_ids, got \[4, 1, 12, 12\]",
    ):
        store_topk(llama(24, 1), data, tmp_path / "top", k=4, data_collator=causal)
    stored = store_topk(llama(24, 1), data, tmp_path / "two", k=4, data_collator=collate)
    with pytest.raises(ValueError, match="DistillationTrainer: data_collator must give attention_mask"):
        trainer(tmp_path, llama(), [stored], data, collator=causal).train()


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[:-9], lambda whole: b"", lambda whole: whole.replace(b"0.log_probs", b"0.leg_probs")],
    ids=["short", "empty", "without a row"],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, damage):
    teacher, data = llama(24, 1), examples(8)
    stored = store_topk(teacher, data, tmp_path, k=4, data_collator=collate)
    path = stored.paths[0]
    path.write_bytes(damage(path.read_bytes()))
    message = r"rows-000000000.safetensors must be as store_topk has written it, got a damaged file .* remove it"
    with pytest.raises(ValueError, match=message):
        stored[0]
    with pytest.raises(ValueError, match=message):
        store_topk(teacher, data, tmp_path, k=4, data_collator=collate)
    path.unlink()
    store_topk(teacher, data, tmp_path, k=4, data_collator=collate)[0]


@pytest.mark.parametrize(
    "text, missing", [("{", "k, temperature"), ("[]", "k, temperature"), ('{"temperature": 1.0}', "k, classes, rows")]
)
def test_damaged_facts_are_named(tmp_path, text, missing):
    teacher, data = llama(24, 1), examples(8)
    store_topk(teacher, data, tmp_path, k=4, data_collator=collate)
    (tmp_path / "topk.json").write_text(text)
    message = rf"topk\.json must be as store_topk has written it, got one without {missing}"
    with pytest.raises(ValueError, match=message):
        StoredTopK(tmp_path)
    with pytest.raises(ValueError, match=message):
        store_topk(teacher, data, tmp_path, k=4, data_collator=collate)


class WithTypes(LlamaForCausalLM):
    def forward(self, input_ids, labels=None, token_type_ids=None, **kwargs):
        return super().forward(input_ids, labels=labels, **kwargs)


@pytest.mark.parametrize("one_row", [False, True], ids=["a row each", "one row"])
@pytest.mark.parametrize("extra", ["position_ids", "token_type_ids"])
def test_other_positions_and_types_are_noticed(tmp_path, extra, one_row):
    """Of texts packed in one row, each with its own positions."""

    def collated(first, given):
        own = torch.cat([torch.arange(first), torch.arange(S - first)])
        return dict(plain(given), **{extra: own[None] if one_row else own.expand(len(given), -1)})

    teacher, student, data = llama(24, 1, kind=WithTypes), llama(kind=WithTypes), equal_lengths()
    stored = store_topk(teacher, data, tmp_path / "top", data_collator=partial(collated, 5), k=4)
    store_topk(teacher, data, tmp_path / "top", data_collator=partial(collated, 5), k=4)
    trainer(tmp_path, student, [stored], data, collator=partial(collated, 5)).train()
    for other in (plain, partial(collated, 7)):
        with pytest.raises(
            FileExistsError, match=r"with other input_ids in row 0, or other position_ids or token_type_ids"
        ):
            store_topk(teacher, data, tmp_path / "top", data_collator=other, k=4)
        with pytest.raises(
            ValueError, match=r"example \d must have the input_ids of .* or other position_ids or token_type_ids"
        ):
            trainer(tmp_path, student, [stored], data, collator=other).train()


def test_checksums_of_tokens_alone_are_those_of_earlier_versions(tmp_path):
    data = examples(8)
    store_topk(llama(24, 1), data, tmp_path, k=4, data_collator=collate)
    kept = load_file(tmp_path / "rows-000000000.safetensors")
    assert [kept[f"{i}.checksum"].item() for i in range(8)] == [
        zlib.crc32(example["input_ids"].numpy().tobytes()) for example in data
    ]
