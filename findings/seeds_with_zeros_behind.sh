#!/usr/bin/env bash
# NumPy: seeds that are made of several numbers are the same with zeros behind them, and large ones are those of their words.
#
# Packages: numpy 2.4.6. Seen there, and checked by this script:
#   SeedSequence takes a sequence of numbers, so that (seed, epoch) or (seed, epoch, step) have streams of their own. (1,), (1, 0) and
#   (1, 0, 0, 0) are one stream: up to four numbers zeros at the end do not count. So the stream of epoch 0 is that of the seed alone, and that
#   of a run's first step that of its epoch. (1, 0, 0, 0, 0) is another one. A number of more than 32 bits counts as its words, the lower
#   first: (2**32 + 5,) is (5, 1). default_rng has this from SeedSequence.
#   spawn() and spawn_key do not have it: children 0 and 1 and their parent differ.
# Printed: the first number of each stream.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6
cd "$folder"
cat > see.py <<'PY'
import numpy as np

seen = {}
for seed in ((1,), (1, 0), (1, 0, 0, 0), (1, 0, 0, 0, 0), (5, 1), (2**32 + 5,)):
    seen[seed] = np.random.default_rng(seed).random()
    print(f"{seed}: {seen[seed]:.6f}")
parent = np.random.SeedSequence(1)
children = [np.random.default_rng(child).random() for child in parent.spawn(2)]
print("children of 1:", " ".join(f"{x:.6f}" for x in children))
assert seen[(1,)] == seen[(1, 0)] == seen[(1, 0, 0, 0)] != seen[(1, 0, 0, 0, 0)], "behavior has changed"
assert seen[(2**32 + 5,)] == seen[(5, 1)], "behavior has changed"
assert len({seen[(1,)], *children}) == 3, "behavior has changed"
PY
venv/bin/python see.py
