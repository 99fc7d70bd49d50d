#!/usr/bin/env bash
# torch's stable ABI: each call of an operator leaves memory behind for every string among its arguments.
#
# Package: torch 2.13.0 (CPU build), and a C++ compiler. Seen there, and checked by this script:
#   Two operators in one extension, built on torch/csrc/stable: one takes a str and returns its length, the other takes an int and
#   returns it. A string of 300 characters, a million calls of each: the process grows by 368 bytes a call of the first, and by
#   nothing that counts for the second. Nothing in Python holds the memory.
#   The header (stableivalue_conversions.h) makes the std::string of such an argument with `new` and returns a copy of it.
#   So an option that is passed as a string ("mean", "sum") costs some tens of bytes a call for as long as a training runs.
# Printed: bytes that the process has grown by, for each call.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
cat > operators.cpp <<'CPP'
#include <torch/csrc/stable/library.h>

#include <string>

int64_t length(std::string text) { return static_cast<int64_t>(text.size()); }
int64_t same(int64_t number) { return number; }

STABLE_TORCH_LIBRARY(seen, m) {
  m.def("length(str text) -> int");
  m.def("same(int number) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(seen, CompositeExplicitAutograd, m) {
  m.impl("length", TORCH_BOX(&length));
  m.impl("same", TORCH_BOX(&same));
}
CPP
torch=$(venv/bin/python -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parent)")
g++ -std=c++20 -O1 -shared -fPIC -DTORCH_TARGET_VERSION=0x020b000000000000 \
  -I "$torch/include" operators.cpp -o operators.so -L "$torch/lib" -ltorch_cpu -Wl,-rpath,"$torch/lib"
cat > see.py <<'PY'
import torch

CALLS, TEXT = 1_000_000, "x" * 300
torch.ops.load_library("./operators.so")


def resident():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmRSS"))


def grown_by_a_call(operator, argument):
    for _ in range(1000):
        operator(argument)
    before = resident()
    for _ in range(CALLS):
        operator(argument)
    return (resident() - before) / CALLS


of_text = grown_by_a_call(torch.ops.seen.length.default, TEXT)
of_number = grown_by_a_call(torch.ops.seen.same.default, 300)
print(f"str of 300 characters: {of_text:.0f} bytes a call; int: {of_number:.0f}")
assert of_number < 1 and 300 < of_text < 400, "behavior has changed"
PY
venv/bin/python see.py
