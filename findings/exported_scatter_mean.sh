#!/usr/bin/env bash
# torch.onnx: scatter_reduce with reduce="mean" is exported without the mean: what comes out is the last number.
#
# Packages: torch 2.13.0 (CPU build), onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0. Seen there, and checked by this script:
#   A student's head takes the mean of its tokens for each text of a packed row, by scatter_reduce(..., "mean", include_self=False). ONNX's
#   ScatterElements knows no mean, and the exporter writes its reduction as "none", which puts the numbers one over the other. Of tokens 2, 7, 3 and
#   4, the first three of one text, ONNX Runtime gives 3 and 4, where PyTorch gives 4 and 4. With include_self=True it is the same. Nothing warns,
#   the graph passes onnx.checker, and the shapes are right. "sum" and "amax" are exported as such.
#   Right is the sum by scatter_reduce or index_add, divided by the sum of ones.
# Printed: for each reduction, its names in the graph, its values in ONNX Runtime, and those of PyTorch.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cd "$folder"
cat > see.py <<'PY'
import numpy as np
import onnx
import onnxruntime
import torch


class Pool(torch.nn.Module):
    def __init__(self, how, include):
        super().__init__()
        self.how, self.include = how, include

    def forward(self, tokens, texts):
        return tokens.new_zeros(2).scatter_reduce(0, texts, tokens, self.how, include_self=self.include)


class ByHand(torch.nn.Module):
    def forward(self, tokens, texts):
        sums, counts = (tokens.new_zeros(2).index_add(0, texts, x) for x in (tokens, torch.ones_like(tokens)))
        return sums / counts


inputs = torch.tensor([2.0, 7.0, 3.0, 4.0]), torch.tensor([0, 0, 0, 1])
cases = {f"{how}, include_self={include}": Pool(how, include) for how in ("mean", "sum", "amax") for include in (False, True)}
cases["mean by index_add"] = ByHand()
seen = {}
for name, module in cases.items():
    model = torch.onnx.export(module.eval(), inputs, dynamo=True, verbose=False).model_proto
    onnx.checker.check_model(model)
    written = [a.s.decode() for n in model.graph.node if n.op_type == "ScatterElements" for a in n.attribute if a.name == "reduction"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run(None, {x.name: y.numpy() for x, y in zip(session.get_inputs(), inputs)})[0]
    want = module(*inputs).numpy()
    seen[name] = got.tolist(), np.allclose(got, want)
    print(f"{name}: written as {written}, ONNX Runtime {got}, PyTorch {want}")
for name, (got, same) in seen.items():
    if name.startswith("mean, "):
        assert got == [3, 4] and not same, "behavior has changed"
    else:
        assert same, "behavior has changed"
PY
venv/bin/python -W ignore see.py 2> errors || { cat errors; exit 1; }
