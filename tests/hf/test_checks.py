"""Arguments and batches that do not fit are named."""

import pytest
import torch
from backends import cpu_only

pytest.importorskip("transformers")
from test_trainer import SIZES, TOKENS, collate, examples, llama, one_step, trainer
from transformers import Gemma2Config, Gemma2ForCausalLM

import amtml_fast as af
from amtml_fast.hf import store_topk

pytestmark = cpu_only


class Tokens:
    def __init__(self, *names):
        self.names = names

    def get_vocab(self):
        return {name: i for i, name in enumerate(self.names)}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(teachers=[]), TypeError, "teachers must be a list of one or more models"),
        (dict(teachers=llama()), TypeError, "teachers must be a list of one or more models"),
        (
            dict(teachers=[torch.nn.Linear(2, 2)]),
            TypeError,
            r"teachers\[0\] must be a causal language model .* got Linear",
        ),
        (
            dict(teachers=[llama(vocab_size=41)]),
            ValueError,
            r"teachers\[0\] must have the student's vocabulary of 40, got 41; .*resize_token_embeddings",
        ),
        (dict(loss=af.MultiTeacherKDLoss()), TypeError, "loss must be a FusedLinearKDLoss, got MultiTeacherKDLoss"),
        (dict(loss=af.FusedLinearKDLoss(reduction="sum")), ValueError, "loss must have reduction='batchmean'"),
        (dict(weighting="learned"), ValueError, "weighting must be one of uniform, adaptive, routed, got 'learned'"),
        (dict(weighting="routed"), ValueError, 'teachers must be two or more with weighting "routed", got 1'),
        (dict(label_smoothing_factor=0.1), ValueError, "args.label_smoothing_factor must be 0 .* got 0.1"),
        (dict(compute_loss_func=print), ValueError, "compute_loss_func must be None"),
        (dict(teacher_tokenizers=[Tokens("a")]), ValueError, "teacher_tokenizers must be one for each of 1 teachers"),
        (
            dict(teacher_tokenizers=[Tokens("a", "c")], processing_class=Tokens("a", "b")),
            ValueError,
            r"teacher_tokenizers\[0\] must have the student's tokens, got 'b' as None, the student's is 1",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(tmp_path, options, error, message):
    teachers = options.get("teachers", [llama(24, 1)])
    rest = {name: value for name, value in options.items() if name != "teachers"}
    with pytest.raises(error, match="DistillationTrainer: " + message):
        trainer(tmp_path, llama(), teachers, **rest)


def test_batches_and_stores_that_do_not_fit_are_named(tmp_path):
    student, teachers = llama(), [llama(24, 1), llama(8, 2)]
    batch = collate(examples(4))
    with pytest.raises(ValueError, match='must have teacher_index with weighting "routed"'):
        one_step(trainer(tmp_path, student, teachers, weighting="routed"), student, batch)
    with pytest.raises(ValueError, match='must not have teacher_index with weighting "uniform"'):
        one_step(
            trainer(tmp_path, student, teachers), student, {**batch, "teacher_index": torch.zeros(4, dtype=torch.long)}
        )
    with pytest.raises(ValueError, match="batches must have labels"):
        made = trainer(tmp_path, student, teachers)
        made.training_step(made.model_wrapped, {n: x for n, x in batch.items() if n != "labels"})
    stored = store_topk(teachers[0], examples(4), tmp_path / "top", k=4, temperature=2.0, data_collator=collate)
    with pytest.raises(ValueError, match=r"must have been stored at temperature 1.0, the loss's, got 2.0"):
        trainer(tmp_path, student, [stored])
    loss = af.FusedLinearKDLoss(temperature=2.0)
    with pytest.raises(TypeError, match="train_dataset must have a length and rows with a StoredTopK, got generator"):
        trainer(tmp_path, student, [stored], (e for e in examples(4)), loss=loss)
    with pytest.raises(ValueError, match=r"train_dataset must have the 4 rows that .* was made of, got 8"):
        trainer(tmp_path, student, [stored], loss=loss)
    with pytest.raises(ValueError, match=r"teachers\[0\] must have the student's softcap of logits None, got 30.0"):
        gemma = Gemma2ForCausalLM(Gemma2Config(hidden_size=16, head_dim=8, **SIZES, **TOKENS))
        trainer(tmp_path, student, [gemma])
    other = [{**e, "input_ids": e["input_ids"][:5], "labels": e["labels"][:5]} for e in examples(4)]
    with pytest.raises(ValueError, match=r"must have .* tokens, as when .* was written, got 5"):
        trainer(tmp_path, student, [stored], other, loss=loss).train()
