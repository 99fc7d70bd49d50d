"""What ``store_topk`` keeps: teaches as the teacher does, goes on where it was killed, and is noticed where it does not fit."""

import pytest
import torch
from backends import cpu_only

pytest.importorskip("transformers")
from test_trainer import C, assert_same, collate, examples, llama, trainer

from amtml_fast.hf import StoredTopK, store_topk

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

    with pytest.raises(KeyboardInterrupt):
        store_topk(teacher, Killed(data), tmp_path / "b", **options)
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
    for wrong, message in (
        (dict(k=0), "k must be an int from 1 to 40, got 0"),
        (dict(temperature=0), "temperature must be > 0, got 0"),
        (dict(batch_size=0), "batch_size must be an int >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match="store_topk: " + message):
            store_topk(teacher, data, tmp_path / "c", **{**options, **wrong})
    assert not (tmp_path / "c").exists()
