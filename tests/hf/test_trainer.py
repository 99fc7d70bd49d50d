"""DistillationTrainer against the loss of whole logits, and what a trainer promises: accumulation, processes, resuming."""

import copy
import math
from functools import partial

import pytest
import torch
from backends import cpu_only
from parallel import in_processes
from tiny_models import (
    SIZES,
    TOKENS,
    C,
    S,
    assert_same,
    assert_step_of_whole_logits,
    by_whole_logits,
    collate,
    ends_of,
    examples,
    grads_of,
    llama,
    one_step,
    trainer,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    CLIPVisionConfig,
    CohereConfig,
    CohereForCausalLM,
    DataCollatorWithFlattening,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from amtml_fast.hf import store_topk
from amtml_fast.hf.output_layer import OutputLayer

pytestmark = cpu_only


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_those_of_whole_logits(tmp_path, tied):
    student, teachers = llama(tie_word_embeddings=tied), [llama(24, 1), llama(8, 2, tie_word_embeddings=False)]
    assert_step_of_whole_logits(trainer(tmp_path, student, teachers), student, teachers, collate(examples(4)))
    assert not any(p.requires_grad or p.grad is not None for t in teachers for p in t.parameters())
    assert not any(t.training for t in teachers) and student.training


def test_a_teacher_put_into_training_mode_teaches_in_eval_mode(tmp_path):
    student, teacher, batch = llama(), llama(24, 1, attention_dropout=0.9), collate(examples(4))
    want = by_whole_logits(student, [teacher.eval()], batch)
    made = trainer(tmp_path, student, [teacher])
    teacher.train()
    got, _ = one_step(made, student, batch)
    torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=0)


def test_teachers_whose_logits_are_scaled_otherwise(tmp_path):
    torch.manual_seed(1)
    cohere = CohereForCausalLM(CohereConfig(hidden_size=16, logit_scale=0.25, initializer_range=0.5, **SIZES, **TOKENS))
    student = llama()
    assert_step_of_whole_logits(trainer(tmp_path, student, [cohere]), student, [cohere], collate(examples(4)))


def test_what_models_do_to_their_logits_is_found():
    small = dict(hidden_size=16, **SIZES, **TOKENS)
    made = {
        (1.0, None): LlamaForCausalLM(LlamaConfig(**small)).bfloat16(),
        (1.0, 30.0): Gemma2ForCausalLM(Gemma2Config(head_dim=8, **small)),
        (0.125, None): CohereForCausalLM(CohereConfig(logit_scale=0.125, **small)),
        (1 / 8, None): GraniteForCausalLM(GraniteConfig(logits_scaling=8.0, **small)),
        (1.0, None, "GPT-2"): GPT2LMHeadModel(GPT2Config(vocab_size=C, n_embd=16, n_layer=1, n_head=2, **TOKENS)),
    }
    for (scale, cap, *_), model in made.items():
        found = OutputLayer(model, "model")
        assert math.isclose(found.logit_scale, scale, rel_tol=1e-6), model
        assert found.softcap == cap and found.classes == C
        assert model.training  # as it was

    class Odd(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = self.change(out.logits)
            return out

    message = r"teachers\[1\] must give its output layer's results as they are, .* got Odd"
    for change in (
        lambda z: z - z.mean(-1, keepdim=True),
        lambda z: -z,
        lambda z: 0 * z,
        lambda z: z.index_add(-1, torch.tensor([5]), torch.ones(*z.shape[:-1], 1)),  # as a bias
        lambda z: z.index_fill(-1, torch.tensor([5]), -100.0),
    ):
        odd = Odd(LlamaConfig(**small))
        odd.change = change
        with pytest.raises(ValueError, match=message):
            OutputLayer(odd, "teachers[1]")


def test_hooks_of_the_output_layer():
    """What they do to hidden states counts, and they may look at the result, but not change it: no result is made."""
    watched, scaled, changed = llama(), llama(), llama()
    seen = []
    watched.lm_head.register_forward_hook(lambda layer, args, out: seen.append(out.shape))
    scaled.lm_head.register_forward_pre_hook(lambda layer, args: (2 * args[0],))
    changed.lm_head.register_forward_hook(lambda layer, args, out: out.index_fill(-1, torch.tensor([3]), -100.0))
    for fine in (watched, scaled):
        OutputLayer(fine, "model")
    assert seen
    with pytest.raises(ValueError, match=r"^teachers\[0\] must have an output layer whose hooks leave its results"):
        OutputLayer(changed, "teachers[0]")


def llava():
    torch.manual_seed(0)
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    text = LlamaConfig(hidden_size=16, initializer_range=0.4, **SIZES, **TOKENS)
    seen = CLIPVisionConfig(image_size=8, patch_size=4, **sizes)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=seen, text_config=text, image_token_id=C - 1))


