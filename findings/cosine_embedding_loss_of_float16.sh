#!/usr/bin/env bash
# torch: in float16 nn.CosineEmbeddingLoss is 1, with a gradient of 0, for hidden states of norm 16 to 255.
#
# Packages: torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   The loss (DistilBERT's loss of hidden states) does not call F.cosine_similarity. It divides by the root of a product of two squared norms,
#   to each of which 1e-12 is added, all in the dtype of its input. In float16 that product overflows where the norms are 16 each, as those of
#   BERT's hidden states are: the loss of identical vectors is 1, that of opposite ones 1 as well, and the gradient is 0: nothing is trained, and
#   nothing warns. From norm 256 on, where the square overflows, it is NaN; at 0.01 it is -inf, at 0.001 NaN.
#   In float32 1e-12 counts for short vectors: one of norm 1e-6 has a loss of 0.5 with itself. bfloat16 has float32's range.
#   1 - F.cosine_similarity, which divides each vector by its norm first, is right in all of these. CUDA's autocast casts the inputs of this
#   loss to float32 (documented, not tried here); nothing does without autocast.
# Printed: for each dtype and norm, loss and 1 - cosine for equal and opposite vectors, and the gradient's norm for perpendicular ones.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
cat > see.py <<'PY'
import math

import torch
import torch.nn.functional as F

torch.manual_seed(0)
first, second = torch.linalg.qr(torch.randn(768, 2))[0].T.unsqueeze(1)
seen = {}
for dtype, norms in ((torch.float16, (1.0, 15.0, 16.0, 100.0, 255.0, 256.0, 300.0, 0.01, 1e-3)), (torch.float32, (17.0, 300.0, 1e-3, 1e-6)),
                     (torch.bfloat16, (17.0, 300.0, 1e-3, 1e-6))):
    for norm in norms:
        a, b = ((norm * x).to(dtype) for x in (first, second))
        row = []
        for loss in (lambda x, y: F.cosine_embedding_loss(x, y, torch.ones(1)), lambda x, y: (1 - F.cosine_similarity(x, y)).mean()):
            student = a.clone().requires_grad_()
            loss(student, b).backward()
            row += [loss(a, a).item(), loss(a, -a).item(), student.grad.float().norm().item() * norm]
        seen[dtype, norm] = row
        print(f"{dtype}, norm {norm:g}: loss {row[0]:.3f} {row[1]:.3f}, 1 - cosine {row[3]:.3f} {row[4]:.3f}, "
              f"gradients times norm {row[2]:.3f} {row[5]:.3f}")
for (dtype, norm), row in seen.items():
    assert abs(row[3]) < 0.01 and abs(row[4] - 2) < 0.01 and abs(row[5] - 1) < 0.05, "behavior has changed"
    right = abs(row[0]) < 0.01 and abs(row[1] - 2) < 0.01 and abs(row[2] - 1) < 0.05
    assert right == (norm in (1, 15) or dtype != torch.float16 and norm > 1e-5), "behavior has changed"
for norm in (16.0, 100.0, 255.0):
    assert seen[torch.float16, norm][:3] == [1, 1, 0], "behavior has changed"
assert all(math.isnan(x) for norm in (256.0, 300.0, 1e-3) for x in seen[torch.float16, norm][:2]), "behavior has changed"
assert seen[torch.float16, 0.01][0] == -math.inf, "behavior has changed"
for dtype in (torch.float32, torch.bfloat16):
    assert abs(seen[dtype, 1e-6][0] - 0.5) < 0.01, "behavior has changed"
PY
venv/bin/python see.py
