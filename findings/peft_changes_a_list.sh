#!/usr/bin/env bash
# peft: with ensure_weight_tying, get_peft_model rewrites the caller's own list of modules_to_save.
#
# Packages: peft 0.21.2, transformers 5.24.0, accelerate 1.15.0, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   LoraConfig(modules_to_save=mine, ensure_weight_tying=True) keeps the caller's list, not a copy, and get_peft_model of a model
#   with tied embeddings replaces its "lm_head" by "model.embed_tokens". A second model that is configured from the same list
#   trains its embedding and no longer its own output layer. Without ensure_weight_tying the list stays as it was.
# Printed: "with: ['model.embed_tokens']" and "without: ['lm_head']".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0 accelerate==1.15.0 peft==0.21.2
cd "$folder"
cat > see.py <<'PY'
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

seen = {}
for tying in (True, False):
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    mine = ["lm_head"]
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=mine, ensure_weight_tying=tying)
    get_peft_model(LlamaForCausalLM(config), lora)
    seen[tying] = mine
    print(f"{'with' if tying else 'without'}: {mine}")
assert seen == {True: ["model.embed_tokens"], False: ["lm_head"]}, "behavior has changed"
PY
HF_HUB_OFFLINE=1 venv/bin/python -W ignore see.py 2> /dev/null
