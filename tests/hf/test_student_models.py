"""Students whose loss transformers makes otherwise than Llama's: GPT-2, and mixtures of experts with a router's loss."""

import math

import pytest
import torch
from backends import cpu_only
from tiny_models import (
    SIZES,
    TOKENS,
    C,
    assert_same,
    assert_step_of_whole_logits,
    by_whole_logits,
    collate,
    examples,
    gpt2,
    grads_of,
    llama,
    one_step,
)
from tiny_models import trainer as distillation
from transformers import (
    BartConfig,
    BartForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
)

import amtml_fast as af

pytestmark = cpu_only


def whole_examples():
    """Whose first tokens have labels, which no loss of a causal model counts."""
    return [dict(input_ids=e["input_ids"], labels=e["input_ids"]) for e in examples(4)]


def test_the_first_label_of_gpt2_is_not_counted(tmp_path):
    student, teacher, data = gpt2(), llama(24, 1), whole_examples()
    batch = collate(data)
    made = distillation(tmp_path, student, [teacher], data, evaluated=data, per_device_eval_batch_size=4)
    assert_step_of_whole_logits(made, student, [teacher], batch)
    plain = by_whole_logits(student, [teacher], batch, alpha=0.0).item()
    assert math.isclose(made.evaluate()["eval_loss"], plain, rel_tol=1e-5)


def bart():
    torch.manual_seed(0)
    sizes = dict(d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, dropout=0.0)
    return BartForCausalLM(BartConfig(vocab_size=C, **sizes, **TOKENS))


def test_a_loss_that_does_not_move_labels_is_given_moved_ones(tmp_path):
    """Of BART's decoder transformers says so; the first of the moved labels counts."""
    student, teacher, data = bart(), llama(24, 1), examples(4)
    batch = collate(data)
    want = by_whole_logits(student, [teacher], batch)
    want.backward()
    right = grads_of(student)
    student.zero_grad()
    for example in data:
        example["labels"] = torch.nn.functional.pad(example["labels"][1:], (0, 1), value=-100)
    moved = collate(data)
    made = distillation(tmp_path, student, [teacher], data, evaluated=data, per_device_eval_batch_size=4)
    got, grads = one_step(made, student, moved)
    torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=0)
    assert_same(grads, right)
    plain = by_whole_logits(student, [teacher], batch, alpha=0.0).item()
    assert math.isclose(made.evaluate()["eval_loss"], plain, rel_tol=1e-5)


class Unlabeled(LlamaForCausalLM):
    """Makes no loss: a student that is trained, but not evaluated."""

    def forward(self, input_ids=None, attention_mask=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask)


def test_a_student_that_takes_no_labels(tmp_path):
    student, teacher, batch = llama(kind=Unlabeled), llama(24, 1), collate(examples(4))
    want = by_whole_logits(student, [teacher], batch)
    got, _ = one_step(distillation(tmp_path, student, [teacher]), student, batch)
    torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=0)


def mixtral(**options):
    torch.manual_seed(0)
    config = dict(num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5, hidden_size=16)
    return MixtralForCausalLM(MixtralConfig(**{**SIZES, **TOKENS, **config, **options}))


def jetmoe():
    """The coefficient has another name."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, kv_channels=8, num_hidden_layers=1, num_key_value_heads=1, intermediate_size=32)
    options = dict(num_local_experts=4, output_router_logits=True, aux_loss_coef=0.5, vocab_size=C)
    return JetMoeForCausalLM(JetMoeConfig(**sizes, **options, **TOKENS))


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("weighting", ["uniform", "adaptive"])
def test_the_experts_of_a_checkpoint_are_loaded(tmp_path, weighting, caplog):
    """They have other names on the disk."""
    teachers, ends = [llama(24, 1), llama(8, 2)], []
    options = dict(weighting=weighting, max_steps=4, save_strategy="steps", save_steps=2, lr_scheduler_type="constant")
    for resume in (None, str(tmp_path / "checkpoint-2")):
        student = mixtral()
        torch.manual_seed(7)  # the adapter's
        distillation(tmp_path, student, teachers, **options).train(resume_from_checkpoint=resume)
        ends.append(parameters(student))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not [record for record in caplog.records if "keys in the checkpoint" in record.getMessage()]

    student = mixtral().bfloat16()
    best = dict(eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, greater_is_better=False)
    made = distillation(tmp_path / "best", student, teachers, evaluated=examples(4, seed=9), **best, **options)
    made.train()
    assert made.state.best_model_checkpoint.endswith("checkpoint-2")
    kept = parameters(MixtralForCausalLM.from_pretrained(made.state.best_model_checkpoint))
    assert any("experts" in name for name in kept)
    now = parameters(student)
    assert all(torch.equal(now[name], kept[name]) for name in kept)


LABELS_ALONE = af.FusedLinearKDLoss(temperature=1.0, alpha=0.0)


@pytest.mark.parametrize("make", [mixtral, jetmoe])
def test_the_loss_of_routers_is_added_as_the_model_adds_it(tmp_path, make):
    student, batch = make(), collate(examples(4))
    want = student(**batch).loss
    want.backward()
    right = grads_of(student)
    student.zero_grad()
    got, grads = one_step(distillation(tmp_path, student, [llama(24, 1)], loss=LABELS_ALONE), student, batch)
    torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=0)
    assert_same(grads, right)
    assert any(("gate" in name or "router" in name) and grad.norm() > 0 for name, grad in grads.items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulated_batches_add_what_a_plain_trainer_adds(tmp_path, checkpointing):
    options = dict(optim="sgd", learning_rate=0.1, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    data, ends = examples(), []
    for example in data:
        example["labels"][0] = -100  # which older versions of a plain trainer would count
    for plain in (False, True):
        student = mixtral(use_cache=False)
        made = distillation(
            tmp_path, student, [llama(24, 1)], data, loss=LABELS_ALONE, gradient_checkpointing=checkpointing, **options
        )
        if plain:
            student = mixtral(use_cache=False)
            made = Trainer(student, made.args, train_dataset=data, data_collator=collate)
        made.train()
        ends.append({name: p.detach() for name, p in student.named_parameters()})
    assert_same(*ends)


class OwnRouter(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output["aux_loss"] = torch.ones(())
        return output


def test_a_router_whose_coefficient_is_not_found_is_named(tmp_path):
    student = llama(kind=OwnRouter)
    with pytest.raises(
        ValueError, match=r"model must have router_aux_loss_coef or aux_loss_coef, .* got OwnRouter without"
    ):
        one_step(distillation(tmp_path, student, [llama(24, 1)]), student, collate(examples(4)))


def test_routers_that_are_not_asked_add_nothing(tmp_path):
    student, batch = mixtral(output_router_logits=False), collate(examples(4))
    got, _ = one_step(distillation(tmp_path, student, [llama(24, 1)], loss=LABELS_ALONE), student, batch)
    torch.testing.assert_close(got, student.eval()(**batch).loss.detach(), rtol=1e-5, atol=0)