@pytest.mark.parametrize("make", [llama, llava])
def test_texts_packed_in_one_row_are_apart_for_teachers_too(tmp_path, make):
    student, teachers, data = make(), [llama(24, 1), llama(8, 2)], examples(4)
    want, grads = one_step(trainer(tmp_path, student, teachers), student, collate(data))
    student.zero_grad()
    rows = [{name: x.tolist() for name, x in example.items()} for example in data]
    packed = DataCollatorWithFlattening()(rows)
    got, of_packed = one_step(trainer(tmp_path, student, teachers), student, packed)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    assert_same(of_packed, grads)
    assert all(t.config.use_cache for t in teachers)  # as it was


def test_a_student_can_be_pickled_and_copied(tmp_path):
    """As a whole, also what a first trainer has left in it; and a copy may teach it."""
    student, batch = llama(), collate(examples(4))
    trainer(tmp_path, student, [llama(24, 1)]).train()
    torch.save(student, tmp_path / "student.pt")
    copies = torch.load(tmp_path / "student.pt", weights_only=False), copy.deepcopy(student)
    for one in copies:
        assert torch.equal(one(**batch).loss, student(**batch).loss)
        want = by_whole_logits(student, [one], batch)
        got, _ = one_step(trainer(tmp_path, student, [one]), student, batch)
        torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=0)
        student.zero_grad()


def test_no_logits_are_made(tmp_path):
    student, teacher = llama(), llama(24, 1)
    seen = []
    for model in (student, teacher):
        model.get_output_embeddings().register_forward_hook(lambda layer, args, out: seen.append(out.numel()))
    made = trainer(tmp_path, student, [teacher])
    seen.clear()
    one_step(made, student, collate(examples(4)))
    assert seen == [0, 0]


def test_adaptive_weights_learn_from_labels_and_the_student_from_them(tmp_path):
    student, teachers = llama(), [llama(24, 1), llama(8, 2)]
    made = trainer(tmp_path, student, teachers, weighting="adaptive")
    batch = collate(examples(4))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["labels"][:, 1:].reshape(-1)
    hidden = student.model(**inputs).last_hidden_state[:, :-1].reshape(-1, 16).detach()
    weights = student.teacher_adapter(hidden)
    p = torch.stack([t(**inputs).logits[:, :-1].reshape(-1, C).softmax(-1) for t in teachers], 1).detach()
    of_labels = p.gather(2, labels.clamp(min=0)[:, None, None].expand(-1, 2, 1))[..., 0]
    rows = -(weights * of_labels).sum(1).log()
    (rows[labels != -100].mean() + by_whole_logits(student, teachers, batch, weights.detach())).backward()
    right = grads_of(student)
    student.zero_grad()
    loss, grads = one_step(made, student, batch)
    assert "teacher_adapter.theta" in grads
    assert_same(grads, right)
    # The adapter's own loss is not in it.
    torch.testing.assert_close(loss, by_whole_logits(student, teachers, batch, weights).detach())


