"""Students that peft has wrapped: gradients, the adapter of teachers in their checkpoints, what cannot be learned."""

import math
from functools import partial

import pytest
import torch
from backends import cpu_only

pytest.importorskip("peft")
import peft
from accelerate.state import AcceleratorState, DistributedType
from parallel import in_processes
from safetensors.torch import load_file
from tiny_models import (
    assert_same,
    assert_step_of_whole_logits,
    by_whole_logits,
    collate,
    ends_of,
    examples,
    llama,
    trainer,
)

pytestmark = [cpu_only, pytest.mark.filterwarnings("ignore:.*tie_word_embeddings|.*is_gradient_checkpointing")]


def wrapped(targets=("q_proj", "v_proj"), saved=None, tied=False, model=None):
    """A model whose LoRA matrices are not zero, and whose copied layers are not those of the base."""
    model = llama(seed=5, tie_word_embeddings=tied) if model is None else model
    torch.manual_seed(6)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=list(targets), modules_to_save=saved, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_A" not in name:
                p.add_(torch.randn_like(p) * 0.3)
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "options",
    [{}, dict(targets=["q_proj", "embed_tokens"]), dict(saved=["lm_head"]), dict(saved=["lm_head", "embed_tokens"])],
    ids=["attention", "embedding", "output layer", "both"],
)
def test_loss_and_gradients_are_those_of_whole_logits(tmp_path, options, tied):
    student, teachers = wrapped(**options, tied=tied), [llama(24, 1), llama(8, 2)]
    made = trainer(tmp_path, student, teachers)
    grads = assert_step_of_whole_logits(made, student, teachers, collate(examples(4)))
    assert any("lora_A" in name for name in grads)
    assert any("lm_head" in name for name in grads) == ("lm_head" in (options.get("saved") or ()))


def test_a_teacher_may_be_one(tmp_path):
    student, teacher = llama(), wrapped(saved=["lm_head"])
    assert_step_of_whole_logits(trainer(tmp_path, student, [teacher]), student, [teacher], collate(examples(4)))


def test_evaluation_is_plain_cross_entropy(tmp_path):
    student, teachers = wrapped(), [llama(24, 1)]
    made = trainer(tmp_path, student, teachers, evaluated=examples(4, seed=9))
    plain = by_whole_logits(student, teachers, collate(examples(4, seed=9)), alpha=0.0).item()
    assert math.isclose(made.evaluate()["eval_loss"], plain, rel_tol=1e-5)


TEACHERS = ((24, 1), (8, 2))
SAVING = dict(weighting="adaptive", max_steps=4, save_strategy="steps", save_steps=2, lr_scheduler_type="constant")


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_a_resumed_training_has_the_same_bits(tmp_path, saved):
    def run(folder, resume=None):
        student = wrapped(saved=saved)
        made = trainer(folder, student, [llama(*t) for t in TEACHERS], **SAVING)
        starts = ends_of(student)
        made.train(resume_from_checkpoint=resume)
        return starts, ends_of(student)

    starts, whole = run(tmp_path / "a")
    _, resumed = run(tmp_path / "b", str(tmp_path / "a" / "checkpoint-2"))
    assert "teacher_adapter.v" in whole and all(torch.equal(whole[n], resumed[n]) for n in whole)
    trained = {n for n in whole if not torch.equal(whole[n], starts[n])}
    own = ("lora_A", "lora_B", "teacher_adapter", "modules_to_save")
    assert trained == {n for n in whole if any(name in n for name in own)}
    again = peft.PeftModel.from_pretrained(llama(seed=5, tie_word_embeddings=False), tmp_path / "a" / "checkpoint-4")
    assert all(torch.equal(p, whole[n]) for n, p in again.named_parameters())
    (tmp_path / "a" / "checkpoint-2" / "teacher_adapter.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"resume_from_checkpoint must have teacher_adapter.safetensors, .* got"
    ):
        run(tmp_path / "c", str(tmp_path / "a" / "checkpoint-2"))


def one_or_two_processes(folder, batch_size, resume=None, **options):
    student = wrapped()
    torch.manual_seed(7)  # the adapter's
    made = trainer(
        folder, student, [llama(*t) for t in TEACHERS], per_device_train_batch_size=batch_size, **SAVING, **options
    )
    made.train(resume_from_checkpoint=resume)
    ends = {n: p.detach() for n, p in student.named_parameters() if p.requires_grad}
    return made, {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in ends.items()}


KINDS = ("SHARDED_STATE_DICT", "FULL_STATE_DICT")


def sharded(folder, rank):
    """Parameters after a training, in each of two processes, that was resumed to the same bits."""
    init = AcceleratorState.__init__

    def on_a_cpu(self, *args, fsdp_plugin=None, **options):  # where accelerate has no FSDP
        init(self, *args, fsdp_plugin=fsdp_plugin, **options)
        self.fsdp_plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")

    AcceleratorState.__init__ = on_a_cpu
    AcceleratorState.distributed_type = property(lambda self: DistributedType.FSDP, lambda self, kind: None)
    ends = {}
    for kind in KINDS:
        config = dict(version=2, transformer_layer_cls_to_wrap=["LlamaDecoderLayer"], state_dict_type=kind)
        options = dict(fsdp=True, fsdp_config=config)
        _, ends[kind] = one_or_two_processes(folder / kind, 2, **options)
        _, resumed = one_or_two_processes(folder / "again", 2, str(folder / kind / "checkpoint-2"), **options)
        assert all(torch.equal(ends[kind][n], resumed[n]) for n in resumed), kind
    return ends


