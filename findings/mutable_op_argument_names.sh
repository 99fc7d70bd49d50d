#!/usr/bin/env bash
# torch.compile: a custom operator that writes into an argument may not have an argument named "mode".
#
# Package: torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   An operator with the schema (Tensor(a!) x, str mode) -> () can be defined without an error, and runs. Under torch.compile it
#   fails with "got multiple values for argument 'mode'": the wrapper that makes it functional takes the operator's arguments by
#   keyword, next to its own parameters.
#   The same operator compiles if the argument has another name. An operator with an argument named "mode" that returns a new
#   tensor compiles, too.
# Printed: one line per operator with the outcome.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
cat > see.py <<'PY'
import torch

SCHEMAS = {
    "writes_mode": "(Tensor(a!) x, str mode) -> ()",
    "writes_kind": "(Tensor(a!) x, str kind) -> ()",
    "returns_mode": "(Tensor x, str mode) -> Tensor",
}


def double(x, mode):
    return x * 2


def double_(x, mode):
    x.mul_(2)


for name, schema in SCHEMAS.items():
    torch.library.define(f"seen::{name}", schema)
    torch.library.impl(f"seen::{name}", "CPU")(double_ if name.startswith("writes") else double)
    torch.library.register_fake(f"seen::{name}", (lambda *_: None) if name.startswith("writes") else lambda x, mode: x * 2)
for name in SCHEMAS:
    op = getattr(torch.ops.seen, name)
    def f(x):
        y = x.clone()
        out = op(y, "any")
        return y if out is None else out

    try:
        outcome = torch.compile(f, backend="aot_eager", fullgraph=True)(torch.ones(3)).tolist()
    except Exception as error:
        outcome = str(error).splitlines()[1] if "\n" in str(error) else str(error)
    print(f"{name}: {outcome}")
    wanted = "got multiple values for argument 'mode'" if name == "writes_mode" else "[2.0, 2.0, 2.0]"
    assert wanted in str(outcome), "behavior has changed"
    torch._dynamo.reset()
PY
venv/bin/python -W ignore see.py
