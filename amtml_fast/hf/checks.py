"""What ``DistillationTrainer`` says of arguments that do not fit."""

from collections.abc import Sequence
from typing import Any

from transformers import TrainingArguments

from amtml_fast import checks
from amtml_fast.hf.output_layer import NAME, OutputLayer
from amtml_fast.hf.topk_store import StoredTopK
from amtml_fast.losses import FusedLinearKDLoss

WEIGHTING = ("uniform", "adaptive", "routed")


def check_arguments(
    args: TrainingArguments, teachers: Any, loss: Any, weighting: str, tokenizers: Any, kwargs: dict
) -> None:
    wanted = "a list of one or more models or StoredTopK"
    if not isinstance(teachers, (list, tuple)):
        raise TypeError(f"{NAME}: teachers must be {wanted}, got {type(teachers).__name__}")
    if not teachers:
        raise ValueError(f"{NAME}: teachers must be {wanted}, got none")
    if not isinstance(loss, FusedLinearKDLoss):
        raise TypeError(f"{NAME}: loss must be a FusedLinearKDLoss, got {type(loss).__name__}")
    set_here = dict(reduction="batchmean", ignore_index=-100, logit_scale=1.0, softcap=None)
    for name, value in set_here.items():
        if loss.options[name] != value:
            raise ValueError(
                f"{NAME}: loss must have {name}={value!r}, which the trainer sets, got {loss.options[name]!r}"
            )
    checks.one_of(NAME, "weighting", weighting, WEIGHTING)
    if weighting == "routed" and len(teachers) == 1:
        raise ValueError(f'{NAME}: teachers must be two or more with weighting "routed", got 1')
    if args.n_gpu > 1:
        raise ValueError(
            f"{NAME}: args.n_gpu must be at most 1, one GPU a process, got {args.n_gpu}; start it by torchrun or accelerate launch"
        )
    if args.label_smoothing_factor:
        given = args.label_smoothing_factor
        raise ValueError(f"{NAME}: args.label_smoothing_factor must be 0 (the loss has label_smoothing), got {given}")
    if kwargs.get("compute_loss_func") is not None:
        raise ValueError(f"{NAME}: compute_loss_func must be None, got a function: the loss is `loss`")
    if kwargs.get("model_init") is not None:
        raise ValueError(f"{NAME}: model_init must be None, got a function: give the student as `model`")
    if tokenizers is None:
        return
    own = kwargs.get("processing_class")
    if own is None or len(tokenizers) != len(teachers):
        raise ValueError(
            f"{NAME}: teacher_tokenizers must be one for each of {len(teachers)} teachers, beside processing_class, "
            f"got {len(tokenizers)}"
        )
    vocabulary = own.get_vocab()
    for t, tokenizer in enumerate(tokenizers):
        others = tokenizer.get_vocab()
        if others != vocabulary:
            token = min((x for x in {*vocabulary, *others} if vocabulary.get(x) != others.get(x)), key=str)
            raise ValueError(
                f"{NAME}: teacher_tokenizers[{t}] must have the student's tokens, got {token!r} as {others.get(token)}, the "
                f"student's is {vocabulary.get(token)}; distil from text that this teacher writes, or choose a teacher of one family"
            )


def check_teachers(student: OutputLayer, sources: Sequence[OutputLayer | StoredTopK], loss: FusedLinearKDLoss) -> None:
    if student.is_offloaded:  # its gradients would be those of copies
        raise ValueError(f"{NAME}: model must have all its parameters on a device, got a model with offloaded ones")
    trained = {id(p): name for name, p in student.model.named_parameters() if p.requires_grad}
    for i, source in enumerate(sources):
        name = f"teachers[{i}]"
        if source.classes != student.classes:
            raise ValueError(
                f"{NAME}: {name} must have the student's vocabulary of {student.classes}, got {source.classes}; where the tokenizer "
                "is one and only padding differs, model.resize_token_embeddings(n) makes them equal"
            )
        if isinstance(source, StoredTopK):
            if source.temperature != loss.options["temperature"]:
                wanted = f"temperature {loss.options['temperature']}, the loss's"
                raise ValueError(f"{NAME}: {name} must have been stored at {wanted}, got {source.temperature}")
            own = loss.options["teacher_temperature"]
            if isinstance(own, Sequence):
                own = own[i] if len(own) == len(sources) else None  # what is wrong with it, the loss says
            if own not in (None, source.temperature):
                raise ValueError(
                    f"{NAME}: loss must have teacher_temperature {source.temperature}, or none, for {name}, a StoredTopK: it holds its teacher "
                    f"at this one temperature, the loss's; got {own}"
                )
            continue
        shared = [trained[id(p)] for p in source.model.parameters() if id(p) in trained]
        if shared or source.layer is student.layer:  # teachers are frozen, and hidden states caught at the layer
            what = (shared[0] + f" and {len(shared) - 1} others") if shared else "the output layer"
            raise ValueError(
                f"{NAME}: {name} must have parameters of its own, got {what} of model, which would not be trained any more; "
                "copy.deepcopy(teacher), or load it a second time"
            )
        if source.softcap != student.softcap:
            raise ValueError(
                f"{NAME}: {name} must have the student's softcap of logits {student.softcap}, got {source.softcap}; "
                "store_topk makes it a teacher that any student can take"
            )


def check_divergence(sources: Sequence[OutputLayer | StoredTopK], loss: FusedLinearKDLoss, weighting: str) -> None:
    """A store gives all but its k classes no probability: there some losses are infinite or NaN, for every token or for most."""
    divergence, mode = loss.options["divergence"], loss.options["mode"]
    classes = sources[0].classes
    unnamed = [classes - source.k if isinstance(source, StoredTopK) else 0 for source in sources]
    if not any(unnamed) or loss.options["alpha"] == 0:
        return
    got = f"got divergence={divergence}, mode={mode} and teachers[{unnamed.index(max(unnamed))}], a StoredTopK of {classes - max(unnamed)}"
    if divergence == "reverse_kl" and (weighting == "routed" or mode != "mixture" or all(unnamed)):
        mixed = ', and so is mode="mixture" with a model among the teachers' if weighting != "routed" else ""
        raise ValueError(
            f"{NAME}: loss must have a divergence that is finite where a target lacks classes of the student, {got} of {classes} "
            f'classes; "skew_reverse_kl" and "jsd" are{mixed}'
        )
    if mode == "logits" and weighting != "routed" and sum(unnamed) >= classes:  # no class may be left
        raise ValueError(
            f"{NAME}: loss must have a mode that mixes teachers of different classes, {got} of {classes} classes beside another one; "
            'mode="mixture" or "sum" does'
        )
