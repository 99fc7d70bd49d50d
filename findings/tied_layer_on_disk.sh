#!/usr/bin/env bash
# transformers with accelerate: a tied model whose output layer alone is put on "disk" loads, but cannot run.
#
# Packages: transformers 5.24.0, accelerate 1.15.0, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   from_pretrained(device_map={"model": "cpu", "lm_head": "disk"}) of a model whose lm_head shares the embedding's weight
#   succeeds; the first forward raises KeyError: 'lm_head.weight'. accelerate's dispatch_model with the same map runs, and
#   gives the logits of the model in memory.
# Printed: "from_pretrained: KeyError 'lm_head.weight'" and "dispatch_model: the same logits".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0 accelerate==1.15.0
cd "$folder"
cat > see.py <<'PY'
import torch
from accelerate import dispatch_model
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    tie_word_embeddings=True,
)
torch.manual_seed(0)
model = LlamaForCausalLM(config).eval()
tokens = torch.arange(5)[None]
with torch.no_grad():
    want = model(tokens).logits
model.save_pretrained("saved")
places = {"model": "cpu", "lm_head": "disk"}
loaded = LlamaForCausalLM.from_pretrained("saved", device_map=places, offload_folder="one")
try:
    loaded(tokens)
    raised = "nothing"
except KeyError as error:
    raised = f"KeyError {error}"
print(f"from_pretrained: {raised}")
dispatched = dispatch_model(model, device_map=places, main_device="cpu", offload_dir="two")
with torch.no_grad():
    same = torch.equal(dispatched(tokens).logits, want)
print(f"dispatch_model: {'the same' if same else 'other'} logits")
assert raised == "KeyError 'lm_head.weight'" and same, "behavior has changed"
PY
HF_HUB_OFFLINE=1 venv/bin/python -W ignore see.py 2> /dev/null
