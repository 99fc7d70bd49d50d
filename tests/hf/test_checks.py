"""Arguments and batches that do not fit are named."""

import pytest
import torch
from backends import cpu_only
from tiny_models import (
    SIZES,
    TOKENS,
    C,
    assert_same,
    assert_step_of_whole_logits,
    collate,
    examples,
    grads_of,
    llama,
    one_step,
    trainer,
)
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

import amtml_fast as af
from amtml_fast.hf import StoredTopK, store_topk
from amtml_fast.hf.output_layer import NAME

pytestmark = cpu_only


class Tokens:
    def __init__(self, *names):
        self.names = names

    def get_vocab(self):
        return {name: i for i, name in enumerate(self.names)}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(teachers=[]), ValueError, "teachers must be a list of one or more models or StoredTopK, got none"),
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
        (dict(loss=af.FusedLinearKDLoss(ignore_index=0)), ValueError, "loss must have ignore_index=-100, .* got 0"),
        (dict(loss=af.FusedLinearKDLoss(logit_scale=2.0)), ValueError, "loss must have logit_scale=1.0, .* got 2.0"),
        (dict(loss=af.FusedLinearKDLoss(softcap=30.0)), ValueError, "loss must have softcap=None, .* got 30.0"),
        (dict(weighting="learned"), ValueError, "weighting must be one of uniform, adaptive, routed, got 'learned'"),
        (dict(weighting="routed"), ValueError, 'teachers must be two or more with weighting "routed", got 1'),
        (dict(adapter_learning_rate="fast"), TypeError, "adapter_learning_rate must be a number .* got 'fast'"),
        (dict(adapter_learning_rate=float("inf")), ValueError, "adapter_learning_rate must be a number .* got inf"),
        (dict(label_smoothing_factor=0.1), ValueError, "args.label_smoothing_factor must be 0 .* got 0.1"),
        (dict(compute_loss_func=print), ValueError, "compute_loss_func must be None"),
        (dict(model_init=llama), ValueError, "model_init must be None, got a function: give the student as `model`"),
        (
            dict(teacher_tokenizers=[Tokens("a")] * 2, processing_class=Tokens("a")),
            ValueError,
            "teacher_tokenizers must be one for each of 1 teachers, beside processing_class, got 2",
        ),
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


