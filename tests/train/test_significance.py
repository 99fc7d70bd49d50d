"""Means, paired tests and verdicts: the arithmetic."""

import math
import statistics

import pytest
from figure_rows import cells, rows
from scipy import stats

from amtml_fast.train.figures import significance
from amtml_fast.train.figures.markdown import render
from amtml_fast.train.figures.tables import Row


def test_mean_and_sample_std():
    row = Row("m", "M", 1, [0.89, 0.90, 0.94])
    assert row.mean == pytest.approx(0.91)
    assert row.std == pytest.approx(math.sqrt((0.02**2 + 0.01**2 + 0.03**2) / 2))  # ddof = 1: over n - 1
    assert Row("m", "M", 1, [0.9]).std is None


def test_the_table_of_paired_tests_is_their_numbers():
    ours = Row("amtml_kd", "AMTML-KD", 10, [0.80, 0.82, 0.81])
    other, level = Row("a", "A", 10, [0.78, 0.79, 0.785]), Row("b", "B", 10, [0.80, 0.82, 0.81])
    lines = render(significance.paired_tests(ours, [other, level])).splitlines()
    gaps = [0.02, 0.03, 0.025]
    low, high = stats.t.interval(0.95, 2, statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(3))
    p = stats.ttest_rel(ours.accuracies, other.accuracies).pvalue
    interval = f"{100 * low:+.2f} to {100 * high:+.2f}"
    assert cells(lines[2]) == ["AMTML-KD - A", "+2.50 ± 0.50 points", interval, f"p = {p:.2g}"]
    assert cells(lines[3]) == ["AMTML-KD - B", "+0.00 ± 0.00 points", "-", "-"]
    assert render(significance.paired_tests(Row("c", "C", 10, [0.5]), [Row("d", "D", 10, [0.6])])) == ""
    assert render(significance.paired_tests(ours, [])) == ""


@pytest.mark.parametrize("accuracies", [[], [0.9, 91.0], [-0.1]])
def test_a_row_refuses_what_is_no_fraction(accuracies):
    with pytest.raises(ValueError, match=r"Row 'M': accuracies must"):
        Row("m", "M", 1, accuracies)


def test_paired_difference_cancels_what_seeds_share():
    student, average, ours = rows()
    assert significance.paired_difference(ours, average)[:3] == pytest.approx((0.01, 0.0, 3))
    mean, std, n, *_ = significance.paired_difference(ours, student)
    gaps = [0.03, 0.04, -0.01]
    assert (mean, std, n) == pytest.approx((statistics.fmean(gaps), statistics.stdev(gaps), 3))
    assert str(significance.paired_difference(ours, student)) == "+2.00 ± 2.65 points"
    assert significance.paired_difference(student, ours).mean == pytest.approx(-0.02)
    assert significance.paired_difference(Row("a", "A", 1, [0.5]), Row("b", "B", 1, [0.4])).std is None
    with pytest.raises(ValueError, match="'B' must have 3 seeds like 'AvgMKD', got 1"):
        significance.paired_difference(average, Row("b", "B", 1, [0.4]))


def pair(gaps: list[float]) -> tuple[Row, Row]:
    """Two rows whose accuracies differ by these, seed by seed."""
    base = [0.80 + 0.01 * i for i in range(len(gaps))]
    return Row("a", "A", 1, [x + gap for x, gap in zip(base, gaps, strict=True)]), Row("b", "B", 1, base)


TWO_SIDED = {  # p of Student's t with these degrees of freedom, in closed form
    1: lambda t: 1 - 2 / math.pi * math.atan(abs(t)),
    2: lambda t: 1 - abs(t) / math.sqrt(2 + t * t),
    4: lambda t: 1 - abs(t) * (t * t + 6) / (t * t + 4) ** 1.5,
}


