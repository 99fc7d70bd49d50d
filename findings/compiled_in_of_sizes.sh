#!/usr/bin/env bash
# torch.compile: `6 in x.shape` is False where x.shape is (6, 3), once that size is a symbol.
#
# Packages: torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   A function is compiled for x [4, 3] and called with [5, 3], so that the first size becomes a symbol. `6 in x.shape` is then False for
#   x [6, 3], too, with every backend, without an error, a warning or a new compilation: the code takes the other branch than Python does. The
#   same with tuples and lists of such sizes, with `not in`, and with whole shapes: `w.shape in ((x.shape[0], 3),)` of a fixed w, which is how
#   shapes are often checked.
#   Right are ==, also inside of any(), a set, and `in` where the symbol stands on the left: x.shape[0] in (6, 8).
# Printed: for each condition, its values for 4, 5 and 6 rows, compiled and in Python.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
cat > see.py <<'PY'
import torch

w = torch.ones(6, 3)
WRONG = {
    "6 in x.shape": lambda x: 6 in x.shape,
    "w.shape[0] in (x.shape[0],)": lambda x: w.shape[0] in (x.shape[0],),
    "w.shape in ((x.shape[0], 3),)": lambda x: w.shape in ((x.shape[0], 3),),
    "w.shape in [x.shape]": lambda x: w.shape in [x.shape],
    "not (w.shape not in (x.shape,))": lambda x: not (w.shape not in (x.shape,)),
}
RIGHT = {
    "w.shape[0] == x.shape[0]": lambda x: w.shape[0] == x.shape[0],
    "any(w.shape == s for s in (x.shape,))": lambda x: any(w.shape == s for s in (x.shape,)),
    "tuple(w.shape) in {(x.shape[0], 3)}": lambda x: tuple(w.shape) in {(x.shape[0], 3)},
    "x.shape[0] in (6, 8)": lambda x: x.shape[0] in (6, 8),
}
for text, condition in {**WRONG, **RIGHT}.items():

    def function(x):
        return x + 1 if condition(x) else x

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    xs = [torch.zeros(rows, 3) for rows in (4, 5, 6)]
    got, want = ([bool(f(x).any()) for x in xs] for f in (compiled, function))
    print(f"{text}: {got}, in Python {want}")
    assert want == [False, False, True]
    assert got == ([False] * 3 if text in WRONG else want), "behavior has changed"
PY
venv/bin/python see.py
