#!/usr/bin/env bash
# torch.compile: gathering a bool tensor from all processes gives int64, so `~` of it gives -1 and -2, not False and True.
#
# Packages: torch 2.13.0 (CPU build), and a C++ compiler. Seen there, and checked by this script:
#   In code that inductor compiles, all_gather_tensor (dist.all_gather becomes it), reduce_scatter_tensor and the functional broadcast
#   of a bool tensor give int64; eager code and backend="aot_eager" give bool. `~mask` is then -1 and -2, both true: counting the rows that a
#   gathered mask leaves out gives -(2 * ones + zeros), -34 for 2 of 18, without an error or a warning. torch.where and masked_fill with it do
#   not compile (AssertionError), and a custom op gets int64.
#   Right are all_reduce and all_to_all_single of bool, and all_gather_tensor of uint8. The lowerings of the three are registered with the
#   promotion of types that arithmetic has, and beside the tensor they take a Python int, group_size or src: bool with an int is int64.
# A group of one process shows it. Printed: for each expression its compiled and its eager value.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
export TORCHINDUCTOR_CACHE_DIR="$folder/cache"
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
    "broadcast": lambda x: collectives.broadcast(x, 0, group),
    "(~all_gather_tensor(mask)).sum()": lambda x: (~gathered(x)).sum(),
}
RIGHT = {
    "all_gather_tensor of uint8 != 0": lambda x: gathered(x.to(torch.uint8)) != 0,
    "all_reduce": lambda x: collectives.all_reduce(x, "max", group),
    "all_to_all_single": lambda x: collectives.all_to_all_single(x, None, None, group),
}
@torch.library.custom_op("see::taken", mutates_args=())
def taken(x: torch.Tensor) -> torch.Tensor:
    return torch.full((1,), 1 if x.dtype == torch.bool else 2 if x.dtype == torch.int64 else 3)


@taken.register_fake
def _(x):
    return torch.empty(1, dtype=torch.int64)


WRONG["dtype that a custom op gets (1 is bool, 2 int64)"] = lambda x: taken(gathered(x))
for text, function in {**WRONG, **RIGHT}.items():
    torch._dynamo.reset()
    got, want = torch.compile(function, fullgraph=True)(mask), function(mask)
    print(f"{text}: {got.dtype} {got.sum().item()}, in eager code {want.dtype} {want.sum().item()}")
    same = got.dtype == want.dtype and torch.equal(got, want)
    assert same == (text in RIGHT), "behavior has changed"
    if text in WRONG:
        assert got.dtype == torch.int64, "behavior has changed"
        torch._dynamo.reset()
        plain = torch.compile(function, backend="aot_eager", fullgraph=True)(mask)
        assert plain.dtype == want.dtype and torch.equal(plain, want), "behavior has changed"
    if text.startswith("(~"):
        assert got.item() == -34 and want.item() == 2, "behavior has changed"
    if text.startswith("dtype"):
        assert got.item() == 2 and want.item() == 1, "behavior has changed"
ones = torch.ones(18)
for text, function in {
    "torch.where": lambda x: torch.where(gathered(x), ones, 0.0),
    "masked_fill": lambda x: ones.masked_fill(gathered(x), 0.0),
}.items():
    torch._dynamo.reset()
    try:
        torch.compile(function, fullgraph=True)(mask)
    except Exception as error:
        print(f"{text}: {type(error).__name__}, {str(error).splitlines()[0]}")
        assert "AssertionError" in str(error), "behavior has changed"
    else:
        raise AssertionError("behavior has changed")
dist.destroy_process_group()
PY
venv/bin/python see.py
