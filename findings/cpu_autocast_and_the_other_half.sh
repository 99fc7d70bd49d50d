#!/usr/bin/env bash
# CPU autocast: torch.cat and torch.stack refuse the 16-bit type that autocast was not asked for.
#
# Package: torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   Under torch.autocast("cpu", dtype=torch.bfloat16) products cast float16 tensors to bfloat16 and go on. torch.cat and torch.stack of
#   float16 tensors raise "Unexpected floating ScalarType in at::autocast::prioritize", although all tensors have one dtype and nothing
#   is to be cast. Under dtype=torch.float16 they raise for bfloat16 tensors. float32 and float64 tensors are taken in both.
#   One float32 tensor beside the refused ones changes nothing, though float32 beside the asked-for type is promoted.
#   So teachers' logits that were stored in float16 cannot be stacked inside a training loop in bfloat16.
# Printed: what each call gives.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
cat > see.py <<'PY'
import torch

HALVES = (torch.float16, torch.bfloat16)


def result(run):
    try:
        return str(run().dtype)
    except RuntimeError as error:
        return "RuntimeError: " + str(error).splitlines()[0]


for asked in HALVES:
    for given in (*HALVES, torch.float32, torch.float64):
        x = torch.ones(2, 2, dtype=given)
        with torch.autocast("cpu", dtype=asked):
            got = {name: result(lambda f=f: f([x, x])) for name, f in (("cat", torch.cat), ("stack", torch.stack))}
            got["matmul"] = result(lambda: x @ x)
            got["cat with float32"] = result(lambda: torch.cat([x, x.float()]))
        print(f"autocast {asked}, tensors {given}: {got}")
        other = given in HALVES and given != asked
        for name in ("cat", "stack", "cat with float32"):
            assert ("prioritize" in got[name]) == other, "behavior has changed"
        assert got["matmul"] == str(given if given == torch.float64 else asked), "behavior has changed"
PY
venv/bin/python see.py
