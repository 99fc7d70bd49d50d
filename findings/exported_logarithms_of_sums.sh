#!/usr/bin/env bash
# torch.onnx: logsigmoid, logaddexp and the binary cross-entropy of logits lose their stable forms, and are infinite for common logits.
#
# Packages: torch 2.13.0 (CPU build), onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0. Seen there, and checked by this script:
#   The three exist so that no exponential overflows or vanishes. The exporter writes logsigmoid as Log(Sigmoid(x)), and logaddexp as
#   Log(Exp(x) + Exp(y)). ONNX Runtime's Sigmoid of -20 is 0, so that the log-probability of a binary student is -inf there, where PyTorch
#   gives -20; it is -14.8 for a logit of -15. Two teachers' log-probabilities of a text, -110 and -109, have a logaddexp of -inf, not -108.7; logits of
#   90 and 91 have inf. binary_cross_entropy_with_logits with a soft label of 0.5 is inf for a logit of -20, where it is 10. Nothing warns.
#   Right are -softplus(-x) for logsigmoid, and logsumexp of stacked tensors for logaddexp: these two, and log_softmax, are exported as operators
#   of ONNX that are stable. The loss is softplus(x) - x * label.
# Printed: for each function its operators in ONNX, its values in ONNX Runtime, and those of PyTorch.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cd "$folder"
cat > see.py <<'PY'
import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


x = torch.tensor([-10.0, -15.0, -20.0, -110.0, 90.0])
cases = {
    "logsigmoid": F.logsigmoid,
    "logaddexp": lambda x: torch.logaddexp(x, x + 1),
    "binary_cross_entropy_with_logits": lambda x: F.binary_cross_entropy_with_logits(x, torch.full_like(x, 0.5), reduction="none"),
    "-softplus(-x)": lambda x: -F.softplus(-x),
    "logsumexp": lambda x: torch.logsumexp(torch.stack([x, x + 1]), 0),
    "softplus(x) - x * label": lambda x: F.softplus(x) - x * 0.5,
    "log_softmax": lambda x: torch.log_softmax(x, 0),
}
seen = {}
for name, function in cases.items():
    model = torch.onnx.export(Module(function).eval(), (x,), dynamo=True, verbose=False).model_proto
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    got, want = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0], function(x).numpy()
    seen[name] = got, want
    print(name, [n.op_type for n in model.graph.node], "ONNX Runtime", got.round(2), "PyTorch", want.round(2))
for name, (got, want) in seen.items():
    assert np.isfinite(want).all(), "behavior has changed"
    if name == "logsigmoid":
        assert abs(got[1] + 15) > 0.05 and (got[2:4] == -np.inf).all(), "behavior has changed"
    elif name == "logaddexp":
        assert np.allclose(got[:3], want[:3]) and got[3] == -np.inf and got[4] == np.inf, "behavior has changed"
    elif name == "binary_cross_entropy_with_logits":
        assert abs(got[1] - 7.5) > 0.05 and (got[2:4] == np.inf).all(), "behavior has changed"
    else:
        assert np.allclose(got, want, rtol=1e-5), "behavior has changed"
PY
venv/bin/python -W ignore see.py 2> errors || { cat errors; exit 1; }