def test_what_teachers_say_of_the_labels(tmp_path):
    torch.manual_seed(1)
    config = CohereConfig(hidden_size=16, logit_scale=0.25, initializer_range=0.5, **SIZES, **TOKENS)
    student, teacher = CohereForCausalLM(config), CohereForCausalLM(config)
    data = examples(1)
    stored = store_topk(teacher, data, tmp_path / "top", k=4, data_collator=collate)
    made = trainer(tmp_path, student, [teacher, stored], data, weighting="adaptive")
    ids = data[0]["input_ids"][None]
    p = teacher(input_ids=ids).logits[0].softmax(-1)
    labels = torch.arange(S) % C
    labels[0], labels[1] = -100, p[1].argmax()
    want = p[torch.arange(S), labels.clamp(min=0)].log()
    top = p.topk(4)
    others = ((1 - top.values.sum(1)) / (C - 4)).log()
    bucket = torch.where((top.indices == labels[:, None]).any(1), want, others)
    with torch.inference_mode():
        given = made.sources[0].teach(dict(input_ids=ids), torch.device("cpu"))
    for source, right in ((given, want), (stored[0], bucket)):
        torch.testing.assert_close(
            made._log_probs_of_labels(source, labels), right.masked_fill(labels == -100, 0), rtol=1e-3, atol=1e-3
        )


def test_routed_examples_learn_from_their_teacher(tmp_path):
    student, teachers = llama(), [llama(24, 1), llama(8, 2)]
    data = [{**e, "teacher_index": i % 2} for i, e in enumerate(examples(4))]
    batch = collate(data)
    index = batch["teacher_index"][:, None].expand(-1, S - 1).reshape(-1)
    want = by_whole_logits(student, teachers, batch, torch.nn.functional.one_hot(index, 2).float())
    got, _ = one_step(trainer(tmp_path, student, teachers, weighting="routed"), student, batch)
    torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=0)


def test_routed_tokens_learn_from_their_teacher(tmp_path):
    student, teachers, batch = llama(), [llama(24, 1), llama(8, 2)], collate(examples(4))
    index = torch.randint(0, 2, (4, S))
    weights = torch.nn.functional.one_hot(index[:, :-1].reshape(-1), 2).float()
    want = by_whole_logits(student, teachers, batch, weights)
    made = trainer(tmp_path, student, teachers, weighting="routed")
    got, _ = one_step(made, student, {**batch, "teacher_index": index})
    torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=0)


class Strict(LlamaForCausalLM):
    """Takes no count of tokens."""

    accepts_loss_kwargs = False

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def moved(given):
    """Beside labels that are wrong, those of the tokens after these."""
    batch = collate(given)
    return dict(batch, labels=batch["labels"].fill_(1), shift_labels=torch.stack([e["shift_labels"] for e in given]))


@pytest.mark.parametrize("kind", [LlamaForCausalLM, Strict])
def test_labels_that_are_moved_already(tmp_path, kind):
    student, teacher, data = llama(kind=kind), llama(24, 1), examples(4)
    whole = collate(data)
    want = by_whole_logits(student, [teacher], whole)
    for example, labels in zip(data, whole["labels"]):
        example["shift_labels"] = torch.nn.functional.pad(labels[1:], (0, 1), value=-100)
    made = trainer(tmp_path, student, [teacher], data, collator=moved)
    batch = next(iter(made.get_train_dataloader()))  # which leaves out what the trainer does not take
    got, _ = one_step(made, student, batch)
    torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=0)


def weights_after(tmp_path, kind, **options):
    student = llama(kind=kind)
    torch.manual_seed(7)  # the adapter's
    made = trainer(tmp_path, student, [llama(24, 1), llama(8, 2)], weighting="adaptive", **options)
    made.train()
    return ends_of(student)


@pytest.mark.parametrize("kind", [LlamaForCausalLM, Strict])
def test_accumulated_batches_count_by_their_tokens(tmp_path, kind):
    sgd = dict(kind=kind, optim="sgd", learning_rate=0.1, max_steps=2)
    whole = weights_after(tmp_path, per_device_train_batch_size=4, **sgd)
    parts = weights_after(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, **sgd)
    assert_same(parts, whole)


