#!/usr/bin/env bash
# Keras: with a distillation loss between layers, evaluating a Distiller changes the student.
#
# Packages: keras 3.15.1 (on torch 2.13.0, CPU build). Seen there, and checked by this script:
#   With FeatureDistillation(teacher_layer_name=..., student_layer_name=...) Distiller takes the student's layers from a forward pass of
#   their own, which is in training mode also when evaluate() calls for it. So evaluate() moves the moving statistics of the student's
#   BatchNormalization towards the data that it is tested on: predict() differs afterwards, and a second evaluate() of the same data
#   gives another loss. No optimizer step was made.
#   The distillation_loss that evaluate() gives is that of batch statistics: a student that is a copy of its teacher has one.
#   Nothing of this happens with LogitsDistillation, or with FeatureDistillation of the final outputs.
# Printed: for each loss, how far two evaluations move what the student predicts, both total losses, and the distillation_loss.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 keras==3.15.1 numpy
cd "$folder"
cat > see.py <<'PY'
import keras
import numpy as np
from keras import layers
from keras.distillation import Distiller, FeatureDistillation, LogitsDistillation


def network():
    keras.utils.set_random_seed(0)
    image = keras.Input((4,))
    maps = layers.ReLU(name="maps")(layers.BatchNormalization()(layers.Dense(8)(image)))
    return keras.Model(image, layers.Dense(3)(maps))


random = np.random.default_rng(0)
x, y = random.normal(3, 1, (64, 4)).astype("float32"), random.integers(0, 3, 64)
seen = {}
for name, loss in {
    "LogitsDistillation": LogitsDistillation(loss=keras.losses.KLDivergence()),
    "FeatureDistillation of outputs": FeatureDistillation(),
    "FeatureDistillation of layers": FeatureDistillation(teacher_layer_name="maps", student_layer_name="maps"),
}.items():
    student = network()
    distiller = Distiller(network(), student, loss)  # teacher and student have the same weights
    distiller.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = student.predict(x, verbose=0)
    first, second = (distiller.evaluate(x, y, verbose=0, return_dict=True) for _ in range(2))
    moved = abs(student.predict(x, verbose=0) - before).max()
    losses = first["total_loss"], second["total_loss"]
    print(f"{name}: moved {moved:.4f}, losses {losses[0]:.4f} {losses[1]:.4f}, distillation_loss", end=" ")
    print(f"{first['distillation_loss']:.4f}")
    seen[name] = bool(moved > 1e-3), abs(losses[0] - losses[1]) > 1e-3, first["distillation_loss"] > 1e-3
assert seen == {name: (name.endswith("layers"),) * 3 for name in seen}, "behavior has changed"
PY
KERAS_BACKEND=torch KERAS_HOME="$folder" venv/bin/python -W ignore see.py
