#!/usr/bin/env bash
# transformers: a batch whose first label is a whole number loses the fractions of all others.
#
# Packages: transformers 5.24.0, accelerate 1.15.0, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   default_data_collator, which Trainer uses without a tokenizer, makes "label" of a batch integers if the first one is a Python int, and floats
#   otherwise. Rows read from JSON have 1 for a hard label and 0.9 for a teacher's score. A batch that begins with a hard one has 0 for each 0.9.
#   "label_ids", lists, go by the first number of the first list: [1, 0] first makes [0.7, 0.3] to [0, 0]. A bool does the same as an int.
#   Under the name "labels", which the model's argument has, and under any other name all are floats and right.
#   A model with one output (num_labels=1) takes integers, as mean squared error does, and trains. Of texts that are half hard, 1, and half soft, 0.9,
#   shuffled, about half of the soft ones count as 0, another half at each epoch, and the student learns 0.41 for them. With "labels" it
#   learns 0.90. Nothing warns. A column of datasets has one type, so that its rows do not show this.
# Printed: what the collator makes of pairs of labels; and the student's mean output for hard and for soft texts, with each name.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 numpy
cd "$folder"
export HF_HOME="$folder/cache" HF_HUB_OFFLINE=1
cat > see.py <<'PY'
import json

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, default_data_collator

torch.set_num_threads(1)


def collated(name, *values):
    batch = default_data_collator([json.loads(json.dumps({name: value})) for value in values])
    result = batch[name if name in batch else "labels"]
    numbers = [[round(x, 4) for x in row] if isinstance(row, list) else round(row, 4) for row in result.tolist()]
    print(f'"{name}" {values}: {numbers}, {result.dtype}')
    return numbers


int_first, float_first = collated("label", 1, 0.9), collated("label", 0.9, 1)
bool_first, lists = collated("label", True, 0.9), collated("label_ids", [1, 0], [0.7, 0.3])
right, other, right_lists = collated("labels", 1, 0.9), collated("score", 1, 0.9), collated("labels", [1, 0], [0.7, 0.3])


def learned(name):
    torch.manual_seed(0)
    rows = [{"input_ids": [5, 5], name: 1} for _ in range(200)] + [{"input_ids": [6, 6], name: 0.9} for _ in range(200)]
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 8}
    model = BertForSequenceClassification(BertConfig(num_labels=1, max_position_embeddings=4, **size))
    options = {"output_dir": "out", "per_device_train_batch_size": 8, "num_train_epochs": 12, "learning_rate": 3e-3, "use_cpu": True}
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "seed": 0}
    Trainer(model, TrainingArguments(**options, **quiet), train_dataset=rows).train()
    model.eval()
    with torch.no_grad():
        return [model(torch.tensor([[token, token]])).logits.item() for token in (5, 6)]


ends = {name: learned(name) for name in ("label", "labels")}
for name, (hard, soft) in ends.items():
    print(f'trained with "{name}": hard texts {hard:.4f}, soft texts {soft:.4f}')
assert int_first == [1, 0] and float_first == [0.9, 1], "behavior has changed"
assert bool_first == [1, 0] and lists == [[1, 0], [0, 0]], "behavior has changed"
assert right == other == [1, 0.9] and right_lists == [[1, 0], [0.7, 0.3]], "behavior has changed"
assert ends["label"][0] > 0.8 and ends["label"][1] < 0.7, "behavior has changed"
assert ends["labels"][0] > 0.9 and 0.8 < ends["labels"][1] < 1.0, "behavior has changed"
PY
venv/bin/python see.py