def test_several_gpus_of_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 1)
    trainer(tmp_path, llama(), [llama(24, 1)])
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(
        ValueError, match=r"args.n_gpu must be at most 1, one GPU a process, got 2; start it by torchrun"
    ):
        trainer(tmp_path, llama(), [llama(24, 1)])


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
    with pytest.raises(ValueError, match=r"teachers\[1\] must have the student's vocabulary of 41, got 40"):
        trainer(tmp_path, llama(vocab_size=41), [llama(24, 1, vocab_size=41), stored])
    for row in (-1, 4):
        with pytest.raises(IndexError, match=rf"StoredTopK: row must be in \[0, 4\), got {row}"):
            stored[row]
    with pytest.raises(
        FileNotFoundError, match=r"StoredTopK: folder must be one that store_topk has written, got .*none"
    ):
        StoredTopK(tmp_path / "none")
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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(k=0), ValueError, "k must be an int from 1 to 40, got 0"),
        (dict(temperature=0), ValueError, "temperature must be a number .* got 0"),
        (dict(temperature=float("inf")), ValueError, "temperature must be a number .* got inf"),
        (dict(temperature="1"), TypeError, "temperature must be a number .* got '1'"),
        (dict(batch_size=0), ValueError, "batch_size must be an int >= 1, got 0"),
        (dict(dataset=[]), ValueError, "dataset must have at least one row, got none"),
        (dict(dataset=(e for e in ())), TypeError, "dataset must have a length and rows, got generator"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_store_names_bad_input_and_writes_nothing(tmp_path, options, error, message):
    given = dict(dataset=examples(4), k=4, data_collator=collate) | options
    with pytest.raises(error, match="store_topk: " + message):
        store_topk(llama(24, 1), given.pop("dataset"), tmp_path / "top", **given)
    assert not (tmp_path / "top").exists()


def sources(kinds, folder):
    """Teachers by letters: a model, a store of 8 of 40 classes, a store of all."""
    data = examples(4)
    made = []
    for i, kind in enumerate(kinds):
        teacher = llama(24, i + 1)
        if kind != "m":
            k = {"s": 8, "S": C}[kind]
            teacher = store_topk(teacher, data, folder / f"{i}{kind}", k=k, data_collator=collate)
        made.append(teacher)
    return made


@pytest.mark.parametrize("kinds", ["m", "s", "S", "ss", "sm", "sS", "SS", "ssm"])
@pytest.mark.parametrize("weighting", ["uniform", "adaptive", "routed"])
def test_what_would_be_infinite_is_refused_and_nothing_else(tmp_path, kinds, weighting, monkeypatch):
    if weighting == "routed" and len(kinds) == 1:
        return
    teachers, refused = sources(kinds, tmp_path), []
    data = [dict(e, teacher_index=i % len(kinds)) if weighting == "routed" else e for i, e in enumerate(examples(4))]
    for mode in ("mixture", "sum", "logits"):
        for divergence in ("forward_kl", "reverse_kl", "skew_reverse_kl"):
            for alpha in (0.0, 0.5):
                loss = af.FusedLinearKDLoss(temperature=1.0, alpha=alpha, mode=mode, divergence=divergence)
                options, student = dict(data=data, loss=loss, weighting=weighting), llama()
                try:
                    made = trainer(tmp_path, student, teachers, **options)
                except ValueError as error:
                    assert f"{NAME}: loss must have " in str(error) and f", got {divergence=!s}, {mode=!s}" in str(
                        error
                    )
                    refused.append((mode, divergence, alpha))
                    with monkeypatch.context() as patch:
                        patch.setattr("amtml_fast.hf.trainer.check_divergence", lambda *_: None)
                        made = trainer(tmp_path, student, teachers, **options)
                    finite = False
                else:
                    finite = True
                batch = next(iter(made.get_train_dataloader()))
                assert one_step(made, student, batch)[0].isfinite() == finite, (mode, divergence, alpha)
    modes = {"mixture", "sum", "logits"} if weighting == "routed" or not {*kinds} & {"m", "S"} else {"sum", "logits"}
    want = {(mode, "reverse_kl", 0.5) for mode in modes} if "s" in kinds else set()
    if kinds.count("s") > 1 and weighting != "routed":
        want |= {("logits", divergence, 0.5) for divergence in ("forward_kl", "reverse_kl", "skew_reverse_kl")}
    assert set(refused) == want


def shares_a_layer():
    teacher, student = llama(16, 1), llama()
    student.model.layers = teacher.model.layers
    return student, teacher, "model.layers.0.self_attn.q_proj.weight and 8 others"


def is_the_student():
    student = llama()
    return student, student, "model.embed_tokens.weight and 10 others"


def shares_a_frozen_output_layer():
    teacher, student = llama(16, 1), llama()
    student.lm_head = teacher.lm_head.requires_grad_(False)
    return student, teacher, "the output layer"


@pytest.mark.parametrize("make", [shares_a_layer, is_the_student, shares_a_frozen_output_layer])
def test_a_teacher_that_shares_what_the_student_trains_is_named(tmp_path, make):
    student, teacher, shared = make()
    other = llama(24, 1)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    with pytest.raises(
        ValueError, match=rf"teachers\[1\] must have parameters of its own, got {shared} of model, .*deepcopy"
    ):
        trainer(tmp_path, student, [other, teacher])
    assert trained == {name for name, p in student.named_parameters() if p.requires_grad}


def test_a_frozen_embedding_may_be_shared(tmp_path):
    teacher, student = (llama(16, seed, tie_word_embeddings=False) for seed in (1, 0))
    student.model.embed_tokens = teacher.model.embed_tokens.requires_grad_(False)
    assert_step_of_whole_logits(trainer(tmp_path, student, [teacher]), student, [teacher], collate(examples(4)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_layers_may_be_shared_and_drop_nothing_of_the_teacher(tmp_path, checkpointing):
    options = dict(num_hidden_layers=2, tie_word_embeddings=False, attention_dropout=0.5)
    student, teacher, batch = llama(**options), llama(seed=1, **options), collate(examples(4))
    student.model.layers[0] = teacher.model.layers[0].requires_grad_(False)
    made = trainer(tmp_path, student, [teacher], gradient_checkpointing=checkpointing)
    torch.manual_seed(2)
    got, grads = one_step(made, student, batch)
    assert student.model.layers[0].self_attn.training
    student.zero_grad()
    if checkpointing:
        student.gradient_checkpointing_disable()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        right = teacher.eval()(**inputs).logits[:, :-1].reshape(-1, C)
    torch.manual_seed(2)
    logits = student.train()(**inputs).logits[:, :-1].reshape(-1, C)
    labels = batch["labels"][:, 1:].reshape(-1)
    want = af.reference.multi_teacher_kd_loss(logits, [right], None, labels, temperature=1.0, alpha=0.5)
    want.backward()
    torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=0)
    assert_same(grads, grads_of(student))


def test_models_that_return_tuples_are_named(tmp_path):
    tuples = llama(24, 1)
    tuples.config.return_dict = False
    message = " must have config.return_dict=True, got False"
    with pytest.raises(ValueError, match="DistillationTrainer: model" + message):
        trainer(tmp_path, tuples, [llama()])
    with pytest.raises(ValueError, match=r"DistillationTrainer: teachers\[0\]" + message):
        trainer(tmp_path, llama(), [tuples])
    with pytest.raises(ValueError, match="store_topk: teacher" + message):
        store_topk(tuples, examples(4), tmp_path / "top", k=4, data_collator=collate)


def test_numbers_of_teachers_that_do_not_fit_are_named(tmp_path):
    student, batch = llama(), collate(examples(4))
    made = trainer(tmp_path, student, [llama(24, 1), llama(8, 2)], weighting="routed")
    for shape in ((3,), (4, 5), (4, 1)):
        index = torch.zeros(shape, dtype=torch.int64)
        message = rf"batches must have teacher_index \[4\] or \[4, 12\], as their labels are, got {list(shape)}"
        with pytest.raises(ValueError, match=message.replace("got [", r"got \[")):
            one_step(made, student, {**batch, "teacher_index": index})


def bart():
    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    return BartForConditionalGeneration(BartConfig(vocab_size=C, decoder_start_token_id=2, **sizes, **TOKENS))


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=C, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def bert():
    return BertForMaskedLM(
        BertConfig(vocab_size=C, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, **TOKENS)
    )


@pytest.mark.parametrize(
    "make, what",
    [(bart, "an encoder-decoder"), (t5, "an encoder-decoder"), (bert, "whose tokens see those after them")],
)
def test_models_that_are_not_causal_are_named(tmp_path, make, what):
    """BART takes input_ids alone, and would teach its decoder what it has read before; BERT has read the next token."""
    model, got = make(), f"must be a causal language model, got {make().__class__.__name__}, {what}"
    with pytest.raises(TypeError, match="DistillationTrainer: model " + got):
        trainer(tmp_path, model, [llama()])
    with pytest.raises(TypeError, match=r"DistillationTrainer: teachers\[1\] " + got):
        trainer(tmp_path, llama(), [llama(24, 1), model])
    with pytest.raises(TypeError, match="store_topk: teacher " + got):
        store_topk(model, examples(2), tmp_path / "top", k=2, data_collator=collate)
    assert not (tmp_path / "top").exists()


class Normed(torch.nn.Linear):
    """As some models have it: the rows of its weight are made one long, and logits are of those."""

    def forward(self, hidden):
        return torch.nn.functional.linear(hidden, torch.nn.functional.normalize(self.weight))


def test_output_layers_with_a_forward_of_their_own_are_named(tmp_path):
    model = llama(tie_word_embeddings=False)
    model.lm_head = Normed(16, C, bias=False)
    got = r"must be .* an nn.Linear, got LlamaForCausalLM with test_checks.Normed, whose forward is its own"
    with pytest.raises(TypeError, match="DistillationTrainer: model " + got):
        trainer(tmp_path, model, [llama()])
    with pytest.raises(TypeError, match=r"DistillationTrainer: teachers\[0\] " + got):
        trainer(tmp_path, llama(), [model])
    with pytest.raises(TypeError, match="store_topk: teacher " + got):
        store_topk(model, examples(2), tmp_path / "top", k=2, data_collator=collate)
