"""Which differences of a comparison are more than chance: paired t-tests over seeds.

Pure: numbers in, text out; nothing of the training code is imported.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from .tables import Blocks, Row, Table, sample_std

LEVEL = 0.05  # a difference with a smaller p is told from chance


class PairedTest(NamedTuple):
    """a - b over n seeds, as fractions: mean, sample standard deviation, and the paired t-test of a mean of 0.

    t, two-sided p, and the bounds of the mean's 95 % confidence interval; None in all of these where there is no spread to
    measure the mean by. One seed has no std either. A seed that diverged (NaN) makes everything NaN but n.
    """

    mean: float
    std: float | None
    n: int
    t: float | None = None
    p: float | None = None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {100 * self.std:.2f}"
        return f"{100 * self.mean:+.2f}{spread} points"


def paired_difference(a: Row, b: Row) -> PairedTest:
    """a - b seed by seed, so that what a seed does to both cancels. ValueError where the numbers of seeds differ.

    Where every seed shows the same difference there is no spread to measure it by. That is no proof: accuracies are shares of a few
    hundred or thousand images, and two seeds often differ by the same number of them.
    """
    if len(a.accuracies) != len(b.accuracies):
        want = f"{len(a.accuracies)} seeds like {a.label!r}"
        raise ValueError(f"paired_difference: {b.label!r} must have {want}, got {len(b.accuracies)}")
    # An accuracy is a share of some images: beyond 12 decimals is rounding, which must not pass for a spread.
    gaps = [round(x - y, 12) for x, y in zip(a.accuracies, b.accuracies, strict=True)]
    mean, std, n = statistics.fmean(gaps), sample_std(gaps), len(gaps)
    if not std:
        return PairedTest(mean, std, n)
    from scipy import stats  # here, because it takes a second to load and few who read tables need it

    test = stats.ttest_1samp(gaps, 0.0)
    interval = test.confidence_interval(0.95)
    return PairedTest(mean, std, n, *map(float, (test.statistic, test.pvalue, interval.low, interval.high)))


def verdict(a: Row, b: Row) -> str:
    """How a compares with b, as the end of a sentence that begins with a: the difference, and if it is chance.

    Each verdict is one test by itself: of twenty methods that are equal, one is told from another by chance.
    """
    test = paired_difference(a, b)
    points, other = f"{100 * test.mean:+.2f}", f"{b.label} ({100 * b.mean:.2f} %)"
    if test.p is None and math.isfinite(test.mean):
        where = f"{points[1:]} points {'above' if test.mean > 0 else 'below'}" if float(points) else "level with"
        seeds = "one seed" if test.n == 1 else f"{test.n} seeds with the same difference"
        return f"is {where} {other}, but {seeds} cannot tell that from chance"
    if test.p is None or math.isnan(test.p):
        return f"cannot be compared with {other}: a run diverged"
    measured = f"{test} over {test.n} seeds, {_p(test.p)} (paired t-test)"
    if test.p >= LEVEL:
        return f"cannot be told from {other}: {measured}"
    return f"{'beats' if test.mean > 0 else 'falls behind'} {other}: {measured}"


def paired_tests(main: Row, others: Sequence[Row]) -> Blocks:
    """main - each other row over the same seeds; nothing of one seed, or without others."""
    tests = [(other, paired_difference(main, other)) for other in others]
    lines = [
        (f"{main.label} - {other.label}", str(test), *_interval_and_p(test)) for other, test in tests if test.n > 1
    ]
    if not lines:
        return []
    header = ("Difference", f"{main.split.capitalize()} accuracy", "95 % interval", "Paired t-test")
    caption = f"Each line is one test by itself; of twenty that compare equals, one shows p < {LEVEL} by chance."
    return [Table(header, lines), caption]


def _interval_and_p(test: PairedTest) -> tuple[str, str]:
    if test.p is None or test.low is None or test.high is None:
        return "-", "-"
    return f"{100 * test.low:+.2f} to {100 * test.high:+.2f}", _p(test.p)


def _p(p: float) -> str:
    """Two significant digits, or as many more as it takes to stay on its side of the level."""
    if p < 0.001:
        return "p < 0.001"
    digits = next((k for k in range(2, 6) if (float(f"{p:.{k}g}") < LEVEL) == (p < LEVEL)), 6)
    return f"p = {p:.{digits}g}"