@pytest.mark.parametrize("gaps", [[0.03, 0.01], [0.03, 0.04, -0.01], [-0.02, -0.03, -0.01, -0.025, -0.04]])
def test_the_paired_t_test_by_its_formula(gaps):
    a, b = pair(gaps)
    test = significance.paired_difference(a, b)
    n, error = len(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
    t = statistics.fmean(gaps) / error
    assert (test.t, test.p) == pytest.approx((t, TWO_SIDED[n - 1](t)))
    assert (test.low + test.high) / 2 == pytest.approx(statistics.fmean(gaps))
    edge = (test.high - test.low) / 2 / error  # the t beyond which 5 % lie
    assert TWO_SIDED[n - 1](edge) == pytest.approx(0.05)
    theirs = stats.ttest_rel(a.accuracies, b.accuracies)
    assert (test.t, test.p) == pytest.approx((theirs.statistic, theirs.pvalue))
    assert (test.low, test.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))


@pytest.mark.parametrize("gap", [0.1, -0.1, 0.0, 1e-16])
def test_equal_differences_have_no_spread_and_so_no_test(gap):
    """Two seeds of a small test set often differ by the same number of images; and 0.1 + 0.2 - 0.2 and its like differ in the
    last bit, which is no spread."""
    test = significance.paired_difference(*pair([gap] * 3))
    assert test == (pytest.approx(gap, abs=1e-12), 0, 3, None, None, None, None)


def test_one_seed_and_a_diverged_one_have_no_p():
    assert significance.paired_difference(*pair([0.1]))[1:] == (None, 1, None, None, None, None)
    a, b = Row("a", "A", 1, [0.9, math.nan, 0.8]), Row("b", "B", 1, [0.9, 0.7, 0.8])
    for test in (significance.paired_difference(a, b), significance.paired_difference(b, a)):
        assert test.n == 3
        assert all(math.isnan(value) for value in (test.mean, test.std, test.t, test.p, test.low, test.high))


@pytest.mark.parametrize(
    ("gaps", "said"),
    [
        ([0.02], "is 2.00 points above B (80.00 %), but one seed cannot tell that from chance"),
        ([-0.02], "is 2.00 points below B (80.00 %), but one seed cannot tell that from chance"),
        ([0.0], "is level with B (80.00 %), but one seed cannot tell that from chance"),
        ([0.03, 0.02, 0.03], "beats B (81.00 %): +2.67 ± 0.58 points over 3 seeds, p = 0.015 (paired t-test)"),
        (
            [-0.03, -0.02, -0.03],
            "falls behind B (81.00 %): -2.67 ± 0.58 points over 3 seeds, p = 0.015 (paired t-test)",
        ),
        ([0.03, 0.01], "cannot be told from B (80.50 %): +2.00 ± 1.41 points over 2 seeds, p = 0.3 (paired t-test)"),
        (
            [0.02, 0.02],
            "is 2.00 points above B (80.50 %), but 2 seeds with the same difference cannot tell that from chance",
        ),
        ([0.0, 0.0], "is level with B (80.50 %), but 2 seeds with the same difference cannot tell that from chance"),
        ([math.nan, 0.1], "cannot be compared with B (80.50 %): a run diverged"),
        ([math.nan], "cannot be compared with B (80.00 %): a run diverged"),
    ],
)
def test_the_verdict_says_what_was_measured_and_whether_it_is_chance(gaps, said):
    assert significance.verdict(*pair(gaps)) == said


def test_a_difference_of_more_than_its_spread_may_still_be_chance():
    """Three seeds: the mean is 1.9 times the deviation, p is 0.08."""
    said = significance.verdict(*pair([0.01, 0.02, 0.027]))
    assert said.startswith("cannot be told from B") and "+1.90 ± 0.85 points" in said


@pytest.mark.parametrize(
    ("p", "said"),
    [(0.0334, "p = 0.033"), (0.0496, "p = 0.0496"), (0.0504, "p = 0.05"), (0.00099, "p < 0.001"), (0.001, "p = 0.001")],
)
def test_p_is_rounded_but_never_over_the_level(p, said):
    assert significance._p(p) == said
