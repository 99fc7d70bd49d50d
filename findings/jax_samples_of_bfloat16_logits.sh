#!/usr/bin/env bash
# JAX: drawn from bfloat16 logits, the tokens of a vocabulary's tail never come, or come far too often with mode="high".
#
# Packages: jax 0.10.2, jaxlib 0.10.2 (CPU). Seen there, and checked by this script:
#   jax.random.categorical adds Gumbel noise of the logits' dtype and takes the largest. In bfloat16 the noise has 128 values, the largest of them
#   4.8, so that a token whose logit is 7 below the likeliest is hardly ever drawn, and among equal sums the first index wins. With a vocabulary of
#   32000 whose probabilities fall as 1 / rank, the tokens below a probability of 1e-4 have a third of the mass: of 4000 draws none is one of them,
#   in bfloat16 and in float16. Of 50000 equal logits in bfloat16 only the first two percent are drawn.
#   The documentation says that in float32 events of a probability below 1e-7 are biased, less with mode="high", and nothing of other types. In
#   bfloat16 mode="high" draws the tail 2.5 times as often as it should, in float16 a third as often.
#   float32 is right: logits.astype(float32), of the same bfloat16 logits, before the draw. So answers that a student learns from
#   (sequence-level distillation) are others than the teacher's by the type of its logits. Nothing warns.
#   jax.random.bernoulli has it, too: 0.001 in bfloat16 is true 0.0077 of the time.
# Printed: for each dtype and mode, the share of draws in the tail, and its mass; the largest of 400 draws from 50000 equal logits; the values
#   of the noise; and how often bernoulli of 0.001 is true.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy
cd "$folder"
cat > see.py <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

TOKENS = 32000
logits = np.random.default_rng(0).permutation(-np.log(np.arange(1, TOKENS + 1)))


def draw(logits, count, seed, **options):
    return np.asarray(jax.random.categorical(jax.random.key(seed), jnp.broadcast_to(logits, (count, len(logits))), **options))


def share(given, **options):
    exact = np.exp(np.asarray(given, np.float64))
    exact /= exact.sum()
    tail = exact < 1e-4
    ids = np.concatenate([draw(given, 500, seed, **options) for seed in range(8)])
    return tail[ids].mean().item(), exact[tail].sum().item()


seen = {}
for dtype in ("float32", "float16", "bfloat16"):
    given = jnp.asarray(logits, dtype)
    for name, options in (("default", {}), ("high", {"mode": "high"})):
        seen[dtype, name] = got, mass = share(given, **options)
        print(f"{dtype}, {name}: {got:.4f} of the draws in the tail, its mass is {mass:.4f}")
got, mass = share(jnp.asarray(logits, "bfloat16").astype("float32"))
print(f"bfloat16 logits as float32: {got:.4f}, mass {mass:.4f}")
assert abs(got - mass) < 0.04, "behavior has changed"
largest = {dtype: draw(jnp.zeros(50000, dtype), 400, 0).max().item() for dtype in ("float32", "bfloat16")}
print("largest of 400 draws from 50000 equal logits:", largest)
noise = np.asarray(jax.random.gumbel(jax.random.key(0), (1000000,), "bfloat16").astype("float32"))
print(f"Gumbel noise in bfloat16: {len(np.unique(noise))} values, the largest {noise.max():.4f}")
true = {dtype: jax.random.bernoulli(jax.random.key(0), jnp.full(1000000, 0.001, dtype)).mean().item() for dtype in ("float32", "bfloat16")}
print("bernoulli of 0.001:", {dtype: round(rate, 5) for dtype, rate in true.items()})
for got, mass in (seen["float32", "default"], seen["float32", "high"]):
    assert 0.3 < mass < 0.35 and abs(got - mass) < 0.04, "behavior has changed"
for dtype in ("float16", "bfloat16"):
    got, mass = seen[dtype, "default"]
    assert 0.3 < mass < 0.35 and got == 0, "behavior has changed"
assert seen["bfloat16", "high"][0] > 0.7 and seen["float16", "high"][0] < 0.15, "behavior has changed"
assert largest["float32"] > 48000 and largest["bfloat16"] < 1000, "behavior has changed"
assert len(np.unique(noise)) == 128 and 4.8 < noise.max() < 4.9, "behavior has changed"
assert 0.0008 < true["float32"] < 0.0012 and 0.0070 < true["bfloat16"] < 0.0085, "behavior has changed"
text = " ".join(jax.random.categorical.__doc__.split())
assert "in float32 sampling will be biased for events with probability less than about 1E-7" in text, "documentation has changed"
PY
venv/bin/python -W error see.py
