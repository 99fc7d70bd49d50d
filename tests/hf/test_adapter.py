"""The adapter of DistillationTrainer: its formula, its own learning rate, and scores that are far apart."""

import pytest
import torch
from backends import cpu_only

pytest.importorskip("transformers")
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from amtml_fast.hf import DistillationTrainer
from amtml_fast.hf.trainer import HiddenAdapter

pytestmark = cpu_only


def llama(seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            bos_token_id=None, eos_token_id=None, initializer_range=0.3,
        )
    )  # fmt: skip


def trainer(folder, student, **options):
    torch.manual_seed(0)
    ids = torch.randint(0, 40, (16, 12)).tolist()
    data = [{"input_ids": row, "labels": row} for row in ids]
    args = TrainingArguments(
        str(folder), max_steps=3, learning_rate=1e-4, weight_decay=0.1, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", lr_scheduler_type="linear",
    )  # fmt: skip
    return DistillationTrainer(
        student, args, teachers=[llama(1), llama(2)], weighting="adaptive", train_dataset=data, **options
    )


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
    with pytest.raises(ValueError, match="adapter_learning_rate must be > 0, got 0"):
        trainer(tmp_path, llama(0), adapter_learning_rate=0)
    student = llama(0)
    given = torch.optim.SGD(student.parameters(), lr=0.5)
    made = trainer(tmp_path, student, optimizers=(given, None))
    assert made.create_optimizer() is given and len(given.param_groups) == 1


def test_a_teacher_without_any_weight_leaves_the_gradient_finite(tmp_path):
    student = llama(0)
    made = trainer(tmp_path, student)
    with torch.no_grad():
        student.teacher_adapter.theta.mul_(1e4)
    made.train()
    weights = student.teacher_adapter(torch.randn(50, 16))
    assert (weights == 0).any() and all(p.isfinite().all() for p in student.parameters())