def test_sharded_trainings_keep_the_adapter(tmp_path):
    ends, _ = in_processes(2, partial(sharded, tmp_path), tmp_path)
    made, want = one_or_two_processes(tmp_path / "one", 4)
    for kind in KINDS:
        assert_same(ends[kind], want, 1e-4)
        kept = load_file(tmp_path / kind / "checkpoint-4" / "teacher_adapter.safetensors")
        assert_same(kept, made.output_layer.model.teacher_adapter.state_dict(), 1e-4)


def test_the_best_checkpoint_is_loaded_with_its_adapter(tmp_path):
    student = wrapped()
    made = trainer(
        tmp_path, student, [llama(*t) for t in TEACHERS], evaluated=examples(4, seed=9), eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True, **SAVING,
    )  # fmt: skip
    made.train()
    assert made.state.best_model_checkpoint.endswith("checkpoint-2")
    best, last = (load_file(tmp_path / f"checkpoint-{step}" / "teacher_adapter.safetensors") for step in (2, 4))
    now = student.teacher_adapter.state_dict()
    assert all(torch.equal(now[name], best[name]) for name in now) and not torch.equal(now["v"], last["v"])


def test_an_adapter_learned_before_peft_goes_on(tmp_path):
    student, teachers = llama(tie_word_embeddings=False), [llama(*t) for t in TEACHERS]
    trainer(tmp_path, student, teachers, weighting="adaptive").train()
    learned = student.teacher_adapter
    before = learned.theta.detach().clone()
    student = wrapped(model=student)
    assert not learned.theta.requires_grad  # peft froze it with the rest
    made = trainer(tmp_path, student, teachers, **SAVING)
    assert student.teacher_adapter is learned and torch.equal(learned.theta, before)
    made.train()
    assert not torch.equal(learned.theta, before)


@pytest.mark.parametrize("role", ["model", r"teachers\[0\]"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_changed_output_layer_is_named(tmp_path, role, tied):
    changed = wrapped(["q_proj", "lm_head"], tied=tied)
    student, teacher = (changed, llama(24, 1)) if role == "model" else (llama(), changed)
    message = (
        f"{role} must be .* an nn.Linear, got PeftModelForCausalLM with peft's Linear; peft may have .* modules_to_save"
    )
    with pytest.raises(TypeError, match="DistillationTrainer: " + message):
        trainer(tmp_path, student, [teacher])


def test_tokens_that_are_not_of_the_text_are_named(tmp_path):
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with pytest.raises(
        ValueError, match=r"model must give its output layer's results as they are, .* got PeftModelForCausalLM"
    ):
        trainer(tmp_path, peft.get_peft_model(llama(), config), [llama(24, 1)])


def test_the_output_layer_is_the_one_of_the_active_adapter(tmp_path):
    student, teachers, batch = wrapped(saved=["lm_head"]), [llama(24, 1)], collate(examples(4))
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    student.add_adapter("other", config)
    student.add_adapter("without", peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for layer in student.base_model.model.lm_head.modules_to_save.values():
        torch.nn.init.normal_(layer.weight)
    made = trainer(tmp_path, student, teachers)
    for adapter in ("other", "without", "default"):
        student.set_adapter(adapter)
        student.zero_grad()
        assert_step_of_whole_logits(made, student, teachers, batch)


def test_a_teacher_whose_adapter_is_off_is_its_base(tmp_path):
    student, teacher, batch = llama(), wrapped(saved=["lm_head"]), collate(examples(4))
    made = trainer(tmp_path, student, [teacher])
    with teacher.disable_adapter():
        assert_step_of_whole_logits(made, student, [teacher], batch)


def test_trained_tokens_of_a_tied_embedding_are_named(tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2], task_type="CAUSAL_LM")
    message = "with peft's TrainableTokensWrapper; trainable_token_indices .* tie_word_embeddings"
    with pytest.raises(TypeError, match=message):
        trainer(tmp_path, peft.get_peft_model(llama(), config), [llama(24, 1)])
    student, teachers = peft.get_peft_model(llama(tie_word_embeddings=False), config), [llama(24, 1)]
    made = trainer(tmp_path, student, teachers)
    grads = assert_step_of_whole_logits(made, student, teachers, collate(examples(4)))
    assert any("trainable_tokens" in name for name in grads)


def test_the_base_of_the_student_is_no_teacher(tmp_path):
    student = wrapped()
    with pytest.raises(ValueError, match=r"teachers\[0\] must have parameters of its own, got .*lora_.* of model"):
        trainer(tmp_path, student, [student.get_base_model()])
