#!/usr/bin/env bash
# transformers' Trainer and peft: a module that is set on a PeftModel is trained, and is in no checkpoint.
#
# Packages: peft 0.21.2, transformers 5.24.0, accelerate 1.15.0, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   model.scale = Linear(1, 1) joins the model's parameters, so Trainer's optimizer moves it, whether the model is plain or a
#   PeftModel. Of a plain model the checkpoint holds it. Of a PeftModel the checkpoint holds the adapter's weights alone, without
#   a warning: what else was trained (a head, a learned temperature or weighting of a loss) is not there to be loaded again.
# Printed: "plain: trained True, in the checkpoint True" and "peft: trained True, in the checkpoint False".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0 accelerate==1.15.0 peft==0.21.2
cd "$folder"
cat > see.py <<'PY'
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


class Scaled(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **_):
        outputs = model(**inputs)
        loss = outputs.loss * model.scale(torch.ones(1)).exp().squeeze()
        return (loss, outputs) if return_outputs else loss


seen, rows = {}, [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
for kind in ("plain", "peft"):
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    if kind == "peft":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    model.scale = torch.nn.Linear(1, 1)
    before = model.scale.weight.item()
    arguments = TrainingArguments(
        kind, max_steps=2, save_steps=2, learning_rate=0.1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        Scaled(model, arguments, train_dataset=rows).train()
    names = [name for file in Path(kind, "checkpoint-2").glob("*.safetensors") for name in load_file(file)]
    seen[kind] = model.scale.weight.item() != before, any("scale" in name for name in names)
    assert not any("scale" in str(w.message) for w in heard)
    print(f"{kind}: trained {seen[kind][0]}, in the checkpoint {seen[kind][1]}")
assert seen == {"plain": (True, True), "peft": (True, False)}, "behavior has changed"
PY
HF_HUB_OFFLINE=1 venv/bin/python see.py 2> /dev/null | grep checkpoint
