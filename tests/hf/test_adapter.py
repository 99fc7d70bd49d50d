"""The adapter of DistillationTrainer: its formula, its own learning rate, and scores that are far apart."""

import math

import pytest
import torch
from backends import cpu_only
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from amtml_fast import TeacherAdapter
from amtml_fast.hf import DistillationTrainer
from amtml_fast.hf.adapter import HiddenAdapter
from amtml_fast.terms import LinearTeacher, TopKTeacher

pytestmark = cpu_only


def llama(seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            bos_token_id=None, eos_token_id=None, initializer_range=0.3,
        )
    )  # fmt: skip


def trainer(folder, student, weighting="adaptive", teachers=None, **options):
    torch.manual_seed(0)
    ids = torch.randint(0, 40, (16, 12)).tolist()
    data = [{"input_ids": row, "labels": row} for row in ids]
    own = {
        name: options.pop(name)
        for name in ("adapter_learning_rate", "optimizers", "optimizer_cls_and_kwargs")
        if name in options
    }
    arguments = dict(
        max_steps=3, learning_rate=1e-4, weight_decay=0.1, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", lr_scheduler_type="linear",
    )  # fmt: skip
    args = TrainingArguments(str(folder), **{**arguments, **options})
    teachers = teachers or [llama(1), llama(2)]
    return DistillationTrainer(student, args, teachers=teachers, weighting=weighting, train_dataset=data, **own)


def test_it_is_equation_5_of_projected_states():
    torch.manual_seed(0)
    adapter, hidden = HiddenAdapter(16, 3, width=8), 100 * torch.randn(5, 16)
    rows = (hidden - hidden.mean(1, keepdim=True)) / (hidden.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    states = torch.nn.functional.silu(rows @ adapter.project.weight.T + adapter.project.bias)
    scores = (states.unsqueeze(1) * adapter.theta * adapter.v).sum(-1)
    torch.testing.assert_close(adapter(hidden), scores.softmax(-1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(adapter(hidden.bfloat16()), adapter(hidden.bfloat16().float()))


@pytest.mark.parametrize("rate", [None, 0.02])
def test_it_has_its_own_learning_rate(tmp_path, rate):
    student = llama(0)
    made = trainer(tmp_path, student, **({} if rate is None else {"adapter_learning_rate": rate}))
    optimizer = made.create_optimizer()
    assert made.create_optimizer() is optimizer and len(optimizer.param_groups) == 3
    own = optimizer.param_groups[-1]
    assert (own["lr"], own["weight_decay"]) == (rate or 1e-3, 0)
    assert {id(p) for p in own["params"]} == {id(p) for p in student.teacher_adapter.parameters()}
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(student.parameters()))
    before = student.teacher_adapter.theta.detach().clone()
    made.train()
    moved = (student.teacher_adapter.theta - before).abs().max().item()
    assert (rate or 1e-3) < moved <= 2.1 * (rate or 1e-3)  # Adam: (1 + 2/3 + 1/3) of it at the most


def test_rates_and_optimizers_that_are_given(tmp_path):
    with pytest.raises(ValueError, match=r"adapter_learning_rate must be a number in \[1e-18, 1e\+18\], got 0"):
        trainer(tmp_path, llama(0), adapter_learning_rate=0)
    student = llama(0)
    given = torch.optim.SGD(student.parameters(), lr=0.5)
    with pytest.raises(
        ValueError, match=r"optimizers must be \(None, None\) .* got SGD, which cannot have its parameters"
    ):
        trainer(tmp_path, student, optimizers=(given, None))
    assert not hasattr(student, "teacher_adapter")
    trainer(tmp_path, student, "uniform", optimizers=(given, None)).train()  # which has no adapter
    made = trainer(tmp_path, student)
    made.optimizer = given = torch.optim.SGD(student.parameters(), lr=0.5)
    before = student.teacher_adapter.theta.detach().clone()
    made.train()
    assert len(given.param_groups) == 1 and not torch.equal(student.teacher_adapter.theta, before)
    again = trainer(tmp_path, student, optimizers=(given, None))  # the adapter is there, and the optimizer has it
    assert again.create_optimizer() is given and len(given.param_groups) == 1
    other = dict(optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5}))
    made = trainer(tmp_path, llama(0), **other)
    assert made.create_optimizer().param_groups[-1]["lr"] == 1e-3


def test_labels_of_32_bits(tmp_path):
    student = llama(0)
    made = trainer(tmp_path, student)
    labels = torch.tensor([3, 5, 7, -100, 5])
    want, right = gradients(made, student, labels, [None, None])
    got, grads = gradients(made, student, labels.int(), [None, None])
    assert got == want and all(map(torch.equal, grads, right))


def test_a_teacher_without_any_weight_leaves_the_gradient_finite(tmp_path):
    student = llama(0)
    made = trainer(tmp_path, student)
    with torch.no_grad():
        student.teacher_adapter.theta.mul_(1e4)
    made.train()
    weights = student.teacher_adapter(torch.randn(50, 16))
    assert (weights == 0).any() and all(p.isfinite().all() for p in student.parameters())


