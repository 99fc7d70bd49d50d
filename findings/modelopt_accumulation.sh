#!/usr/bin/env bash
# nvidia-modelopt's KDTrainer: gradient accumulation multiplies the gradient.
#
# Packages: nvidia-modelopt 0.47.0, transformers 5.24.0, accelerate 1.15.0, datasets 5.2.0, torch 2.13.0 (CPU build). Seen there, and
# checked by this script:
#   KDTrainer averages its loss over the tokens of each small batch. transformers' Trainer, on which it stands, divides such a loss by
#   gradient_accumulation_steps only if it is told of it, or if the model's forward takes no extra arguments; of a LlamaForCausalLM it
#   thinks that the loss is divided already. So 8 texts in 8 steps of accumulation give 8 times the gradient of 8 texts at once, and 8
#   times the logged loss. Trainer itself gives the same gradient for both.
#   A subclass of KDTrainer that says loss_is_scaled_for_ga = False is divided.
# Printed: for each trainer, the gradient's norm and the loss of the first step, with 1 and with 8 steps of accumulation.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 nvidia-modelopt==0.47.0 transformers==5.24.0 accelerate==1.15.0 datasets==5.2.0 \
    requests==2.34.2 numpy
cd "$folder"
cat > see.py <<'PY'
import copy

import torch
from modelopt.torch.distill.plugins.huggingface import KDTrainer
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


class Told(KDTrainer):
    loss_is_scaled_for_ga = False


torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.2
)
student, teacher = LlamaForCausalLM(config), LlamaForCausalLM(config)
texts = torch.randint(0, 40, (8, 16))
rows = [{"input_ids": text, "labels": text} for text in texts]
ratios = {}
for kind in (Trainer, KDTrainer, Told):
    norms = []
    for steps in (1, 8):
        arguments = TrainingArguments(
            "out", max_steps=1, per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps, logging_steps=1,
            use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        )
        more = {} if kind is Trainer else {"distill_args": {"teacher_model": teacher}}
        trainer = kind(copy.deepcopy(student), arguments, train_dataset=rows, **more)
        trainer.train()
        log = trainer.state.log_history[0]
        print(f"seen: {kind.__name__}, {steps} step(s): norm {log['grad_norm']:.3f}, loss {log['loss']:.3f}")
        norms.append(torch.tensor([log["grad_norm"], log["loss"]]))
    ratios[kind.__name__] = norms[1] / norms[0]
for name, ratio in ratios.items():
    assert torch.allclose(ratio, torch.tensor(8.0 if name == "KDTrainer" else 1.0), rtol=1e-3), "behavior has changed"
PY
HF_HUB_OFFLINE=1 venv/bin/python -W ignore see.py 2> /dev/null | sed -n "s/^seen: //p"
