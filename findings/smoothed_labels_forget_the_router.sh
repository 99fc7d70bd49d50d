#!/usr/bin/env bash
# transformers: with label smoothing, Trainer trains a mixture of experts without the loss that balances its experts.
#
# Packages: transformers 5.24.0, accelerate 1.15.0, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   A Mixtral with output_router_logits=True adds router_aux_loss_coef times a loss to its cross-entropy, which keeps its router from giving all
#   tokens to few experts. With label_smoothing_factor > 0, Trainer computes a smoothed cross-entropy of the logits, and takes it in place of the
#   model's loss. So what the model added is gone, from training and from eval_loss, however small the factor: 1e-9 is enough. The coefficient then
#   changes nothing, and nothing warns. The model still computes its own loss.
#   Here a coefficient of 1 makes the first loss 5.45 instead of 3.44, and after 100 steps the most used of 4 experts gets 27 % of the places, where
#   25 % is even. With a factor of 1e-9 it is 3.44 and 35 %, as with a coefficient of 0.
#   Right is a compute_loss of one's own that adds aux_loss, which the model's output has.
# Printed: for each factor and coefficient, the first step's loss, eval_loss before training, and the largest share of an expert after it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0 accelerate==1.15.0
cd "$folder"
cat > see.py <<'PY'
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

torch.set_num_threads(1)
EXPERTS = 4
generator = torch.Generator().manual_seed(0)
texts = torch.randint(0, 32, (2, 12), generator=generator)
rows = [{"input_ids": texts[i % 2], "labels": texts[i % 2]} for i in range(64)]


def run(factor, coefficient):
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=EXPERTS, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=coefficient,
    ))
    arguments = TrainingArguments(
        "out", label_smoothing_factor=factor, max_steps=100, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=1, use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy="no",
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    first = [x["loss"] for x in trainer.state.log_history if "loss" in x][0]
    model.eval()
    with torch.no_grad():
        routers = model(texts).router_logits
    share = max(torch.bincount(x.topk(2).indices.flatten(), minlength=EXPERTS).max().item() / (2 * len(x)) for x in routers)
    return first, before, share


seen = {}
for factor in (0.0, 1e-9, 0.1):
    for coefficient in (0.0, 1.0):
        seen[factor, coefficient] = run(factor, coefficient)
        print("factor {}, coefficient {}: loss {:.4f}, eval_loss {:.4f}, share {:.2f}".format(factor, coefficient, *seen[factor, coefficient]), flush=True)
plain, balanced = seen[0.0, 0.0], seen[0.0, 1.0]
assert balanced[0] - plain[0] > 1.9 and balanced[1] - plain[1] > 1.9 and balanced[2] < plain[2] - 0.03, "behavior has changed"
for factor in (1e-9, 0.1):
    assert seen[factor, 0.0] == seen[factor, 1.0] and abs(seen[factor, 0.0][0] - plain[0]) < 0.01, "behavior has changed"
PY
HF_HUB_OFFLINE=1 venv/bin/python -W ignore see.py 2> errors | grep factor || { cat errors; exit 1; }
