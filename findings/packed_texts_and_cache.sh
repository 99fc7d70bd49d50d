#!/usr/bin/env bash
# transformers: texts packed into one row are kept apart by their positions, but not in a plain call of the model.
#
# Packages: transformers 5.24.0, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   DataCollatorWithFlattening puts two texts into one row; position_ids begin at 0 again with the second. Of LlamaForCausalLM the second
#   text's logits are then those that it has alone, if the model is called with use_cache=False. In a plain call they are not: the
#   second text sees the first. use_cache is True by default, also in training mode, and nothing warns.
#   So a student whose cache is off and a teacher that is called as it comes read the same packed row differently.
# Printed: the largest difference of the second text's logits, in the row and alone, for each call.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 numpy
cd "$folder"
cat > see.py <<'PY'
import torch
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **size))
texts = [torch.randint(0, 64, (n,)).tolist() for n in (5, 7)]
packed = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": text} for text in texts])
packed.pop("labels")
print("position_ids", packed["position_ids"].tolist())


def difference(**options):
    with torch.no_grad():
        alone = model(input_ids=torch.tensor(texts[1:])).logits
        return (model(**packed, **options).logits[:, 5:] - alone).abs().max().item()


found = {}
for mode in ("eval", "train"):
    model.train(mode == "train")
    for name, options in {"a plain call": {}, "use_cache=False": {"use_cache": False}}.items():
        found[mode, name] = difference(**options)
        print(f"{mode} mode, {name}: {found[mode, name]:.1e}")
for (_, name), value in found.items():
    assert (value > 0.1) if name == "a plain call" else (value < 1e-6), "behavior has changed"
PY
HF_HUB_OFFLINE=1 venv/bin/python -W ignore see.py
