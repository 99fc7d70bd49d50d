#!/usr/bin/env bash
# torch.distributions: the KL of two Categoricals is inf, and trains nothing, where the student is most wrong; in float16 from 17 nats on.
#
# Packages: torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   kl_divergence(Categorical(logits=teacher), Categorical(logits=student)) is computed of logits, so that one expects what F.kl_div of log_softmax
#   gives. But where the student's probability is 0 its term is set to inf, and the probability of a finite logit is 0 from 17 below the likeliest on in
#   float16, and from about 100 on in bfloat16 and float32. A student that gives the teacher's class a log-probability of -18 has a KL of 18 there.
#   The loss is inf, and as inf is a constant, the gradient of that class is that of a class that the teacher never gives: 0. All gradients are
#   finite, so that GradScaler and checks of gradients find nothing, steps are made, and the class is not learned. Here a student in float32, whose
#   logits are cast to float16 for the loss, ends with a probability of 0 for the teacher's class, and by F.kl_div with one of 0.97.
#   Nothing warns. Right are F.kl_div(log_softmax, log_softmax, log_target=True), and Categoricals of logits that were cast to float32.
# Printed: for each dtype and difference of logits, both losses and the gradient of the teacher's class; and the class's probability and the steps
#   that GradScaler made, after training by both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
cat > see.py <<'PY'
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

torch.set_num_threads(1)


def by_categorical(student, teacher):
    return kl_divergence(Categorical(logits=teacher), Categorical(logits=student)).mean()


def by_kl_div(student, teacher):
    return F.kl_div(F.log_softmax(student, -1), F.log_softmax(teacher, -1), reduction="batchmean", log_target=True)


def see(loss, gap, dtype):
    teacher = torch.tensor([[0.0, 5.0, 0.0]], dtype=dtype)
    student = torch.tensor([[0.0, -float(gap), -1.0]], dtype=dtype, requires_grad=True)
    value = loss(student, teacher)
    value.backward()
    assert student.grad.isfinite().all()
    return round(value.item(), 2), round(student.grad[0, 1].item(), 3)


for dtype, near, far in ((torch.float16, 16, 18), (torch.bfloat16, 80, 110), (torch.float32, 80, 110)):
    for gap in (near, far):
        got, want = see(by_categorical, gap, dtype), see(by_kl_div, gap, dtype)
        print(f"{dtype}, {gap} below: Categorical {got[0]}, gradient {got[1]}; F.kl_div {want[0]}, gradient {want[1]}")
        assert want[0] > 15 and want[1] < -0.9, "behavior has changed"
        if gap == near:
            assert abs(got[0] / want[0] - 1) < 0.02 and abs(got[1] - want[1]) < 0.02, "behavior has changed"
        else:
            assert got[0] == float("inf") and abs(got[1]) < 0.001, "behavior has changed"


def train(loss, dtype):
    weight = torch.tensor([[0.0, -20.0, -1.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 5.0, 0.0]], dtype=dtype)
    optimizer, scaler, made = torch.optim.SGD([weight], lr=0.5), torch.amp.GradScaler("cpu", init_scale=16.0), 0
    for _ in range(100):
        optimizer.zero_grad()
        before = weight.detach().clone()
        scaler.scale(loss(weight.to(dtype), teacher)).backward()
        scaler.step(optimizer)
        scaler.update()
        made += int(not torch.equal(before, weight.detach()))
    return weight.softmax(-1)[0, 1].item(), made, scaler.get_scale()


ends = {}
for name, loss, dtype in (
    ("Categorical", by_categorical, torch.float16),
    ("F.kl_div", by_kl_div, torch.float16),
    ("Categorical of float32", by_categorical, torch.float32),
):
    ends[name] = probability, made, scale = train(loss, dtype)
    print(f"trained by {name}: probability {probability:.4f}, steps made {made}, scale {scale}")
assert ends["Categorical"][0] < 1e-4 and ends["Categorical"][1] > 50 and ends["Categorical"][2] == 16, "behavior has changed"
assert ends["F.kl_div"][0] > 0.95 and ends["Categorical of float32"][0] > 0.95, "behavior has changed"
PY
venv/bin/python -W error see.py