def test_a_second_trainer_of_the_model_goes_on_with_what_it_has_learned(tmp_path):
    student = llama(0)
    first = trainer(tmp_path, student)
    start = student.teacher_adapter.theta.detach().clone()
    first.train()
    learned = {name: p.detach().clone() for name, p in student.teacher_adapter.named_parameters()}
    trainer(tmp_path, student, "uniform").train()
    assert not any(p.requires_grad for p in student.teacher_adapter.parameters())  # DDP would wait for their gradients
    second = trainer(tmp_path, student)
    now = dict(student.teacher_adapter.named_parameters())
    assert set(now) == set(learned) and all(torch.equal(now[name], learned[name]) for name in learned)
    second.train()
    assert all(not torch.equal(now[name], learned[name]) for name in ("theta", "v", "project.weight"))
    student.teacher_adapter = None
    trainer(tmp_path, student)
    assert torch.equal(student.teacher_adapter.theta, start)  # a new one, of the same seed


@pytest.mark.parametrize(
    ("adapter", "error", "message"),
    [
        (
            HiddenAdapter(16, 3),
            ValueError,
            "of 2 teachers and a hidden size of 16, got one of 3 and 16, .* = None starts a",
        ),
        (HiddenAdapter(8, 2), ValueError, "of 2 teachers and a hidden size of 16, got one of 2 and 8, from an earlier"),
        (TeacherAdapter(16, 2), TypeError, "the HiddenAdapter of an earlier trainer or None, got TeacherAdapter"),
    ],
)
def test_an_adapter_that_does_not_fit_is_named(tmp_path, adapter, error, message):
    student = llama(0)
    student.teacher_adapter = adapter
    with pytest.raises(error, match="DistillationTrainer: model.teacher_adapter must be " + message):
        trainer(tmp_path, student)
    assert student.teacher_adapter is adapter


def gradients(made, student, labels, teachers=None):
    """Of the adapter's loss, of one batch of random hidden states."""
    torch.manual_seed(3)
    hidden = torch.randn(labels.numel(), 16)
    taught = [LinearTeacher(torch.randn(labels.numel(), 16), torch.randn(40, 16), bias) for bias in teachers]
    loss = made._adapter_loss(student.teacher_adapter(hidden), taught, labels, (labels != -100).sum())
    grads = torch.autograd.grad(loss, list(student.teacher_adapter.parameters()))
    return loss.detach(), grads


def test_a_label_that_no_teacher_has_counts_nothing(tmp_path):
    student = llama(0)
    made = trainer(tmp_path, student)
    without = torch.zeros(40).index_fill_(0, torch.tensor([5]), -torch.inf)
    labels = torch.tensor([3, 5, 7, -100, 5])
    loss, grads = gradients(made, student, labels, [without, without])
    part = labels.masked_fill(labels == 5, -100)
    want, right = gradients(made, student, part, [without, without])
    torch.testing.assert_close(loss, want * 2 / 4)  # 4 tokens count
    for got, of in zip(grads, right):
        torch.testing.assert_close(got, of * 2 / 4)
    one, grads = gradients(made, student, labels, [without, None])  # one teacher has it
    assert one.isfinite() and one > loss and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("counted", ["some", "none"])
def test_training_on_labels_that_no_teacher_has(tmp_path, counted):
    student, teachers = llama(0), []
    for seed in (1, 2):
        teacher = llama(seed)
        teacher.lm_head.bias = torch.nn.Parameter(
            torch.zeros(40).masked_fill(torch.arange(40) >= (20 if counted == "some" else 0), -torch.inf)
        )
        teacher.lm_head.bias.data[0] = 0  # a class at least
        teachers.append(teacher)
    made = trainer(tmp_path, student, teachers=teachers, logging_steps=1)
    made.train()
    losses = [logs["loss"] for logs in made.state.log_history if "loss" in logs]
    assert len(losses) == 3 and 0 not in losses and all(map(math.isfinite, losses))
    assert all(p.isfinite().all() for p in student.parameters())


def test_without_a_count_the_tokens_of_the_batch_are_it(tmp_path):
    student = llama(0)
    made = trainer(tmp_path, student)
    labels = torch.tensor([[3, 5, 7, -100, 5]])
    batch = dict(input_ids=torch.tensor([[3, 5, 7, 9, 5]]), labels=labels)
    ends = []
    for count in (None, 3):  # the first token is no label
        student.zero_grad()
        made.compute_loss(student.train(), dict(batch), num_items_in_batch=count).backward()
        ends.append([p.grad.clone() for p in student.parameters()])
    torch.testing.assert_close(*ends)
    assert student.teacher_adapter.theta.grad.norm() > 0


def test_a_store_of_all_probability_gives_other_labels_a_little(tmp_path):
    """By rounding it may be more than all: the logarithm of what is left would be NaN."""
    made = trainer(tmp_path, llama(0))
    named, labels = torch.tensor([[0, 1]]).expand(3, -1), torch.tensor([0, 2, -100])
    teacher = TopKTeacher(named, torch.tensor([[-1e-3, -6.0]]).expand(3, -1))
    assert teacher.log_probs.exp().sum(1).min() > 1
    got = made._log_probs_of_labels(teacher, labels)
    torch.testing.assert_close(got, torch.tensor([-1e-3, math.log(1e-6 / 38), 0.0]))


def test_a_step_without_any_label_has_a_loss_of_0(tmp_path):
    student = llama(0)
    made = trainer(tmp_path, student, logging_steps=1, logging_nan_inf_filter=False, max_steps=1)
    for example in made.train_dataset:
        example["labels"] = [-100] * len(example["labels"])
    made.train()
    (logs,) = [logs for logs in made.state.log_history if "loss" in logs]
    assert logs["loss"] == 0 and logs["grad_norm"] == 0
