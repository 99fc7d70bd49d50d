#!/usr/bin/env bash
# transformers: the loss and the gradient of BartForCausalLM grow with the steps of accumulation.
#
# Packages: transformers 5.24.0, accelerate 1.15.0, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   Trainer leaves the division by the steps of accumulation to a model whose forward takes keyword arguments: it gives num_items_in_batch,
#   and the model divides by it. BartForCausalLM takes keyword arguments, and its loss is a mean over its own batch all the same. So the
#   same eight texts as 8 batches of 1 give eight times the loss and the gradient of 1 batch of 8: a recipe that is moved to a smaller
#   device by accumulation trains with that many times the learning rate (SGD), or clips what it did not clip. LlamaForCausalLM gives the
#   same for both.
# Printed: loss and norm of the gradient of one step, as batches x steps of accumulation.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 numpy
cd "$folder"
cat > see.py <<'PY'
import torch
from transformers import BartConfig, BartForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

texts = torch.randint(3, 40, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()
data = [dict(input_ids=text, labels=text[1:] + [-100]) for text in texts]
MODELS = {
    "Llama": lambda: LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ),
    "Bart": lambda: BartForCausalLM(
        BartConfig(vocab_size=40, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, dropout=0.0)
    ),
}
for name, make in MODELS.items():
    seen = []
    for batch, steps in ((8, 1), (1, 8)):
        torch.manual_seed(0)
        arguments = TrainingArguments(
            "out", per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=1, logging_steps=1,
            use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", optim="sgd",
        )
        trainer = Trainer(make(), arguments, train_dataset=data)
        trainer.train()
        log = trainer.state.log_history[0]
        seen.append((float(log["loss"]), float(log["grad_norm"])))
        print(f"{name}, {batch} x {steps}: loss {seen[-1][0]:.3f}, gradient {seen[-1][1]:.3f}")
    ratios = [b / a for a, b in zip(*seen)]
    wanted = 8 if name == "Bart" else 1
    assert all(abs(ratio / wanted - 1) < 0.02 for ratio in ratios), "behavior has changed"
PY
venv/bin/python -W ignore see.py 2> log | grep -v "^{" || { tail -5 log; exit 1; }
