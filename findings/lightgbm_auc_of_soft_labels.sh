#!/usr/bin/env bash
# LightGBM: with soft labels, the AUC is 1 for every model, and early stopping keeps the first tree.
#
# Packages: lightgbm 4.7.0, scikit-learn 1.9.1. Seen there, and checked by this script:
#   objective="cross_entropy" is the documented way to learn from a teacher's probabilities ("label is anything in interval [0, 1]"). Its metrics may
#   be "auc", "average_precision", "binary_error" and "binary_logloss", too, and these take every label above 0 for a positive example. A teacher's
#   probabilities are all above 0: there are no negatives, and the AUC and the average precision are 1 for any model, a trained one
#   and its opposite alike. Early stopping sees no improvement after the first tree and returns it: a loss of 0.65 instead of 0.37, by LightGBM's own
#   cross_entropy. "binary_logloss" goes up while the model gets better, with the same end. Nothing warns.
#   Right is metric="cross_entropy", or labels that are cut at 0.5 in the validation set.
# Printed: for each metric, its first and last value in 100 trees, the trees that early stopping keeps, and their cross-entropy; the AUC of the
#   trained model's predictions and of their opposites by LightGBM; and the AUC with labels that are cut, by both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q lightgbm==4.7.0 scikit-learn==1.9.1 numpy
cd "$folder"
cat > see.py <<'PY'
import warnings

import lightgbm as lgb
import numpy as np
from sklearn.metrics import roc_auc_score


class Log:
    warnings = []

    def info(self, text):
        pass

    def warning(self, text):
        self.warnings.append(text)


lgb.register_logger(Log())

random = np.random.default_rng(0)
inputs = random.normal(size=(3000, 5))
teacher = 1 / (1 + np.exp(-2 * inputs @ [1, -1, 0.5, 0, 0]))
options = {"objective": "cross_entropy", "verbose": 1, "num_threads": 1, "seed": 1, "deterministic": True}


def train(metric, labels=None, stop=True):
    train_set = lgb.Dataset(inputs[:2000], teacher[:2000])
    valid_set = lgb.Dataset(inputs[2000:], teacher[2000:] if labels is None else labels, reference=train_set)
    seen = {}
    callbacks = [lgb.record_evaluation(seen)] + [lgb.early_stopping(10, verbose=False)] * stop
    model = lgb.train({**options, "metric": metric}, train_set, 100, valid_sets=[valid_set], callbacks=callbacks)
    return model, seen["valid_0"][metric]


def cross_entropy(predicted):
    target = teacher[2000:]
    return -(target * np.log(predicted) + (1 - target) * np.log(1 - predicted)).mean()


assert teacher.min() > 0 and teacher.max() < 1
hard = teacher[2000:] > 0.5
with warnings.catch_warnings():
    warnings.simplefilter("error")
    kept = {}
    for metric in ("auc", "average_precision", "binary_error", "binary_logloss", "cross_entropy"):
        _, values = train(metric, stop=False)
        model, _ = train(metric)
        loss = cross_entropy(model.predict(inputs[2000:]))
        kept[metric] = values[0], values[-1], model.best_iteration, loss
        print("{}: {:.4f} to {:.4f}; kept {} trees, cross-entropy {:.4f}".format(metric, *kept[metric]))
    assert not Log.warnings, "behavior has changed"
    model, _ = train("cross_entropy")
    scores = model.predict(inputs[2000:], raw_score=True)
    of_scores = []
    for sign in (1, -1):  # the trained model's scores as the starting point, and one tree that may not split
        valid_set = lgb.Dataset(inputs[2000:], teacher[2000:], init_score=sign * scores)
        seen = {}
        still = {**options, "metric": "auc", "min_data_in_leaf": 5000, "verbose": -1, "boost_from_average": False}
        lgb.train(still, valid_set, 1, valid_sets=[valid_set], callbacks=[lgb.record_evaluation(seen)])
        of_scores.append(seen["training"]["auc"][-1])
    print("AUC of the trained model {:.4f}, of its opposite {:.4f}".format(*of_scores))
    model, values = train("auc", hard.astype(float))
    own = roc_auc_score(hard, model.predict(inputs[2000:]))
    print(f"labels cut at 0.5: AUC {max(values):.4f}, by scikit-learn {own:.4f}, kept {model.best_iteration} trees")
for metric in ("auc", "average_precision"):
    assert kept[metric][:3] == (1, 1, 1) and kept[metric][3] > 0.6, "behavior has changed"
assert kept["binary_logloss"][1] > kept["binary_logloss"][0] and kept["binary_logloss"][2] == 1, "behavior has changed"
assert kept["cross_entropy"][1] < 0.4 and kept["cross_entropy"][2] > 40 and kept["cross_entropy"][3] < 0.4, "behavior has changed"
assert kept["binary_error"][1] > 0.4 and ((model.predict(inputs[2000:]) > 0.5) == hard).mean() > 0.9, "behavior has changed"
assert of_scores == [1, 1], "behavior has changed"
assert abs(max(values) - own) < 1e-6 and own > 0.98 and model.best_iteration > 20, "behavior has changed"
PY
venv/bin/python see.py
