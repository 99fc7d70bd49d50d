"""Teachers whose parameters accelerate keeps elsewhere, in memory or on the disk, teach as those that are whole."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from backends import cpu_only
from tiny_models import assert_same, collate, examples, llama, one_step, trainer
from transformers import LlamaForCausalLM

from amtml_fast.hf import store_topk

pytestmark = cpu_only
CPU = torch.device("cpu")


def to_memory(model, folder):
    return cpu_offload(model, CPU)


def to_disk(model, folder):
    return disk_offload(model, folder / "disk", CPU)


def layers_to_memory(model, folder):
    cpu_offload(model.model.layers, CPU)
    return model


def places(output_layer):
    names = ("embed_tokens", "layers.0", "norm", "rotary_emb")
    return {**{f"model.{name}": "cpu" for name in names}, "model.layers.1": "disk", "lm_head": output_layer}


def dispatched(model, folder):
    return dispatch_model(model, places("cpu"), main_device="cpu", offload_dir=folder / "disk")


def dispatched_whole(model, folder):
    return dispatch_model(model, places("disk"), main_device="cpu", offload_dir=folder / "disk")


def loaded(model, folder):
    model.save_pretrained(folder / "saved")
    return LlamaForCausalLM.from_pretrained(folder / "saved", device_map=places("disk"), offload_folder=folder / "disk")


WITH_OUTPUT_LAYER = (to_memory, to_disk, dispatched_whole, loaded)
CASES = [(way, tied) for way in (layers_to_memory, dispatched, *WITH_OUTPUT_LAYER) for tied in (False, True)]
# transformers cannot run it: lm_head.weight is not among the files, as it is the embedding's.
CASES.remove((loaded, True))


def teacher(tied=False):
    return llama(24, 1, tie_word_embeddings=tied, num_hidden_layers=2)


@pytest.mark.parametrize(("way", "tied"), CASES, ids=lambda x: x.__name__ if callable(x) else "tied" if x else "untied")
def test_loss_and_gradients_are_those_of_the_whole_teacher(tmp_path, way, tied):
    batch, made = collate(examples(4)), []
    for prepare in (lambda model, folder: model, way):
        student = llama()
        torch.manual_seed(7)  # the adapter's
        taught = prepare(teacher(tied), tmp_path)
        whole = trainer(tmp_path, student, [taught, llama(8, 2)], weighting="adaptive")
        one_step(whole, student, batch)
        student.zero_grad()
        made.append(one_step(whole, student, batch))  # a second time: what was loaded has gone again
    assert any(p.is_meta for p in taught.model.layers.parameters())
    assert taught.lm_head.weight.is_meta == (way in WITH_OUTPUT_LAYER)
    (want, right), (got, grads) = made
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert "teacher_adapter.theta" in grads
    assert_same(grads, right, 1e-6)
    assert not taught.training and not any(p.requires_grad for p in taught.parameters())


def test_a_bias_is_loaded_too(tmp_path):
    batch, losses = collate(examples(4)), []
    for prepare in (lambda model, folder: model, to_disk):
        taught = teacher()
        taught.lm_head.bias = torch.nn.Parameter(torch.linspace(-3, 3, taught.vocab_size))
        student = llama()
        losses.append(one_step(trainer(tmp_path, student, [prepare(taught, tmp_path)]), student, batch)[0])
    assert torch.equal(*losses)


def test_a_store_is_made_of_them_and_tells_them_apart(tmp_path):
    data, options = examples(4), dict(k=4, data_collator=collate)
    whole = store_topk(teacher(), data, tmp_path / "top", **options)
    stored = store_topk(to_disk(teacher(), tmp_path / "a"), data, tmp_path / "other", **options)
    for i in range(len(data)):
        assert all(map(torch.equal, whole[i], stored[i]))
    store_topk(to_memory(teacher(), tmp_path), data, tmp_path / "top", **options)  # the same teacher
    other = teacher()
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    with pytest.raises(FileExistsError, match="with teacher LlamaForCausalLM"):
        store_topk(to_disk(other, tmp_path / "b"), data, tmp_path / "top", **options)


def test_an_offloaded_student_is_named(tmp_path):
    student = teacher()
    cpu_offload(student.model.layers, CPU)
    with pytest.raises(ValueError, match="DistillationTrainer: model must have all its parameters on a device, got"):
        trainer(tmp_path, student, [teacher()])


def test_a_teacher_that_is_spread_over_devices_is_not_moved(tmp_path, monkeypatch):
    def move(*_):
        raise AssertionError("it was moved")

    taught = teacher()
    taught.hf_device_map = {"model": 0, "lm_head": 1}
    monkeypatch.setattr(taught, "to", move)
    made = trainer(tmp_path, llama(), [taught])
    assert one_step(made, made.model, collate(examples(4)))[0].isfinite()
