#!/usr/bin/env bash
# transformers' Trainer: what GPT-2's loss is divided by has tokens that nobody predicts, and Llama's has not.
#
# Packages: transformers 5.24.0, accelerate 1.15.0, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   A causal model's loss leaves out the first label of a sequence: 4 sequences of 8 labels are 28 predictions. Trainer counts the
#   labels for it (num_items_in_batch), and leaves the first ones out where the model's loss_type says so. LlamaForCausalLM's does.
#   GPT2LMHeadModel has no loss_type, so 32 are counted, while its loss shifts the labels all the same: the sum of 28 losses is
#   divided by 32. The loss that is trained and logged is 7/8 of the cross-entropy, and so is its gradient. The model's own loss,
#   called without Trainer, is the cross-entropy.
# Printed: "Llama: 28 counted, 1.0000 of the cross-entropy" and "GPT-2: 32 counted, 0.8750 of the cross-entropy".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0 accelerate==1.15.0
cd "$folder"
cat > see.py <<'PY'
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

CLASSES, LENGTH = 40, 8


class Watched(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.counted = int(num_items_in_batch)
        with torch.no_grad():
            self.own = model(**inputs).loss.item()
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


small = dict(vocab_size=CLASSES, num_hidden_layers=1, num_attention_heads=2, hidden_size=16)
models = {
    "Llama": LlamaForCausalLM(LlamaConfig(intermediate_size=32, **small)),
    "GPT-2": GPT2LMHeadModel(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=1, eos_token_id=2, **small)),
}
rows = [{"input_ids": x, "labels": x} for x in torch.randint(3, CLASSES, (4, LENGTH))]
seen = {}
for name, model in models.items():
    arguments = TrainingArguments(
        name, max_steps=1, per_device_train_batch_size=4, learning_rate=0.0, logging_steps=1, use_cpu=True, report_to="none",
        disable_tqdm=True,
    )
    trainer = Watched(model, arguments, train_dataset=rows)
    trainer.train()
    logged = trainer.state.log_history[0]["loss"]
    seen[name] = trainer.counted, round(logged / trainer.own, 3)
    print(f"{name}: {trainer.counted} counted, {logged / trainer.own:.4f} of the cross-entropy")
assert seen == {"Llama": (28, 1.0), "GPT-2": (32, 0.875)}, "behavior has changed"
PY
HF_HUB_OFFLINE=1 venv/bin/python see.py 2> /dev/null | grep counted
