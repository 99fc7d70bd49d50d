#!/usr/bin/env bash
# TRL: SFTTrainer trains RecurrentGemma without the cap of its logits.
#
# Packages: trl 1.16.0, transformers 5.24.0, accelerate 1.15.0, datasets 5.2.0, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   SFTTrainer makes no logits: it takes the last hidden states, and does itself what the model does after its output layer. It finds the
#   cap of logits under the name final_logit_softcapping, as Gemma 2 has it. RecurrentGemma's cap is named logits_soft_cap, and is left
#   out. Loss, gradient and eval_loss are those of another model than the one that is saved and generates. Nothing warns.
#   Both caps are the default of their configuration, 30. The output layer is scaled so that logits come near it.
# Printed: the loss of each trainer's first step, its eval_loss, and the loss that the model gives for the same texts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 datasets==5.2.0 trl==1.16.0 numpy
cd "$folder"
cat > see.py <<'PY'
import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedTokenizerFast,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)
from trl import SFTConfig, SFTTrainer

disable_progress_bars()
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(62)} | {"<pad>": 62, "<eos>": 63}, unk_token="w0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
size = dict(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2)
size |= dict(intermediate_size=64, pad_token_id=62, bos_token_id=63, eos_token_id=63)
torch.manual_seed(0)
texts = torch.randint(0, 60, (4, 16))
data = Dataset.from_dict({"input_ids": texts.tolist()})
settings = SFTConfig(
    "out", use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], disable_tqdm=True, learning_rate=0.0,
    per_device_train_batch_size=4, per_device_eval_batch_size=4, max_steps=1, logging_steps=1, save_strategy="no",
)
for name, model in {
    "Gemma2ForCausalLM": Gemma2ForCausalLM(Gemma2Config(**size, head_dim=16)),
    "RecurrentGemmaForCausalLM": RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**size)),
}.items():
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=2)
    trainer = SFTTrainer(model, settings, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    trainer.train()
    step, held_out = trainer.state.log_history[0]["loss"], trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        own = model.eval()(input_ids=texts, labels=texts).loss.item()
    print(f"{name}: first step {step:.3f}, eval_loss {held_out:.3f}, the model's own {own:.3f}")
    same = abs(held_out - own) < 1e-3
    assert same == (name == "Gemma2ForCausalLM") and abs(step - held_out) < 1e-3, "behavior has changed"
PY
HF_HUB_OFFLINE=1 venv/bin/python -W ignore see.py
