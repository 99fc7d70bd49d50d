#!/usr/bin/env bash
# scikit-learn's OneClassSVM: `tol` is absolute, so a small precomputed kernel returns the solver's starting point.
#
# Package: scikit-learn 1.9.1. Seen there, and checked by this script:
#   In theory the weights that OneClassSVM(kernel="precomputed") finds do not depend on the scale of the kernel. With tol=1e-6 and a
#   kernel 1e-7 times as large it stops at its first iterate: the first samples have all the weight.
#   AEKD's published code weights teachers by such a fit to a Gram matrix of batch-averaged gradients, which shrinks as 1 / N^2.
# Printed: the weights at both scales.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q scikit-learn==1.9.1
cd "$folder"
cat > see.py <<'PY'
import numpy as np
from sklearn.svm import OneClassSVM

vectors = np.array([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.5]])
gram = vectors @ vectors.T


def weights(kernel):
    fit = OneClassSVM(kernel="precomputed", nu=1 / (0.6 * len(kernel)), tol=1e-6).fit(kernel)
    found = np.zeros(len(kernel))
    found[fit.support_] = fit.dual_coef_[0]
    return (found / found.sum()).round(3)


large, small = weights(gram), weights(gram * 1e-7)
print("kernel:", large, " the same times 1e-7:", small)
assert np.allclose(small, [0.6, 0.4, 0.0]) and not np.allclose(large, small), "behavior has changed"
PY
venv/bin/python see.py
