#!/usr/bin/env bash
# transformers: Trainer resumes a mixture of experts without its experts, and its best model is of two checkpoints.
#
# Packages: transformers 5.24.0, accelerate 1.15.0, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   save_pretrained writes the experts of Mixtral under their names on the Hub, one by one; the model holds them stacked, under other
#   names, and from_pretrained converts. Trainer's loading of a checkpoint does not: the experts are reported as missing in a warning,
#   and keep what the model was made with, while attention, embeddings and the optimizer's state, the experts' too, come from the
#   checkpoint. Training goes on. With load_best_model_at_end the model returned has the best checkpoint's attention and the last
#   step's experts, and another loss than the one that was the best. Dense models resume to the same bits.
# Printed: the largest difference to a run without interruption, for a dense model and a mixture, in experts and elsewhere; and the
# loss of the best model, as it was measured and as it is returned.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 numpy
cd "$folder"
cat > see.py <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

texts = torch.randint(3, 40, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()
data = [dict(input_ids=text, labels=text) for text in texts]
size = dict(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)


def model(kind):
    torch.manual_seed(0)
    if kind == "dense":
        return LlamaForCausalLM(LlamaConfig(**size))
    return MixtralForCausalLM(MixtralConfig(num_key_value_heads=2, num_local_experts=4, **size))


def trainer(kind, folder, **more):
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=4, max_steps=4, save_steps=2, save_strategy="steps", learning_rate=1e-2,
        lr_scheduler_type="constant", use_cpu=True, report_to=[], disable_tqdm=True, **more,
    )
    return Trainer(model(kind), arguments, train_dataset=data, eval_dataset=data)


def apart(a, b):
    pairs = zip(a.named_parameters(), b.parameters())
    seen = {True: 0.0, False: 0.0}
    for (name, p), q in pairs:
        expert = "experts" in name
        seen[expert] = max(seen[expert], (p - q).abs().max().item())
    return seen[True], seen[False]


seen = {}
for kind in ("dense", "mixture"):
    whole, resumed = trainer(kind, f"{kind}-whole"), trainer(kind, f"{kind}-resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=f"{kind}-whole/checkpoint-2")
    seen[kind] = apart(whole.model, resumed.model)
    print(f"{kind}: experts {seen[kind][0]:.4f}, all else {seen[kind][1]:.4f}")
assert seen["dense"] == (0, 0) and min(seen["mixture"]) > 1e-3, "behavior has changed"

# "Best" is here the larger loss, so that it is not the last one.
best = trainer("mixture", "best", eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, greater_is_better=True,
               metric_for_best_model="eval_loss")
best.train()
returned = best.evaluate()["eval_loss"]
print(f"best model: measured {best.state.best_metric:.4f}, returned {returned:.4f}")
assert abs(returned - best.state.best_metric) > 1e-3, "behavior has changed"
PY
venv/bin/python -W ignore see.py 2> log | grep -v "^{" || { tail -5 log; exit 1; }
