#!/usr/bin/env bash
# polars: a sum of Float16 by group loses up to a tenth of what the same sum without groups gives.
#
# Packages: polars 2.1.0, numpy 2.4.6. Seen there, and checked by this script:
#   Four texts of 5000 tokens, with a log-probability of -1.5 on average, stored as float16. Series.sum() of one text gives what the
#   float64 sum is, rounded to float16: -7612 for -7611. group_by("text").agg(pl.col("lp").sum()) gives -6940. It adds up in float16, where each
#   addend is rounded to the last digit of the sum so far, up to 4. Of 5000 probabilities that sum to 1, the group's sum is 0.93. A single group
#   of 100000 times 0.5 sums to 1024, where 50000 is a float16 as well. It is so in the in-memory and in the streaming engine, and which texts are wrong
#   by how much changes with the number of threads (one here). The mean by group is right, and so is the sum of Float32. Nothing warns.
#   So perplexities, lengths of masks or expected scores by text are wrong where those of a whole column are right.
#   Right is pl.col("lp").cast(pl.Float32).sum(), or the mean times the count.
# Printed: for each case and engine, sums by group, those of float64, of a Series, and of the cast column.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q polars==2.1.0 numpy==2.4.6
cd "$folder"
cat > see.py <<'PY'
import numpy as np
import polars as pl

generator = np.random.default_rng(0)
cases = {
    "log-probabilities": -generator.gamma(1.0, 1.5, size=(4, 5000)),
    "probabilities": generator.dirichlet(np.ones(5000), size=4),
    "0.5, 100000 times": np.full((1, 100000), 0.5),
}
for name, numbers in cases.items():
    numbers = numbers.astype(np.float16)
    texts, tokens = numbers.shape
    frame = pl.DataFrame({"text": np.repeat(np.arange(texts), tokens), "x": numbers.ravel()})
    assert frame["x"].dtype == pl.Float16
    wants = numbers.astype(np.float64).sum(1)
    series = np.array([frame.filter(pl.col("text") == t)["x"].sum() for t in range(texts)])
    print(f"{name}: float64", wants.round(3), "Series", series)
    for engine in ("in-memory", "streaming"):
        sums = frame.lazy().group_by("text").agg(
            sum=pl.col("x").sum(), mean=pl.col("x").mean(), cast=pl.col("x").cast(pl.Float32).sum(),
        ).sort("text").collect(engine=engine)
        print(f"  {engine}: by group", sums["sum"].to_list(), "cast", sums["cast"].to_numpy().round(3))
        lost = max(abs(sums["sum"].cast(pl.Float64).to_numpy() / wants - 1))
        least = {"log-probabilities": 0.04, "probabilities": 0.04, "0.5, 100000 times": 0.9}[name]
        assert lost > least, "behavior has changed"
        for right in (series, sums["cast"].to_numpy(), sums["mean"].cast(pl.Float64).to_numpy() * tokens):
            assert np.allclose(right, wants, rtol=2e-3), "behavior has changed"
PY
POLARS_MAX_THREADS=1 venv/bin/python see.py
