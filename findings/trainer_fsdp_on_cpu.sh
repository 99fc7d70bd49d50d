#!/usr/bin/env bash
# transformers' Trainer on CPUs: fsdp=True is accepted, and what trains is DDP, whole on every process, without a word.
#
# Packages: transformers 5.24.0, accelerate 1.15.0, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   Two processes with TrainingArguments(fsdp=True, fsdp_config={"version": 2}, use_cpu=True) train. Trainer.is_fsdp_enabled is
#   False, the model is wrapped in DistributedDataParallel, none of its parameters is a DTensor, and no line of the output names
#   FSDP. torch's own fully_shard shards the same model on the same two processes (gloo).
# Printed: "asked for FSDP, got DistributedDataParallel, 0 sharded parameters" and "fully_shard: all parameters sharded".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0 accelerate==1.15.0
cd "$folder"
cat > see.py <<'PY'
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


def sharded(model):
    return sum(isinstance(p, DTensor) for p in model.parameters())


def tiny():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            bos_token_id=1, eos_token_id=2,
        )
    )


args = TrainingArguments("out", use_cpu=True, fsdp=True, fsdp_config={"version": 2}, max_steps=1, report_to=[], save_strategy="no")
data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 16
trainer = Trainer(tiny(), args, train_dataset=data)
trainer.train()
got = type(trainer.model_wrapped).__name__, sharded(trainer.model), trainer.is_fsdp_enabled
model = tiny()
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
everything = sharded(model) == len(list(model.parameters()))
if trainer.is_world_process_zero():
    print(f"asked for FSDP, got {got[0]}, {got[1]} sharded parameters")
    print("fully_shard: all parameters sharded" if everything else "fully_shard: not all sharded")
assert got == ("DistributedDataParallel", 0, False) and everything, f"behavior has changed: {got}"
torch.distributed.destroy_process_group()
PY
OMP_NUM_THREADS=1 venv/bin/torchrun --standalone --nproc-per-node 2 see.py > out.txt 2>&1 || { cat out.txt; exit 1; }
grep -E "^(asked|fully)" out.txt
if grep -v "^asked\|^fully" out.txt | grep -i "fsdp" ; then echo "behavior has changed: it says something"; exit 1; fi
