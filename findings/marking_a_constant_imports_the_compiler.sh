#!/usr/bin/env bash
# torch.compiler.assume_constant_result: a decorator that sets one attribute imports the whole compiler first.
#
# Package: torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   `import torch` leaves torch._dynamo alone. Decorating one function with torch.compiler.assume_constant_result, without calling it and
#   without compiling anything, loads torch._dynamo and some 800 modules with it, and takes nearly as long as importing torch did.
#   What comes back is the same function, with the attribute _dynamo_marked_constant = True and nothing else.
#   So a library that marks a function for those who compile makes everybody wait at its import.
# Printed: modules and seconds of `import torch` and of the decorator.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
cat > see.py <<'PY'
import sys
import time


def taken(name, run):
    modules, start = len(sys.modules), time.perf_counter()
    out = run()
    modules = len(sys.modules) - modules
    print(f"{name}: {modules} modules, {time.perf_counter() - start:.1f} s")
    return out, modules


def answer():
    return 1


torch, _ = taken("import torch", lambda: __import__("torch"))
assert "torch._dynamo" not in sys.modules, "behavior has changed"
marked, modules = taken("assume_constant_result", lambda: torch.compiler.assume_constant_result(answer))
print("attributes of the function:", vars(answer))
assert marked is answer and vars(answer) == {"_dynamo_marked_constant": True}, "behavior has changed"
assert "torch._dynamo" in sys.modules and modules > 500, "behavior has changed"
PY
venv/bin/python see.py
