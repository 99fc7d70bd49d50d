#!/usr/bin/env bash
# torch: F.kl_div of a class that the teacher has masked is 0 or NaN, by the form of the target; the gradient is the same.
#
# Packages: torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   A teacher's logit of -inf is a probability of 0, or a log-probability of -inf. Given as a probability it adds 0 to F.kl_div, given as a
#   log-probability with log_target=True, the form that is advised against underflow, NaN. The student's gradient is finite and right in
#   both. So a training with masked vocabularies reports a loss of NaN, may be stopped for it, and learns as it should.
#   If the student has masked the class, too, both forms are NaN, and again with a finite gradient.
#   The gradient to the target, from which weights of teachers are learned, is NaN at that class in both forms.
# Printed: for each form, the loss, and the gradients to the student's log-probabilities and to the target.
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

teacher = torch.tensor([[2.0, 0.0, -math.inf]]).log_softmax(1)
students = {"the teacher alone": torch.tensor([[0.0, 1.0, 0.5]]), "both": torch.tensor([[0.0, 1.0, -math.inf]])}
seen = {}
for who, logits in students.items():
    for log_target in (False, True):
        student = logits.log_softmax(1).requires_grad_()
        target = (teacher if log_target else teacher.exp()).clone().requires_grad_()
        loss = F.kl_div(student, target, reduction="batchmean", log_target=log_target)
        gradients = torch.autograd.grad(loss, (student, target))
        seen[who, log_target] = loss.item(), *(g.isfinite().all().item() for g in gradients)
        shown = [" ".join(f"{x:.4f}" for x in g[0].tolist()) for g in gradients]
        print(f"masked by {who}, log_target={log_target}: loss {loss.item():.4f}, gradients [{shown[0]}], [{shown[1]}]")
assert math.isfinite(seen["the teacher alone", False][0]), "behavior has changed"
for key, (loss, student_is_finite, target_is_finite) in seen.items():
    assert math.isnan(loss) == (key != ("the teacher alone", False)), "behavior has changed"
    assert student_is_finite and not target_is_finite, "behavior has changed"
PY
venv/bin/python see.py
