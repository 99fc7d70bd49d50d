#!/usr/bin/env bash
# Keras: the weight of a distillation loss counts only if the loss stands in a list.
#
# Packages: keras 3.15.1 (on torch 2.13.0, CPU build). Seen there, and checked by this script:
#   Distiller takes one distillation loss or a list of them. With one, distillation_loss_weights is dropped and the weight is 1, without
#   a word: [0.1] trains with ten times the distillation that was asked for. [loss] with the same weights has 0.1.
#   Weights of a wrong length are an error with a list; with one loss they are taken, and dropped as well.
# Printed: the distillation_loss that evaluate() gives for each, and how far a step of SGD with learning rate 1 moves the student.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 keras==3.15.1 numpy
cd "$folder"
cat > see.py <<'PY'
import keras
import numpy as np
from keras.distillation import Distiller, LogitsDistillation


def network(seed):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])


random = np.random.default_rng(0)
x, y = random.normal(size=(64, 4)).astype("float32"), random.integers(0, 3, 64)
loss = LogitsDistillation(loss=keras.losses.KLDivergence())
seen = {}
for name, losses, weights in (
    ("one loss, no weights", loss, None),
    ("one loss, [0.1]", loss, [0.1]),
    ("one loss, [0.1, 0.2]", loss, [0.1, 0.2]),
    ("list of one, [0.1]", [loss], [0.1]),
):
    student = network(0)
    distiller = Distiller(network(1), student, losses, distillation_loss_weights=weights, student_loss_weight=0.0)
    distiller.compile(optimizer=keras.optimizers.SGD(1.0), loss="mse")
    value = distiller.evaluate(x, y, verbose=0, return_dict=True)["distillation_loss"]
    before = student.get_weights()
    distiller.fit(x, y, batch_size=64, epochs=1, verbose=0)
    step = sum(abs(new - old).sum() for new, old in zip(student.get_weights(), before))
    print(f"{name}: distillation_loss {value:.4f}, step {step:.4f}")
    seen[name] = [value, step]
try:
    Distiller(network(1), network(0), [loss], distillation_loss_weights=[0.1, 0.2])
except ValueError as error:
    print(f"list of one, [0.1, 0.2]: {error}")
else:
    raise AssertionError("behavior has changed")
full = np.array(seen.pop("one loss, no weights"))
for name, values in seen.items():
    part = 0.1 if name.startswith("list") else 1.0
    assert full.min() > 0.01 and np.allclose(values, part * full, rtol=1e-3), "behavior has changed"
PY
KERAS_BACKEND=torch KERAS_HOME="$folder" venv/bin/python -W ignore see.py
