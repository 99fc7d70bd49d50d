"""Language models of 40 tokens, texts for them, their trainer, and what a step of it must give."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, TrainingArguments

import amtml_fast as af
from amtml_fast.hf import DistillationTrainer

C, S = 40, 12
SIZES = dict(vocab_size=C, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
TOKENS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)


def llama(hidden=16, seed=0, kind=LlamaForCausalLM, **options):
    torch.manual_seed(seed)
    return kind(
        LlamaConfig(
            hidden_size=hidden, initializer_range=0.4, **{**SIZES, **TOKENS, "tie_word_embeddings": True, **options}
        )
    )


def gpt2():
    torch.manual_seed(0)
    drop = dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=C, n_embd=16, n_layer=1, n_head=2, **drop, **TOKENS))


def examples(rows=8, seed=0):
    """Of different lengths; the first tokens of some have no label."""
    random = torch.Generator().manual_seed(seed)
    made = []
    for i in range(rows):
        ids = torch.randint(3, C, (S - i % 4,), generator=random)
        labels = ids.clone()
        labels[: i % 3] = -100
        made.append(dict(input_ids=ids, labels=labels))
    return made


def collate(given, left=False):
    batch = {}
    for name, fill in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
        rows = []
        for example in given:
            row = example[name] if name in example else torch.ones_like(example["input_ids"])
            pad = S - len(row)
            rows.append(torch.nn.functional.pad(row, (pad, 0) if left else (0, pad), value=fill))
        batch[name] = torch.stack(rows)
    if "teacher_index" in given[0]:
        batch["teacher_index"] = torch.tensor([e["teacher_index"] for e in given])
    return batch


def trainer(folder, student, teachers, data=None, evaluated=None, collator=collate, **options):
    arguments = dict(
        per_device_train_batch_size=4, max_steps=2, learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", seed=3, max_grad_norm=0,
    )  # fmt: skip
    names = {
        "weighting", "adapter_learning_rate", "loss", "teacher_tokenizers", "processing_class", "compute_loss_func", "model_init",
    } & set(options)  # fmt: skip
    own = {name: options.pop(name) for name in names}
    args = TrainingArguments(str(folder), **{**arguments, **options})
    return DistillationTrainer(
        student,
        args,
        teachers=teachers,
        train_dataset=data or examples(),
        eval_dataset=evaluated,
        data_collator=collator,
        **own,
    )


def by_whole_logits(student, teachers, batch, weights=None, **options):
    """The loss of tokens [B * (S - 1)], of logits as the models give them."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    z, *ts = (m(**inputs).logits[:, :-1].reshape(-1, C) for m in (student, *teachers))
    ts = [t.detach() for t in ts]
    labels = batch["labels"][:, 1:].reshape(-1)
    options = {"temperature": 1.0, "alpha": 0.5, **options}
    return af.reference.multi_teacher_kd_loss(z, ts, weights, labels, **options)


def grads_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, want, tolerance=1e-5):
    assert set(got) == set(want)
    for name in want:
        assert (got[name] - want[name]).norm() <= tolerance * want[name].norm() + 1e-9, name


def one_step(made, student, batch):
    """The gradients of one batch, as training_step makes them."""
    made.create_optimizer()
    loss = made.training_step(
        made.model_wrapped, dict(batch), made._get_num_items_in_batch([batch], torch.device("cpu"))
    )
    return loss, grads_of(student)


def assert_step_of_whole_logits(made, student, teachers, batch):
    """The trainer's loss and gradients of a batch are those of whole logits. Returns the gradients."""
    want = by_whole_logits(student, teachers, batch)
    want.backward()
    right = grads_of(student)
    student.zero_grad()
    got, grads = one_step(made, student, batch)
    torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=0)
    assert_same(grads, right)
    return grads


def ends_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}