def two_processes_or_one(folder, student, batch_size):
    torch.manual_seed(7)  # the adapter's
    options = dict(optim="sgd", learning_rate=0.1, per_device_train_batch_size=batch_size)
    return trainer(folder, student, [llama(24, 1), llama(8, 2)], weighting="adaptive", **options)


def in_ddp_and_fsdp2(folder, rank):
    """Parameters after a training in DDP, and gradients of a step in FSDP2, of one of two processes."""
    student = llama()
    made = two_processes_or_one(folder, student, 2)
    assert made.accelerator.num_processes == 2
    made.train()  # which wraps the student in DDP
    ends = ends_of(student)

    student, mesh = llama(), init_device_mesh("cpu", (2,))
    made = two_processes_or_one(folder, student, 2)
    fully_shard(student.model.layers[0], mesh=mesh)
    fully_shard(student, mesh=mesh)
    batch = collate(examples(4))
    half = {name: x[2 * rank : 2 * rank + 2] for name, x in batch.items()}
    for _ in range(2):  # the second after the layers were gathered and given back once
        student.zero_grad()
        made.compute_loss(student.train(), half, num_items_in_batch=(batch["labels"][:, 1:] != -100).sum()).backward()
    return ends, {name: p.grad.full_tensor() for name, p in student.named_parameters()}


def test_two_processes_are_one_in_ddp_and_fsdp2(tmp_path):
    (ends, grads), _ = in_processes(2, partial(in_ddp_and_fsdp2, tmp_path), tmp_path)
    student = llama()
    one = two_processes_or_one(tmp_path, student, 4)
    one.train()
    assert_same(ends, ends_of(student))
    student = llama()
    _, want = one_step(two_processes_or_one(tmp_path, student, 4), student, collate(examples(4)))
    assert_same(grads, want)


def test_a_resumed_training_has_the_same_bits(tmp_path):
    def run(folder, resume=None, **options):
        student = llama(seed=5)
        made = trainer(folder, student, [llama(24, 1), llama(8, 2)], weighting="adaptive", max_steps=4, **options)
        if resume == 0:  # stops in the middle
            made.args.max_steps, made.args.num_train_epochs = 2, 1
        made.train(resume_from_checkpoint=resume or None)
        return ends_of(student)

    saving = dict(save_strategy="steps", save_steps=2, lr_scheduler_type="constant")
    whole = run(tmp_path / "a", **saving)
    resumed = run(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-2"), **saving)
    assert "teacher_adapter.v" in whole and all(torch.equal(whole[n], resumed[n]) for n in whole)
    again, info = LlamaForCausalLM.from_pretrained(tmp_path / "a" / "checkpoint-4", output_loading_info=True)
    assert all(key.startswith("teacher_adapter.") for key in info["unexpected_keys"]) and not info["missing_keys"]
    assert torch.equal(again.get_input_embeddings().weight, whole["model.embed_tokens.weight"])


@pytest.mark.parametrize("kind", [LlamaForCausalLM, Strict])
def test_evaluation_is_plain_cross_entropy_and_what_is_logged(tmp_path, kind):
    student, teachers = llama(kind=kind), [llama(24, 1), llama(8, 2)]
    made = trainer(tmp_path, student, teachers, evaluated=examples(4, seed=9), logging_steps=2)
    plain = by_whole_logits(student, teachers, collate(examples(4, seed=9)), alpha=0.0).item()
    assert math.isclose(made.evaluate()["eval_loss"], plain, rel_tol=1e-5)
    made.train()
    (logs,) = [logs for logs in made.state.log_history if "loss" in logs]
    assert made._sums is None  # the next step that is logged begins anew
    for t in (0, 1):
        assert math.isclose(logs[f"teacher_{t}_weight"], 0.5) and logs[f"teacher_{t}_kl"] > 0
    assert math.isclose(logs["weight_entropy"], math.log(2), rel_tol=1e-6)
    assert 0 < logs["student_entropy"] <= math.log(C) and 0 < logs["target_entropy"] <= math.log(C)
