#!/usr/bin/env bash
# optax: triplet_margin_loss with norm_degree=1 takes sums of differences for distances, which may be negative; with 3 it is NaN.
#
# Packages: optax 0.2.8, jax 0.10.2, jaxlib 0.10.2 (CPU). Seen there, and checked by this script:
#   norm_degree is documented as the degree of the norm of the distances, and nothing takes absolute values. For 2 and 4 none are needed. For 1 the
#   distance of 0 to (3, -3) is 0, and to (1, 1) it is -2: the loss of a triplet changes when all its vectors change their signs, and is 9 for a
#   negative at (5, 5), five times as far as its positive (1, 1), where it should be 0. Of random triplets of 16 numbers half have a negative
#   distance, and the mean loss is 2.8 where it is 2.2 by its definition; the gradient to an embedding is the same in all its 16 places.
#   For 3 a root of a negative number is NaN, in 69 % of the random triplets. Nothing warns.
# Printed: the loss of these triplets; and of random ones, for each degree, the mean loss (of those that are not NaN), that by its definition,
#   and the share of NaN.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy
cd "$folder"
cat > see.py <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
import optax


def loss(anchors, positives, negatives, degree):
    return optax.losses.triplet_margin_loss(*map(jnp.asarray, (anchors, positives, negatives)), norm_degree=degree)


def defined(anchors, positives, negatives, degree):
    anchors, positives, negatives = (np.asarray(x, np.float64) for x in (anchors, positives, negatives))
    near, far = (np.linalg.norm(anchors - x, ord=degree, axis=-1) for x in (positives, negatives))
    return np.maximum(near - far + 1, 0)


zero, near, far = (np.full((1, 2), x, np.float32) for x in (0, 1, 5))
signs = [loss(zero, sign * near, sign * far, 1).item() for sign in (1, -1)]
print(f"0, (1, 1), (5, 5): {signs[0]:.4f}; with all signs changed {signs[1]:.4f}; by its definition {defined(zero, near, far, 1).item():.4f}")
same = loss(zero, np.array([[3, -3]], np.float32), zero, 1).item() - 1
print(f"distance of 0 to (3, -3): {same:.4f}")
triplets = np.random.default_rng(0).normal(size=(3, 10000, 16)).astype(np.float32)
seen = {}
for degree in (1, 2, 3, 4):
    got, want = np.asarray(loss(*triplets, degree)), defined(*triplets, degree)
    seen[degree] = np.nanmean(got), want.mean(), np.isnan(got).mean()
    print("degree {}: {:.4f}, by its definition {:.4f}, NaN {:.0%}".format(degree, *seen[degree]))
gradient = np.asarray(jax.grad(lambda x: loss(triplets[0], x, triplets[2], 1).sum())(triplets[1]))
spread = np.ptp(gradient, axis=1).max()
negative = ((triplets[0] - triplets[1]).sum(-1) < 0).mean()
print(f"degree 1: largest minus smallest gradient in an embedding {spread:.1g}, negative distances {negative:.0%}")
assert abs(signs[0] - 9) < 1e-3 and signs[1] == 0 and defined(zero, near, far, 1) == 0 and abs(same) < 1e-3, "behavior has changed"
assert seen[1][2] == 0 and seen[1][0] - seen[1][1] > 0.3 and spread == 0 and 0.45 < negative < 0.55, "behavior has changed"
assert 0.6 < seen[3][2] < 0.8, "behavior has changed"
for degree in (2, 4):
    assert abs(seen[degree][0] - seen[degree][1]) < 1e-4 and seen[degree][2] == 0, "behavior has changed"
PY
venv/bin/python -W ignore see.py
