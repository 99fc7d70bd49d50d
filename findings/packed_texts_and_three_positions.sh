#!/usr/bin/env bash
# transformers: Qwen2.5-VL keeps texts that are packed into one row apart only by positions of a fourth kind.
#
# Packages: transformers 5.24.0, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   Its position_ids are [3, B, S] (time, height, width); [B, S] is taken for all three. Positions that begin at 0 again separate packed
#   texts in other models, with the cache off. Here neither [B, S], which DataCollatorWithFlattening gives, nor [3, B, S] does: the second
#   text's logits depend on the first. Positions [4, B, S], the first of them those of the text, do. No warning in any case.
# Printed: the largest difference of the second text's logits, in the row and alone, for each shape of the same positions.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 numpy
cd "$folder"
cat > see.py <<'PY'
import torch
from transformers import DataCollatorWithFlattening, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

torch.manual_seed(0)
rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
size = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
text = dict(vocab_size=64, rope_parameters=rope, initializer_range=0.3, pad_token_id=0, **size)
vision = dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=16, out_hidden_size=32)
config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=61, video_token_id=62)
model = Qwen2_5_VLForConditionalGeneration(config).eval()
texts = [torch.randint(3, 60, (n,)).tolist() for n in (5, 7)]
packed = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": text} for text in texts])
rows, positions = packed["input_ids"], packed["position_ids"]
seen = []
with torch.no_grad():
    alone = model(input_ids=torch.tensor(texts[1:]), use_cache=False).logits
    for given in (positions, positions.expand(3, 1, -1), positions.expand(4, 1, -1)):
        logits = model(input_ids=rows, position_ids=given, use_cache=False).logits
        seen.append((logits[:, 5:] - alone).abs().max().item())
        print(f"{list(given.shape)}: {seen[-1]:.4f}")
assert min(seen[:2]) > 0.1 and seen[2] < 1e-4, "behavior has changed"
PY
venv/bin/python -W ignore see.py
