#!/usr/bin/env bash
# torch.compile: gathering a bool tensor from all processes gives int64, and `~` of it other numbers.
#
# Packages: torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   In code that inductor compiles, all_gather_tensor (dist.all_gather becomes it) and reduce_scatter_tensor of a
#   bool tensor give int64; the graph, eager code and backend="aot_eager" say bool. `~mask` is then -1 and -2, both true: counting the rows that
#   a gathered mask leaves out gives -(2 * ones + zeros), -34 for 2 of 18, without an error or a warning. torch.where and masked_fill with it do not
#   compile (AssertionError), and a custom op gets int64.
#   Right are all_reduce, broadcast and all_to_all_single of bool, and other dtypes. The lowerings of the two are registered with the
#   promotion of types that arithmetic has, and beside the tensor they take a Python int, group_size: bool with an int is int64.
# A group of one process shows it. Printed: for each expression its compiled and its eager value.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
cat > see.py <<'PY'
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
group = dist.group.WORLD
mask = torch.arange(18) >= 2


def listed(x):
    parts = [torch.empty_like(x)]
    dist.all_gather(parts, x)
    return parts[0]


def gathered(x):
    return collectives.all_gather_tensor(x, 0, group)


WRONG = {
    "dist.all_gather": listed,
    "all_gather_tensor": gathered,
    "reduce_scatter_tensor": lambda x: collectives.reduce_scatter_tensor(x, "max", 0, group),
    "(~all_gather_tensor(mask)).sum()": lambda x: (~gathered(x)).sum(),
}
RIGHT = {
    "all_gather_tensor of uint8 != 0": lambda x: gathered(x.to(torch.uint8)) != 0,
    "all_reduce": lambda x: collectives.all_reduce(x, "max", group),
}
for text, function in {**WRONG, **RIGHT}.items():
    torch._dynamo.reset()
    got, want = torch.compile(function, fullgraph=True)(mask), function(mask)
    print(f"{text}: {got.dtype} {got.sum().item()}, in eager code {want.dtype} {want.sum().item()}")
    same = got.dtype == want.dtype and torch.equal(got, want)
    assert same == (text in RIGHT), "behavior has changed"
dist.destroy_process_group()
PY
venv/bin/python see.py
