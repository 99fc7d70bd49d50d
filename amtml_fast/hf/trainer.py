"""A ``transformers.Trainer`` whose student learns from several teachers, by hidden states: no model's logits are held."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import PreTrainedModel, Trainer, TrainingArguments

from amtml_fast import checks
from amtml_fast.hf.adapter import HiddenAdapter, adapter_of
from amtml_fast.hf.checks import check_arguments, check_divergence, check_teachers
from amtml_fast.hf.output_layer import NAME, OutputLayer, gathered, text_config
from amtml_fast.hf.topk_store import ROW, StoredTopK, WithRows, check_rows
from amtml_fast.losses import FusedLinearKDLoss
from amtml_fast.terms import KDStats, LinearTeacher, TopKTeacher, over_items

_ADAPTER = "teacher_adapter"
_CHUNK = 1 << 24  # logits at a time where teachers are asked for the labels' probabilities


class DistillationTrainer(Trainer):
    """Trains a causal language model on labels and teachers; ``fused_linear_kd_loss`` of hidden states and output layers.

    Args:
        model: the student, a causal language model of transformers.
        args: ``TrainingArguments``. ``label_smoothing_factor`` is to be 0: it is the loss's own ``label_smoothing``.
        teachers: a list of T teachers of the student's vocabulary, each a causal language model (of any hidden size; frozen,
            in eval mode; one that accelerate has dispatched or offloaded stays where it is), or a ``StoredTopK`` of the
            training set, made by ``store_topk`` at the loss's temperature.
        loss: a ``FusedLinearKDLoss``; None: temperature 1, alpha 0.5. Its ``logit_scale`` and ``softcap`` are the models'.
        weighting: how much a teacher counts for a token.

            - ``"uniform"``: 1 / T.
            - ``"adaptive"``: what a ``HiddenAdapter`` makes of the student's last hidden state h,
              ``w = softmax_t v . (theta_t * silu(project(layer_norm(h))))``. Labels train it: its loss is
              ``-log sum_t w_t p_t(label)``, the mean of tokens; the distillation takes its weights as they are. p_t is at
              temperature 1, of a ``StoredTopK`` at its own.
            - ``"routed"``: the batch says by ``teacher_index``, one number a row of the batch or a token, which teacher alone
              counts. Of a teacher only its own tokens' products are made.
        adapter_learning_rate: that of the adapter, which starts from nothing, with the student's schedule and no weight decay. At the
            rates at which language models are tuned, 5e-5 and less, its weights would stay uniform.
        teacher_tokenizers: one for each teacher, or None. They are compared with ``processing_class``: all have to be one.
        kwargs: those of ``Trainer``.

    Labels are those of the tokens themselves, or ``shift_labels`` those of the tokens after them. A student whose own loss does not move
    labels, as the decoders of encoder-decoders (``BartForCausalLM``), is given ``labels`` that are moved already, as it is by transformers.

    Tokens with label -100 do not count. The loss is divided by the tokens of all batches of a step, on all processes, as
    transformers counts them. A mixture of experts that gives the loss of its routers (``output_router_logits=True``) has it added, by
    its own coefficient. ``evaluate`` gives the student's own loss, which is plain cross-entropy but for that.

    Where a step is logged, so are for each teacher the mean weight and KL, and the entropies of weights, student and target (nats):
    those of this step's tokens, where ``loss`` is the mean of all steps since the last log. They are made in the step, which has
    to know that it will be logged: one that only a callback asks for has none, and neither has the last step of an epoch of a
    stream (a data set without a length) whose last batches are too few for one more.

    The adapter is a part of the model, ``model.teacher_adapter``: it is trained, saved and resumed with it, and ``from_pretrained``
    leaves it out. Of a peft model it is a file of the checkpoint, ``teacher_adapter.safetensors``. A later adaptive trainer of
    the same model goes on with what it has learned, and is to be given as many teachers, in the same order. After
    ``model.teacher_adapter = None`` it starts a new one.

    peft's LoRA may be on any layer but the output layer, which may be in its ``modules_to_save``.

    Raises:
        TypeError, ValueError: an argument that does not fit, before anything is trained.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments | None = None,
        *,
        teachers: Sequence[PreTrainedModel | StoredTopK],
        loss: FusedLinearKDLoss | None = None,
        weighting: str = "uniform",
        adapter_learning_rate: float = 1e-3,
        teacher_tokenizers: Sequence[Any] | None = None,
        **kwargs: Any,
    ):
        loss = FusedLinearKDLoss(temperature=1.0, alpha=0.5) if loss is None else loss
        args = TrainingArguments() if args is None else args
        check_arguments(args, teachers, loss, weighting, teacher_tokenizers, kwargs)
        checks.number(NAME, "adapter_learning_rate", adapter_learning_rate, *checks.POSITIVE)
        self.output_layer = OutputLayer(model, f"{NAME}: model")
        self.sources = [
            t if isinstance(t, StoredTopK) else OutputLayer(t, f"{NAME}: teachers[{i}]") for i, t in enumerate(teachers)
        ]
        check_teachers(self.output_layer, self.sources, loss)
        check_divergence(self.sources, loss, weighting)
        self.loss = FusedLinearKDLoss(
            **{**loss.options, "logit_scale": self.output_layer.logit_scale, "softcap": self.output_layer.softcap}
        )
        stores = [s for s in self.sources if isinstance(s, StoredTopK)]
        if stores:
            kwargs["train_dataset"] = WithRows(kwargs.get("train_dataset"), stores)
        self.weighting, self.adapter_learning_rate = weighting, adapter_learning_rate
        adapter = getattr(model, "teacher_adapter", None)
        if weighting == "adaptive":
            given = (kwargs.get("optimizers") or (None, None))[0]
            if adapter is None and given is not None:  # the adapter, not made yet, would stay as it begins
                raise ValueError(
                    f'{NAME}: optimizers must be (None, None) with weighting "adaptive" and a model without adapter, got '
                    f"{type(given).__name__}, which cannot have its parameters; set trainer.optimizer after this, or give "
                    "optimizer_cls_and_kwargs"
                )
            adapter = model.teacher_adapter = adapter_of(adapter, self.output_layer, len(self.sources))
        # Also one that does not learn now: DDP waits for each gradient that is required. And peft freezes what it finds.
        if isinstance(adapter, HiddenAdapter):
            adapter.requires_grad_(weighting == "adaptive")
        self.moves_labels = self.output_layer.moves_labels()
        self.output_layer.return_loss()
        self._sums: Tensor | None = None
        self._summed_step = 0
        self._loaded_from: str | None = None
        super().__init__(model, args, **kwargs)
        config = text_config(self.model)
        if hasattr(config, "use_cache"):
            # A model of texts and images reads this one; transformers has set that of the whole.
            config.use_cache = self.args.use_cache
        self.student_takes_count = self.model_accepts_loss_kwargs
        self.model_accepts_loss_kwargs = True  # the loss does: it is divided by the tokens of all batches of a step
        if stores:
            self.data_collator = _KeepRows(self.data_collator)
        for source in self.sources:
            if isinstance(source, OutputLayer):
                self._prepare_teacher(source)

    def _prepare_teacher(self, source: OutputLayer) -> None:
        teacher = source.model.eval().requires_grad_(False)
        if getattr(teacher, "hf_device_map", None) is None and not source.is_offloaded:
            if self.is_fsdp_enabled:
                self.accelerator.prepare_model(teacher, evaluation_mode=True)
            else:
                teacher.to(self.args.device)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        given = self.optimizer is not None  # which has its own rates
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.weighting != "adaptive" or given:
            return optimizer
        owner: Any = next((model for model in (*args, *kwargs.values()) if model is not None), self.model)
        own = [p for name, p in owner.named_parameters() if "teacher_adapter." in name]
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if not any(p is q for q in own)]
        optimizer.add_param_group({"params": own, "lr": self.adapter_learning_rate, "weight_decay": 0.0})
        if self.is_fsdp_enabled:  # whose sharded checkpoints lose the options of a group without parameters
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    # --- what peft leaves out of a checkpoint: all but its own parameters

    def _is_left_out(self) -> bool:
        return self.weighting == "adaptive" and hasattr(self.output_layer.model, "peft_config")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self._is_left_out() and self.args.should_save:
            whole = self.output_layer.model.state_dict() if state_dict is None else state_dict
            own = {n.split(_ADAPTER + ".")[1]: p.contiguous() for n, p in whole.items() if _ADAPTER + "." in n}
            save_file(own, self._adapter_file(output_dir))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        parts = self.output_layer.model.teacher_adapter.state_dict() if self._is_left_out() else {}
        if any(hasattr(part, "full_tensor") for part in parts.values()):  # of FSDP2, which may not call _save
            own = {name: gathered(part) for name, part in parts.items()}
            if self.args.should_save:
                path = self._adapter_file(output_dir)
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file(own, path)

    def _adapter_file(self, folder: str | None) -> Path:
        return Path(folder or self.args.output_dir or ".") / f"{_ADAPTER}.safetensors"

    def _load_adapter(self, checkpoint: str | None) -> None:
        if self._is_left_out():
            path = Path(checkpoint or "") / f"{_ADAPTER}.safetensors"
            if not path.exists():
                raise FileNotFoundError(
                    f"{NAME}: resume_from_checkpoint must have {path.name}, which adaptive trainers of peft models write, "
                    f"got {checkpoint}"
                )
            whole = StateDictOptions(full_state_dict=True)  # of which each process takes its part
            set_model_state_dict(self.output_layer.model.teacher_adapter, {**load_file(path)}, options=whole)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._loaded_from = resume_from_checkpoint
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_adapter(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._loaded_from = self.state.best_model_checkpoint
        super()._load_best_model()
        self._load_adapter(self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Where transformers would only warn. It writes the experts of a mixture by their names on the Hub, and reads them by those
        of the model (its issue 48805): they would stay as they are, beside all others of the checkpoint."""
        model: Any = self.model
        own = dict(model.named_parameters())
        missing = [name for name in load_result.missing_keys if name in own]
        if missing and isinstance(model, PreTrainedModel):
            read: Any = type(model).from_pretrained  # with the flag it returns two things
            whole, info = read(self._loaded_from, dtype=torch.float32, output_loading_info=True)
            found = dict(whole.named_parameters())
            found = {name: found[name] for name in missing if name in found and name not in info["missing_keys"]}
            model.load_state_dict(found, strict=False)
            load_result = type(load_result)(
                [name for name in load_result.missing_keys if name not in found],
                [name for name in load_result.unexpected_keys if name in info["unexpected_keys"]],
            )
        super()._issue_warnings_after_load(load_result)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns or []
        columns += [c for c in (ROW, "teacher_index", "shift_labels") if c not in columns]

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        rows, index = inputs.pop(ROW, None), inputs.pop("teacher_index", None)
        if not model.training:  # the student alone
            count = num_items_in_batch if self.student_takes_count else None
            return super().compute_loss(model, inputs, return_outputs, count)
        if "labels" not in inputs:
            raise ValueError(f"{NAME}: batches must have labels (-100 where none counts), got {', '.join(inputs)}")
        if (index is None) == (self.weighting == "routed"):
            wanted = "must have teacher_index" if index is None else "must not have teacher_index"
            raise ValueError(f'{NAME}: batches {wanted} with weighting "{self.weighting}", got {", ".join(inputs)}')
        labels = self._next_tokens(inputs)
        if index is not None and index.shape not in (labels.shape, labels.shape[:1]):
            wanted = f"[{len(labels)}] or {list(labels.shape)}, as their labels are"
            raise ValueError(f"{NAME}: batches must have teacher_index {wanted}, got {list(index.shape)}")
        inputs = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        batch = dict(inputs=inputs, rows=rows, index=index, labels=labels, count=num_items_in_batch)
        with self.output_layer.catch(lambda hidden: self._distillation(hidden, **batch)):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Those that the loss counts. Of GPT-2 transformers would count the first label of a row, too, and its older versions
        that of every model; new ones count ``shift_labels`` where a batch has them."""
        if all("labels" in batch for batch in batch_samples):
            labels = [self._next_tokens(batch) for batch in batch_samples]
            batch_samples = [dict(labels=of, shift_labels=of) for of in labels]
        return super()._get_num_items_in_batch(batch_samples, device)

    def _next_tokens(self, batch: dict) -> Tensor:
        """Labels [B, S] of the tokens after these."""
        if batch.get("shift_labels") is not None:
            return batch["shift_labels"]
        return F.pad(batch["labels"][:, 1:], (0, 1), value=-100) if self.moves_labels else batch["labels"]

    def _distillation(
        self, hidden: Tensor, inputs: dict, rows: Tensor | None, index: Tensor | None, labels: Tensor, count: Any
    ) -> Tensor:
        """The loss of the student's hidden states [B, S, H]; labels [B, S] are those of the next tokens."""
        student = self.output_layer
        weight, bias = student.weight, student.bias
        teachers = [self._teach(source, inputs, rows, hidden) for source in self.sources]
        options: dict[str, Any] = dict(student_bias=bias)
        weights, known, of_bare = None, self._known(inputs), labels[:0]
        extra = hidden.new_zeros((), dtype=torch.float32)
        if self.weighting == "routed":
            assert index is not None
            index = options["teacher_index"] = index[:, None].expand_as(labels) if index.dim() == 1 else index
            if known is not None:  # any number where none counts
                known = known.gather(1, index.reshape(-1, 1).long().clamp(0, len(teachers) - 1))
        elif known is not None and self.weighting == "uniform":
            weights = known / known.sum(1, keepdim=True).clamp(min=1)
        if known is not None:  # a token without any teacher is left to its label
            bare = (~known.any(1)).view_as(labels) & (labels != -100)
            count = (labels != -100).sum() if count is None else count
            of_bare = labels[bare]
            labels = labels.masked_fill(bare, -100)
        if self.weighting == "adaptive":
            learned = student.model.teacher_adapter(hidden.detach().reshape(-1, hidden.shape[-1]))
            if known is not None:
                learned = learned * known
                learned = learned / learned.sum(1, keepdim=True).clamp(min=torch.finfo(learned.dtype).tiny)
            extra = self._adapter_loss(learned, teachers, labels, count)
            weights = learned.detach()
        log = self._is_logged()
        loss = FusedLinearKDLoss(**{**self.loss.options, "return_stats": log})(
            hidden, weight, teachers, weights, labels, count, **options
        )
        if log:
            loss, stats = loss
            self._record(stats, weights, options.get("teacher_index"), labels)
        if len(of_bare):
            loss = loss + self._loss_of_labels(hidden[bare], weight, bias, of_bare, count)
        return loss + (extra - extra.detach())  # its gradient; what is logged as the loss is the student's

    def _known(self, inputs: dict) -> Tensor | None:
        """[N, T], which teachers have an answer; None: all. A store has none at padding, whose last token before a text has a label."""
        mask = inputs.get("attention_mask")
        stored = [isinstance(source, StoredTopK) for source in self.sources]
        if mask is None or not any(stored):
            return None
        return (mask.reshape(-1, 1) != 0) | ~torch.tensor(stored, dtype=torch.bool, device=mask.device)

    def _loss_of_labels(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, count: Any
    ) -> Tensor:
        """Of tokens [n] that no teacher answers: the cross-entropy, as it counts beside a distillation of 0."""
        names = ("label_smoothing", "logit_scale", "softcap", "chunk_size", "accumulate", "process_group")
        loss = FusedLinearKDLoss(alpha=0.0, **{name: self.loss.options[name] for name in names})
        anything = TopKTeacher(labels.new_zeros(len(labels), 1), torch.zeros_like(hidden[:, :1], dtype=torch.float32))
        of_labels = loss(hidden, weight, [anything], None, labels, count, student_bias=bias)
        return (1 - self.loss.options["alpha"]) * of_labels

    def _teach(self, source: OutputLayer | StoredTopK, inputs: dict, rows: Tensor | None, hidden: Tensor) -> Any:
        if isinstance(source, StoredTopK):
            if rows is None:
                raise ValueError(
                    f"{NAME}: train_dataset must be given when the trainer is made, with a StoredTopK, got one that was set later, or a "
                    "data loader without its rows"
                )
            return source.batch(rows, inputs, hidden.device)
        teacher = source.teach(inputs, hidden.device)
        if source.logit_scale == self.output_layer.logit_scale:
            return teacher
        factor = source.logit_scale / self.output_layer.logit_scale  # logits are scaled by the student's number
        return LinearTeacher(
            teacher.hidden * factor, teacher.weight, None if teacher.bias is None else teacher.bias * factor
        )

    def _adapter_loss(self, weights: Tensor, teachers: list, labels: Tensor, count: Any) -> Tensor:
        """``-log sum_t w_t p_t(label)``, by the tokens that count; 0 of a label that no teacher has."""
        labels = labels.reshape(-1).long()
        given = torch.stack([self._log_probs_of_labels(teacher, labels) for teacher in teachers], 1)
        weights = weights.clamp(min=torch.finfo(weights.dtype).tiny)  # the gradient of log(0) would be NaN
        counted = labels != -100
        without = (given == -torch.inf).all(1)
        rows = -(weights.log() + given.masked_fill(without.unsqueeze(1), 0)).logsumexp(1)
        return over_items(rows.masked_fill(~counted | without, 0).sum(), counted.sum() if count is None else count)

    @torch.no_grad()
    def _log_probs_of_labels(self, teacher: Any, labels: Tensor) -> Tensor:
        """[N] at temperature 1, or as they are stored; 0 where the label does not count."""
        counted = labels != -100
        if isinstance(teacher, TopKTeacher):
            named, given = (x.reshape(len(labels), -1) for x in teacher)
            given = given.float()
            others = (1 - given.exp().sum(1)).clamp(min=1e-6) / max(self.output_layer.classes - named.shape[1], 1)
            own = given.masked_fill(named != labels.unsqueeze(1), -torch.inf).logsumexp(1)
            return torch.where(own == -torch.inf, others.log(), own).masked_fill(~counted, 0)
        scale, cap = self.output_layer.logit_scale, self.output_layer.softcap
        rows = teacher.hidden.reshape(len(labels), -1)
        made = []
        size = max(_CHUNK // self.output_layer.classes, 1)
        for some, of in zip(rows.split(size), labels.split(size)):
            logits = F.linear(some, teacher.weight, teacher.bias).float() * scale
            logits = logits if cap is None else cap * (logits / cap).tanh()
            made.append(-F.cross_entropy(logits, of, ignore_index=-100, reduction="none"))
        return torch.cat(made)

    # --- what is logged

    def _is_logged(self) -> bool:
        """Whether this step will be logged, as far as that is known before it ends."""
        step, every, args = self.state.global_step + 1, self.state.logging_steps or 0, self.args
        if args.logging_first_step and step == 1:
            return True
        if args.logging_strategy == "epoch":  # whose last batch was taken
            batches = self.accelerator.gradient_state
            return step == self.state.max_steps or batches.end_of_dataloader or not batches.in_dataloader
        return args.logging_strategy == "steps" and every > 0 and step % every == 0

    def _record(self, stats: KDStats, weights: Tensor | None, index: Tensor | None, labels: Tensor) -> None:
        """Sums over the tokens of this step that count, on the device."""
        teachers, step = len(self.sources), self.state.global_step + 1
        counted = (labels != -100).reshape(-1)
        if index is not None:  # any number where none counts
            weights = F.one_hot(index.reshape(-1).long().masked_fill(~counted, 0), teachers).float()
        elif weights is None:
            weights = stats.teacher_kl.new_full((1, teachers), 1 / teachers).expand(len(counted), -1)
        entropy = torch.special.entr(weights).sum(1)
        columns = [
            torch.ones_like(entropy), stats.student_entropy.reshape(-1), stats.target_entropy.reshape(-1), entropy,
            *weights.unbind(1), *stats.teacher_kl.reshape(-1, teachers).unbind(1),
        ]  # fmt: skip
        sums = torch.stack([c.float().masked_fill(~counted, 0).sum() for c in columns])
        self._sums = sums if self._sums is None or self._summed_step != step else self._sums + sums
        self._summed_step = step

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._sums is not None and self._summed_step == self.state.global_step and "loss" in logs:
            sums = self.accelerator.reduce(self._sums, "sum").tolist()
            count, means = max(sums[0], 1), sums[1:]
            teachers = range(len(self.sources))
            names = ["student_entropy", "target_entropy", "weight_entropy"]
            names += [f"teacher_{t}_weight" for t in teachers] + [f"teacher_{t}_kl" for t in teachers]
            logs = {**logs, **{name: value / count for name, value in zip(names, means)}}
            self._sums = None
        super().log(logs, *args, **kwargs)


class _KeepRows:
    """A collator that leaves out the number of the row, and puts it into the batch again."""

    def __init__(self, collate: Any):
        self.collate = collate

    def __call__(self, examples: list[dict]) -> dict:
        rows = [example.get(ROW) for example in examples]
        batch = self.collate([{name: value for name, value in e.items() if name != ROW} for e in examples])
        if rows[0] is not None:
            check_rows(NAME, batch, len(rows))
            batch[ROW] = torch.tensor(rows, dtype=torch.int64, device="cpu")
        return batch
