#!/usr/bin/env bash
# optax: float16 gradients of a norm of 256 or more are clipped to zeros, and float16 vectors of that norm have a cosine of 0.
#
# Packages: optax 0.2.8, jax 0.10.2, jaxlib 0.10.2 (CPU). Seen there, and checked by this script:
#   optax.global_norm adds squares in the gradients' dtype. In float16 their sum is inf from 65504 on, which is a norm of 256, far below what a
#   norm itself may be: a thousand gradients of 10 are enough. clip_by_global_norm divides by inf, so that every gradient of every dtype in the
#   tree is 0; the update that follows is 0 or momentum alone. No gradient is inf or NaN, so apply_if_finite has nothing to skip. Of
#   float16 gradients alone the norm is float16.
#   optax.losses.cosine_distance takes norms of the same kind: a vector of norm 300 has a distance of 1 to itself.
#   bfloat16 and float32 are right in all of these.
# Printed: for each dtype, the norm that optax finds, that of the clipped gradients, and distances of vectors to themselves.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy
cd "$folder"
cat > see.py <<'PY'
import jax
import jax.numpy as jnp
import optax

seen = {}
for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
    name = jnp.dtype(dtype).name
    gradients = {"large": jnp.full(1000, 10.0, dtype), "other": jnp.full(4, 100.0, jnp.float32)}
    clip = optax.clip_by_global_norm(1.0)
    clipped, _ = clip.update(gradients, clip.init(gradients))
    after = [float(jnp.linalg.norm(x.astype(jnp.float32))) for x in jax.tree.leaves(clipped)]
    distances = []
    for norm in (1.0, 200.0, 300.0):
        x = jnp.full((1, 768), norm / 768**0.5, dtype)
        distances.append(float(optax.losses.cosine_distance(x, x)[0]))
    assert optax.global_norm(gradients["large"]).dtype == dtype, "behavior has changed"
    guarded = optax.apply_if_finite(optax.chain(clip, optax.sgd(1.0, momentum=0.5)), 3)
    first, state = guarded.update(jax.tree.map(lambda x: jnp.full_like(x, 0.01), gradients), guarded.init(gradients))
    second, state = guarded.update(gradients, state)
    skipped, halves = int(state.total_notfinite), all(bool((2 * second[key] == first[key]).all()) for key in first)
    print(f"{name}: updates skipped by apply_if_finite {skipped}, the second is momentum alone {halves}")
    assert skipped == 0 and halves == (name == "float16"), "behavior has changed"
    seen[name] = float(optax.global_norm(gradients)), after, distances
    print(f"{name}: norm {seen[name][0]:.1f}, clipped {after[0]:.4f} and {after[1]:.4f}, distances", [round(d, 3) for d in distances])
for name, (norm, after, distances) in seen.items():
    if name == "float16":
        assert norm == float("inf") and after == [0, 0], "behavior has changed"
        assert abs(distances[0]) < 0.01 and abs(distances[1]) < 0.01 and distances[2] == 1, "behavior has changed"
    else:
        assert abs(norm - 374.2) < 1 and abs(sum(x * x for x in after) - 1) < 0.02, "behavior has changed"
        assert max(map(abs, distances)) < 0.01, "behavior has changed"
PY
venv/bin/python see.py
