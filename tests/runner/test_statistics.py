"""The statistics against closed forms, published definitions and simulations whose truth is known.

Expected numbers marked (scipy), (arch) or (rliable) were computed once with scipy 1.17.1, arch 8.0.0 and rliable 1.2.0; none is
needed here. Simulations have fixed seeds: their bounds are wide of what was seen, and narrow enough to fail."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest

from runner import statistics as st
from runner.errors import UserError
from runner.statistics import Effect

TEN = [1., 2, 3, 4, 5, 7, 9, 12, 20, 40]  # skewed; mean 10.3
D7 = [1.2, -.3, .8, 2.2, .1, -.5, 1.7]
X = np.array([[1., 5, 0], [2, 6, 1], [4, 5, 1], [8, 7, 3]])  # (4 seeds, 3 tasks)


# ---- aggregates -------------------------------------------------------------------------------------------------------

def test_aggregates_by_hand():
    assert st.mean([1, 2, 6]) == 3 and st.median([9, 1, 2]) == 2 and st.median([1, 2, 4, 9]) == 3
    assert st.iqm(np.arange(8)) == (2 + 3 + 4 + 5) / 4
    assert st.iqm(np.arange(10) ** 2) == pytest.approx((4 + 9 + 16 + 25 + 36 + 49) / 6)  # int(2.5) = 2 from each end
    assert st.iqm([0, 1, 100]) == pytest.approx(101 / 3)  # int(0.75) = 0: nothing is cut
    assert st.trimmed_mean([5, 0, 1, 100, 2], 0.2) == pytest.approx(8 / 3)
    assert st.trimmed_mean([5, 0, 1, 100, 2], 0.4) == 2 and st.trimmed_mean([1, 2, 6], 0) == 3
    assert st.optimality_gap([0.5, 2.0, 1.0, -1.0]) == pytest.approx(1 - (0.5 + 1 + 1 - 1) / 4)
    assert st.optimality_gap([0.5, 2.0], gamma=2) == pytest.approx(0.75)


def test_iqm_is_over_all_runs_of_all_tasks_together():
    # sorted X: 0 1 1 | 1 2 3 4 5 5 | 6 7 8; scipy.stats.trim_mean(X, 0.25, axis=None) = 20 / 6
    assert st.iqm(X) == pytest.approx(20 / 6)
    assert st.iqm(X) != pytest.approx(np.mean([st.iqm(X[:, j]) for j in range(3)]))
    assert st.stratified_interval(X, "iqm", resamples=10).value == pytest.approx(20 / 6)


@pytest.mark.parametrize("f", [st.mean, st.median, st.iqm, st.trimmed_mean, st.optimality_gap])
def test_aggregates_along_an_axis_are_those_of_each_row(f):
    x = np.random.default_rng(0).normal(size=(5, 4, 11))
    assert f(x, axis=-1) == pytest.approx(np.array([[f(row) for row in block] for block in x]))
    assert f(x, axis=0) == pytest.approx(f(np.moveaxis(x, 0, -1), axis=-1))


def test_stratified_aggregates_weigh_tasks_as_published():
    value = lambda scores, s: st.stratified_interval(scores, s, resamples=10).value  # noqa: E731
    assert value(X, "median") == np.median([3.75, 5.75, 1.25])  # of the tasks' means (rliable), not of the runs, 3.5
    assert value(X, "mean") == pytest.approx((3.75 + 5.75 + 1.25) / 3)
    uneven = {"a": [0., 0], "b": [1.] * 6}
    assert value(uneven, "mean") == 0.5 and value(uneven, "optimality_gap") == 0.5  # one task, one voice
    assert value(uneven, "iqm") == 1  # over runs: 0 0 | 1 1 1 1 | 1 1
    assert "weight" in st.stratified_interval(uneven, "iqm", resamples=10).warnings[-1]
    assert value(X, lambda x, axis: x.max(axis=axis)) == 8


# ---- intervals of one sample --------------------------------------------------------------------------------------------

def test_percentile_interval_of_two_values_is_enumerable():
    e = st.bootstrap_interval([0, 1])  # means 0, 1/2, 1 with chances 1/4, 1/2, 1/4
    assert (e.value, e.low, e.high, e.n) == (0.5, 0, 1, 2)
    e = st.bootstrap_interval([0, 1], confidence=0.4)  # quantiles 0.3 and 0.7 lie on the middle
    assert (e.low, e.high, e.confidence) == (0.5, 0.5, 0.4)


def test_percentile_quantiles_are_those_of_the_full_enumeration():
    x = np.array([0., 1, 3, 7])
    every = np.array([np.mean(c) for c in itertools.product(x, repeat=4)])
    draws = st._resampled([x], lambda p: np.mean(p[0], axis=-1), 100_000, 0)
    for q in (0.1, 0.25, 0.5, 0.9):
        assert np.mean(draws <= np.quantile(every, q)) == pytest.approx(np.mean(every <= np.quantile(every, q)), abs=0.006)


def test_intervals_agree_with_scipy():
    # scipy.stats.bootstrap((TEN,), np.mean, n_resamples=400000): percentile (4.5, 18.1), BCa (5.4, 21.4)
    e = st.bootstrap_interval(TEN, resamples=100_000)
    assert (e.low, e.high) == pytest.approx((4.5, 18.1), abs=0.15)
    e = st.bootstrap_interval(TEN, method="bca", resamples=100_000)
    assert (e.low, e.high) == pytest.approx((5.4, 21.4), abs=0.25) and e.method == "bca" and not e.warnings
    # two samples, statistic (mean + mean) / 2, scipy's BCa: (3.683, 16.1)
    e = st.stratified_interval({"a": [1, 2, 4, 8, 16, 20], "b": [0, 1, 1, 5, 30]}, "mean", method="bca", resamples=100_000)
    assert (e.low, e.high) == pytest.approx((3.68, 16.1), abs=0.25) and e.n == 11


def test_bca_levels_are_efrons_formula():
    """For the mean the acceleration is skewness / (6 sqrt n); no bias if half the draws lie below."""
    x = np.array(TEN)
    c = x - x.mean()
    a = np.sum(c ** 3) / (6 * np.sum(c ** 2) ** 1.5)
    flat = lambda p: np.mean(p[0], axis=-1)  # noqa: E731
    draws = np.linspace(0, 20.6, 1000)  # symmetric about the mean: z0 = 0
    levels = st._bca_levels([x], flat, draws, x.mean(), np.array([0.025, 0.975]))
    z, phi = 1.959964, lambda v: 0.5 * math.erfc(-v / 2 ** 0.5)  # noqa: E731
    assert levels == pytest.approx([phi(-z / (1 + a * z)), phi(z / (1 - a * z))], abs=1e-6)
    draws = np.linspace(0, 41.2, 1000)  # a quarter below: z0 = Phi^-1(1/4) = -0.67449
    levels = st._bca_levels([x], flat, draws, x.mean(), np.array([0.025, 0.975]))
    want = [phi(-0.67449 + w / (1 - a * w)) for w in (-0.67449 - z, -0.67449 + z)]
    assert levels == pytest.approx(want, abs=1e-3)


def test_studentized_interval_is_the_textbooks():
    x, rng = np.array(TEN), np.random.default_rng(5)
    draws = x[rng.integers(10, size=(200_000, 10))]
    se = draws.std(axis=1, ddof=1)
    t = (draws.mean(axis=1) - x.mean())[se > 0] / se[se > 0] * 10 ** 0.5
    s = x.std(ddof=1) / 10 ** 0.5
    e = st.bootstrap_interval(TEN, method="studentized", resamples=100_000)
    assert e.low == pytest.approx(x.mean() - np.quantile(t, 0.975) * s, abs=0.1)
    assert e.high == pytest.approx(x.mean() - np.quantile(t, 0.025) * s, rel=0.06)


def test_intervals_shift_scale_and_forget_the_order():
    for method in ("percentile", "bca", "studentized"):
        e = st.bootstrap_interval(TEN, method=method)
        assert e == st.bootstrap_interval(TEN[::-1], method=method)
        other = st.bootstrap_interval(3 * np.array(TEN) - 7, method=method)
        assert other[:3] == pytest.approx([3 * v - 7 for v in e[:3]])
        assert e != st.bootstrap_interval(TEN, method=method, seed=1, resamples=999)
        wider = st.bootstrap_interval(TEN, method=method, confidence=0.99)
        assert wider.low < e.low < e.value < e.high < wider.high
    assert st.stratified_interval(X) == st.stratified_interval(np.stack([X[[2, 0, 3, 1], j] for j in range(3)], axis=1))


def coverage(draw, truth, trials=400, n=20, resamples=600, methods=("percentile", "bca", "studentized")):
    """Of `trials` samples: for each method the share of 95 % intervals that hold the truth, and of those above it."""
    rng, held, above = np.random.default_rng(7), dict.fromkeys(methods, 0), dict.fromkeys(methods, 0)
    for trial in range(trials):
        x = draw(rng, n)
        for m in methods:
            e = st.bootstrap_interval(x, method=m, resamples=resamples, seed=trial)
            held[m] += (e.low <= truth <= e.high) / trials
            above[m] += (e.low > truth) / trials
    return held, above


def test_coverage_on_normal_values():
    held, _ = coverage(lambda rng, n: rng.normal(3, 2, size=n), 3)
    for method, share in held.items():
        assert 0.90 <= share <= 0.98, (method, share)


def test_bca_is_nearer_to_nominal_than_percentile_on_skewed_values():
    held, _ = coverage(lambda rng, n: rng.lognormal(size=n), math.exp(0.5), trials=600)
    assert held["percentile"] + 0.01 < held["bca"] < 0.95  # 0.84 and 0.87 over 1500 trials
    assert held["bca"] + 0.01 < held["studentized"] < 0.97


def test_on_five_values_only_the_studentized_interval_keeps_its_confidence():
    held, above = coverage(lambda rng, n: rng.normal(size=n), 0, n=5, trials=600)
    assert held["percentile"] < 0.88 and held["bca"] < 0.88 and above["percentile"] > 0.05
    assert 0.92 <= held["studentized"] <= 0.99 and above["studentized"] <= 0.04
    assert "too narrow" in st.bootstrap_interval([1, 2, 3, 4, 6]).warnings[0]
    assert not st.bootstrap_interval([1, 2, 3, 4, 6], method="studentized").warnings


def test_few_and_equal_values():
    e = st.bootstrap_interval([4.0])
    assert (e.value, e.low, e.high, e.n) == (4, -math.inf, math.inf, 1) and "single" in e.warnings[0]
    assert "only 2" in st.bootstrap_interval([4.0, 5.0]).warnings[0]
    for method in ("percentile", "bca", "studentized"):
        e = st.bootstrap_interval([0.1] * 10, method=method)
        assert e.value == e.low == e.high == pytest.approx(0.1) and "equal" in e.warnings[0]
    e = st.bootstrap_interval([1., 2, 4], method="studentized")  # a ninth of resamples have no spread
    assert (e.low, e.high) == (-math.inf, math.inf) and "unbounded" in e.warnings[0]
    assert st.bootstrap_interval(list(range(10)), method="studentized").warnings == ()


def test_bca_falls_back_and_says_so():
    x = [0.] * 9 + [1.]  # the median of a resample is 0 but for chance; no value left out changes it
    e = st.bootstrap_interval(x, "median", method="bca")
    assert e.method == "percentile" and "BCa" in e.warnings[0] and (e.low, e.high) == (0, 0)
    e = st.bootstrap_interval(TEN, lambda v, axis: v.max(axis=axis), method="bca")  # no resample exceeds the maximum
    assert e.method == "bca" and e.high == 40  # ties count half, so there is still a bias to correct
    e = st.bootstrap_interval(TEN, lambda v, axis: v.max(axis=axis) * 0 + v.shape[-1], method="bca")
    assert e.method == "percentile" and e.warnings


def test_a_stratum_of_one_seed_has_no_interval():
    e = st.stratified_interval({"a": [1., 2, 3], "b": [5.]}, "mean")
    assert e.value == 3.5 and (e.low, e.high) == (-math.inf, math.inf) and "stratum" in e.warnings[0]


def test_strata_are_resampled_apart():
    """Tasks of very different levels but equal seeds: no spread within, so no width; joined, there would be."""
    far = np.array([[0., 100, 1000]] * 5)
    e = st.stratified_interval(far, "mean")
    assert e.low == e.high == pytest.approx(1100 / 3)
    far = far + np.random.default_rng(0).normal(size=far.shape)
    for statistic in ("mean", "median", "iqm"):
        e = st.stratified_interval(far, statistic)
        assert 0 < e.high - e.low < 3, statistic


def test_stratified_mean_has_the_closed_forms_variance():
    x = np.random.default_rng(1).normal(size=(12, 4)) * [1, 2, 3, 4]
    draws = st._resampled(list(x.T), st._STRATIFIED["mean"], 40_000, 0)
    assert draws.std() == pytest.approx(np.sqrt(np.sum(x.var(axis=0) / 12)) / 4, rel=0.02)
    e = st.stratified_interval(x, "mean", method="studentized")
    assert e.low < e.value - 1.9 * draws.std() and e.high > e.value + 1.9 * draws.std()


def test_stratified_intervals_agree_with_rliable():
    x = np.round(np.random.default_rng(11).normal(size=(10, 5)), 2)
    named = st.stratified_interval(x, "iqm")
    own = st.stratified_interval({f"t{j}": x[:, j] for j in range(5)}, st.iqm)
    assert named == own and named.n == 50
    # as rliable draws: an index for each (run, task)
    rng = np.random.default_rng(0)
    draws = [st.iqm(x[rng.integers(10, size=(10, 5)), np.arange(5)]) for _ in range(4000)]
    assert (named.low, named.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.03)


@pytest.mark.parametrize("call", [
    lambda: st.bootstrap_interval([]),
    lambda: st.bootstrap_interval([1, math.nan]),
    lambda: st.bootstrap_interval([1, math.inf]),
    lambda: st.bootstrap_interval(["one", "two"]),
    lambda: st.bootstrap_interval(X),
    lambda: st.bootstrap_interval(TEN, "meen"),
    lambda: st.bootstrap_interval(TEN, method="bac"),
    lambda: st.bootstrap_interval(TEN, "iqm", method="studentized"),
    lambda: st.bootstrap_interval(TEN, confidence=95),
    lambda: st.bootstrap_interval(TEN, resamples=0),
    lambda: st.stratified_interval({}),
    lambda: st.stratified_interval({"a": []}),
    lambda: st.stratified_interval({"a": [[1, 2]]}),
    lambda: st.stratified_interval(np.zeros((2, 2, 2))),
    lambda: st.trimmed_mean(TEN, 0.5),
    lambda: st.iqm([]),
    lambda: st.paired_difference([1, 2], [1, 2], strata=["a"]),
    lambda: st.paired_difference(X, X, strata=[0, 1, 2, 3]),
    lambda: st.probability_of_improvement({"a": [1, 2]}, {"b": [1, 2]}),
    lambda: st.performance_profile(X, [1], of="seeds"),
    lambda: st.curve_band([0, 1], np.zeros((3, 4))),
    lambda: st.simultaneous({}, [1, 2]),
    lambda: st.simultaneous({"a": [1, 2, 3]}, [1, 2]),
    lambda: st.simultaneous({"a": [1, 2]}, [1, 2], direction="up"),
    lambda: st.holm([0.1, 1.2]),
    lambda: st.holm([0.1, math.nan]),
    lambda: st.sign_flip_p_value(D7, alternative="more"),
    lambda: st.verdict(Effect(1, 0, 2, 0.95, 5), direction="up"),
    lambda: st.verdict(Effect(1, 0, 2, 0.95, 5), margin=math.nan),
])
def test_what_makes_no_sense_is_refused(call):
    with pytest.raises(UserError):
        call()


# ---- paired differences -------------------------------------------------------------------------------------------------

def test_a_paired_difference_is_the_interval_of_the_differences():
    b = np.array([10., 20, 30, 40, 50, 60, 70])
    e = st.paired_difference(b + D7, b)
    one = st.bootstrap_interval(np.round(b + D7 - b, 12))
    assert e[:3] == pytest.approx(one[:3]) and e.difference == pytest.approx(np.mean(D7)) and e.n == 7
    assert e[1:3] == pytest.approx((0.0571, 1.4429), abs=0.03)
    order = [3, 1, 6, 0, 2, 5, 4]
    assert st.paired_difference((b + D7)[order], b[order]) == e
    turned = st.paired_difference(b, b + D7)
    assert (-turned.high, -turned.low) == pytest.approx((e.low, e.high), abs=0.05)
    d = np.round(D7, 12)
    assert st.paired_difference(b + D7, b, statistic="iqm").difference == pytest.approx(st.iqm(d))


def test_pairing_narrows_what_goes_together():
    rng = np.random.default_rng(2)
    common = rng.normal(size=15) * 10
    a, b = common + 1 + rng.normal(size=15), common + rng.normal(size=15)
    paired = st.paired_difference(a, b)
    apart = st.paired_difference(a, rng.permutation(b))
    assert (paired.high - paired.low) * 4 < apart.high - apart.low


def test_strata_in_all_three_forms_are_one():
    a = np.random.default_rng(3).normal(size=(5, 3)) + [0, 10, 20]
    b = np.random.default_rng(4).normal(size=(5, 3)) + [0, 10, 20]
    e = st.paired_difference(a, b, method="bca")
    assert e == st.paired_difference({j: a[:, j] for j in range(3)}, {j: b[:, j] for j in range(3)}, method="bca")
    assert e == st.paired_difference(a.T.ravel(), b.T.ravel(), strata=[0] * 5 + [1] * 5 + [2] * 5, method="bca")
    mixed = st.paired_difference(a.ravel(), b.ravel(), strata=["x", "y", "z"] * 5, method="bca")
    assert mixed == e and e.n == 15
    assert e.difference == pytest.approx(np.mean(a - b))


def test_a_big_stratum_does_not_outvote_a_small_one():
    e = st.paired_difference({"s": [1., 1, 1], "t": [3.] * 30}, {"s": [0.] * 3, "t": [0.] * 30})
    assert e.difference == e.low == e.high == 2


@pytest.mark.parametrize("a, b, said", [
    ([1, 2, 3], [1, 2], "a has 3 runs and b 2"),
    ({"t": [1, 2, 3]}, {"t": [1, 2]}, "task t"),
    ({"t": [1, 2], "u": [1, 2]}, {"t": [1, 2]}, "only one has u"),
    (np.zeros((3, 2)), np.zeros((3, 3)), "different tasks"),
    (np.zeros((3, 2)), np.zeros((2, 2)), "a has 3 runs and b 2"),
    ([1, math.nan], [1, 2], "a: 1 of 2 values"),
])
def test_what_does_not_pair_is_refused_by_name(a, b, said):
    with pytest.raises(UserError) as e:
        st.paired_difference(a, b)
    assert said in str(e.value)


def test_few_pairs_warn_and_equal_ones_have_no_width():
    one, two = st.paired_difference([2.], [1.]), st.paired_difference([2., 3], [1., 1])
    assert (one.difference, one.low, one.high) == (1, -math.inf, math.inf) and "single pair" in one.warnings[0]
    assert (two.low, two.high) == (1, 2) and "only 2 pairs" in two.warnings[0]
    assert "few" in st.paired_difference([2., 3, 5], [1., 1, 1]).warnings[0]
    assert st.paired_difference(TEN, np.zeros(10)).warnings == ()
    b = np.array([0.1, 0.7, 1.3, 2.9])
    for method in ("percentile", "bca", "studentized"):
        e = st.paired_difference(b + 0.2, b, method=method)  # equal but for rounding
        assert e.low == e.high == e.difference == pytest.approx(0.2) and "equal" in e.warnings[-1]


# ---- one claim over several arms ------------------------------------------------------------------------------------------

def test_one_arm_is_the_studentized_difference():
    b = np.arange(7.)
    one = st.simultaneous({"x": b + D7}, b)
    e = st.paired_difference(b + D7, b, method="studentized")
    assert one.effect[:5] == pytest.approx(e[:5]) and one.effect.method == "max-t"
    again = st.simultaneous({"x": b + D7, "y": b + D7}, b).effect  # the same arm twice costs nothing
    assert again[:5] == pytest.approx(e[:5])


def test_the_best_arm_by_direction_and_wider_than_alone():
    rng = np.random.default_rng(0)
    b = rng.normal(size=12)
    arms = {f"tau={j}": b + j / 2 + rng.normal(size=12) for j in range(-2, 3)}
    up, down = st.simultaneous(arms, b), st.simultaneous(arms, b, direction="min")
    assert (up.best, down.best) == ("tau=2", "tau=-2") and up.effects == down.effects
    alone = st.paired_difference(arms["tau=2"], b, method="studentized")
    assert up.effect.difference == pytest.approx(alone.difference)
    assert up.effect.low < alone.low and up.effect.high > alone.high
    order = rng.permutation(12)
    mixed = st.simultaneous({k: v[order] for k, v in arms.items()}, b[order])
    assert mixed.effect[:3] == pytest.approx(up.effect[:3])
    tasks = st.simultaneous({k: v.reshape(6, 2) for k, v in arms.items()}, b.reshape(6, 2))
    labels = st.simultaneous(arms, b, strata=[0, 1] * 6)
    assert tasks == labels and tasks.effect.difference == pytest.approx(alone.difference)


def test_max_t_is_the_quantile_of_the_maximum():
    d = np.random.default_rng(6).normal(size=(15, 3))
    means, low, high = st._max_t([d], 0.9, 50_000, 0)
    se = d.std(axis=0, ddof=1) / 15 ** 0.5
    x = d[np.random.default_rng(9).integers(15, size=(50_000, 15))]  # (resamples, 15, 3): rows go together
    t = (x.mean(axis=1) - means) / (x.std(axis=1, ddof=1) / 15 ** 0.5)
    assert (means - low) / se == pytest.approx(np.full(3, np.quantile(t.max(axis=1), 0.95)), rel=0.02)
    assert (means - high) / se == pytest.approx(np.full(3, np.quantile(t.min(axis=1), 0.05)), rel=0.02)


@pytest.mark.parametrize("direction", ["max", "min"])
def test_picking_the_best_of_null_arms_does_not_support_it(direction):
    rng, trials, k, n = np.random.default_rng(8), 400, 10, 10
    naive = corrected = 0
    for trial in range(trials):
        b = rng.normal(size=n)
        arms = {str(j): rng.normal(size=n) for j in range(k)}
        s = st.simultaneous(arms, b, direction=direction, resamples=500, seed=trial)
        alone = st.paired_difference(arms[s.best], b, resamples=500, seed=trial)
        corrected += st.verdict(s.effect, 0, direction) == "supported"
        naive += st.verdict(alone, 0, direction) == "supported"
    assert corrected / trials <= 0.035 and naive / trials > 0.12, (corrected, naive)


def test_all_intervals_hold_together_and_a_real_effect_is_found():
    rng, trials, found, joint = np.random.default_rng(10), 200, 0, 0
    truth = {"none": 0.0, "some": 0.5, "much": 2.0}
    for trial in range(trials):
        b = rng.normal(size=20)
        s = st.simultaneous({k: b + v + rng.normal(size=20) for k, v in truth.items()}, b, resamples=500, seed=trial)
        found += s.best == "much" and st.verdict(s.effect, 0.5) == "supported"
        joint += all(e.low <= truth[k] <= e.high for k, e in s.effects.items())
    assert found / trials > 0.95 and joint / trials > 0.91


def test_arms_without_spread_or_seeds():
    b = np.arange(6.)
    s = st.simultaneous({"same": b, "constant": b + 1, "live": b + [0, 1, 0, 2, 1, 0]}, b)
    assert s.effects["same"][:3] == (0, 0, 0) and s.effects["constant"][:3] == (1, 1, 1) and s.best == "constant"
    assert s.effects["live"].low < 4 / 6 < s.effects["live"].high and "equal" in s.effects["same"].warnings[0]
    flat = b * 0
    live = st.simultaneous({"live": flat + [0, 1, 0, 2, 1, 0]}, flat).effect
    both = st.simultaneous({"live": flat + [0, 1, 0, 2, 1, 0], "flat": flat + 0.1}, flat)
    assert both.effects["live"][:3] == pytest.approx(live[:3], abs=1e-12)  # what is certain costs nothing
    s = st.simultaneous({"x": [1.], "y": [2.]}, [0.])
    assert s.best == "y" and s.effect[:3] == (2, -math.inf, math.inf) and s.effect.warnings
    s = st.simultaneous({"x": [1., 2, 4], "flat": [1., 1, 1]}, [0., 0, 0])
    assert s.effects["flat"][:3] == (1, 1, 1)
    assert s.effect.low == -math.inf and "unbounded" in s.effect.warnings[0] and st.verdict(s.effect) == "undecided"


# ---- rliable's other two ---------------------------------------------------------------------------------------------------

def test_probability_of_improvement_by_hand():
    p = lambda a, b: st.probability_of_improvement(a, b, resamples=100).value  # noqa: E731
    assert p([1, 2, 3], [0, 0]) == 1 and p([0, 0], [1, 2]) == 0 and p([1, 1], [1, 1]) == 0.5
    assert p([1, 3], [2, 2, 3]) == pytest.approx((0 + (1 + 1 + 0.5)) / 6)
    assert p({"a": [1, 3], "b": [5, 5]}, {"a": [2, 2, 3], "b": [4, 4]}) == pytest.approx((2.5 / 6 + 1) / 2)
    a, b = np.random.default_rng(0).normal(size=(2, 8, 4)).round(1)
    assert p(a, b) + p(b, a) == pytest.approx(1) and p(np.exp(a), np.exp(b)) == pytest.approx(p(a, b))


def test_probability_of_improvement_interval():
    a, b = np.random.default_rng(1).normal(size=(2, 10, 5)).round(1)
    e = st.probability_of_improvement(a + 0.3, b)
    rng, columns = np.random.default_rng(0), np.arange(5)
    draws = []
    for _ in range(3000):
        x, y = (v[rng.integers(10, size=(10, 5)), columns] for v in (a + 0.3, b))
        draws.append(np.mean((x[:, None] > y) + 0.5 * (x[:, None] == y)))
    assert (e.low, e.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.012) and e.n == 100
    assert e == st.probability_of_improvement((a + 0.3)[::-1], b[::-1])
    e = st.probability_of_improvement([5, 6, 7], [1, 2, 3])
    assert (e.value, e.low, e.high) == (1, 1, 1) and "order" in e.warnings[0]
    e = st.probability_of_improvement([5], [1, 2, 3])
    assert (e.value, e.low, e.high) == (1, 0, 1) and e.warnings


def test_performance_profile_by_hand():
    p = st.performance_profile(X, [-1, 1, 4.5, 5, 8])  # strictly above
    assert p.fraction == pytest.approx([1, 8 / 12, 5 / 12, 3 / 12, 0])
    assert p.low[[0, 4]].tolist() == [1, 0] and p.high[[0, 4]].tolist() == [1, 0]
    assert np.all(p.low <= p.fraction) and np.all(p.fraction <= p.high) and p.low[1] < p.high[1]
    p = st.performance_profile(X, [1.25, 3, 3.75, 5.75], of="tasks")  # means 3.75, 5.75, 1.25
    assert p.fraction == pytest.approx([2 / 3, 2 / 3, 1 / 3, 0])
    uneven = {"a": [0., 0], "b": [1.] * 6}
    assert st.performance_profile(uneven, [0.5]).fraction == 0.5
    one = st.performance_profile(X[:1], [2])
    assert one.fraction == pytest.approx(1 / 3) and (one.low[0], one.high[0]) == (0, 1)


def test_performance_profile_band_is_binomial():
    """Of one task the resampled fraction is Binomial(n, p) / n."""
    p = st.performance_profile(np.arange(20), np.arange(20) - 0.5, resamples=50_000)  # 20, 19 … 1 of 20 above
    for at in range(20):
        share = 1 - at / 20
        chance = np.cumsum([math.comb(20, k) * share ** k * (1 - share) ** (20 - k) for k in range(21)])
        if np.abs(chance - 0.025).min() > 0.003 and np.abs(chance - 0.975).min() > 0.003:  # no tie for chance to decide
            want = [np.searchsorted(chance, q) / 20 for q in (0.025, 0.975)]
            assert (p.low[at], p.high[at]) == pytest.approx(want), at
    assert (p.low[12], p.high[12]) == pytest.approx((0.2, 0.6))  # Binomial(20, 0.4)


# ---- learning curves -------------------------------------------------------------------------------------------------------

def test_curve_band_is_the_percentile_interval_at_each_point():
    values = np.random.default_rng(0).normal(size=(10, 40)).cumsum(axis=1)
    values[:, 0] = 0.3
    band = st.curve_band(np.arange(40), values)
    assert band.mean == pytest.approx(values.mean(axis=0)) and band.n == 10
    assert (band.low[0], band.high[0]) == (band.mean[0], band.mean[0]) and band.mean[0] == pytest.approx(0.3)
    for at in (5, 39):
        e = st.bootstrap_interval(values[:, at])
        assert (band.low[at], band.high[at]) == pytest.approx((e.low, e.high), abs=0.05 * (e.high - e.low))


def test_curve_band_without_enough_to_show():
    band = st.curve_band([0, 1], [[1., 2]])
    assert band.mean.tolist() == [1, 2] and np.isnan(band.low).all() and np.isnan(band.high).all()
    band = st.curve_band([0, 1, 2], [[1., 2, 3], [2., math.nan, 4], [3., 4, math.inf]])
    assert band.mean[0] == 2 and np.isfinite([band.low[0], band.high[0]]).all()
    assert np.isnan(band.mean[1:]).all() and np.isnan(band.low[1:]).all()


# ---- tests and verdicts ----------------------------------------------------------------------------------------------------

def test_holms_worked_example():
    # sorted 0.005 0.01 0.03 0.04: 4 * 0.005 = 0.02, 3 * 0.01 = 0.03, 2 * 0.03 = 0.06, then max(0.06, 0.04)
    h = st.holm([0.01, 0.04, 0.03, 0.005])
    assert h.adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02]) and h.rejected.tolist() == [True, False, False, True]
    assert st.holm([0.01, 0.04, 0.03, 0.005], alpha=0.06 + 1e-9).rejected.all()
    # statsmodels 0.15: multipletests([.01, .04, .03, .005, .2], method="holm")
    assert st.holm([.01, .04, .03, .005, .2]).adjusted == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.2])
    assert st.holm([0.6, 0.7]).adjusted.tolist() == [1, 1] and st.holm([0.05]).rejected.tolist() == [True]
    assert st.holm([]).adjusted.shape == (0,)


def test_sign_flips_by_enumeration():
    # n = 3, d = 1 2 4: sums +-7 +-5 +-3 +-1; of 8, those with |sum| >= 7 are 2, sum >= 7 is 1, sum <= 7 are all
    assert st.sign_flip_p_value([1, 2, 4]) == 2 / 8
    assert st.sign_flip_p_value([1, 2, 4], alternative="greater") == 1 / 8
    assert st.sign_flip_p_value([1, 2, 4], alternative="less") == 1
    # d = -1 2 4: sum 5; |sum| >= 5: +-7, +-5
    assert st.sign_flip_p_value([-1, 2, 4]) == 4 / 8 and st.sign_flip_p_value([-1, 2, 4], alternative="greater") == 2 / 8
    assert st.sign_flip_p_value([2, 3, 6], [3, 1, 2]) == 4 / 8
    assert st.sign_flip_p_value([0, 0, 0]) == 1
    # scipy.stats.permutation_test((D7,), np.mean, permutation_type="samples", n_resamples=inf)
    want = {"two-sided": 0.125, "greater": 0.0625, "less": 0.953125}
    assert {k: st.sign_flip_p_value(D7, alternative=k) for k in want} == want


def test_sign_flips_of_strata_weigh_them_equally():
    # strata of 1 and 2 pairs: terms 3/2, -1/2, -1/2, sum 1/2; sums >= 1/2 of 8: 5/2, 3/2, 3/2, 1/2
    assert st.sign_flip_p_value([1.5, -1, -1], strata=["a", "b", "b"], alternative="greater") == 4 / 8
    assert st.sign_flip_p_value([1.5, -1, -1], alternative="greater") == 5 / 8  # one stratum: the sum is -1/2
    assert st.sign_flip_p_value({"a": [2, 2], "b": [1]}, alternative="greater") == 1 / 8
    assert st.sign_flip_p_value({"a": [-2, 2, 2], "b": [1]}, {"a": [0, 0, 0], "b": [0]}, alternative="greater") == 4 / 16


def test_random_sign_flips_come_near_the_enumeration():
    d = np.random.default_rng(1).normal(0.1, 1, size=14)
    flips = 1 - 2 * ((np.arange(2 ** 14)[:, None] >> np.arange(14)) & 1)
    exact = np.mean(np.abs(flips @ d) >= abs(d.sum()) - 1e-12)
    assert 0.05 < exact < 0.9
    assert st.sign_flip_p_value(d, resamples=40_000) == pytest.approx(exact, abs=0.01)
    assert st.sign_flip_p_value(np.ones(12)) == 2 / 2 ** 12  # the last that is enumerated
    assert st.sign_flip_p_value(np.ones(40)) == 1 / 10_001  # never 0
    assert st.sign_flip_p_value(d) == st.sign_flip_p_value(d[::-1])


def test_sign_flips_reject_a_true_null_as_often_as_they_say():
    rng = np.random.default_rng(2)
    p = np.array([st.sign_flip_p_value(rng.normal(size=8)) for _ in range(1000)])
    for level in (0.05, 0.25, 0.5):
        assert np.mean(p <= level) == pytest.approx(level, abs=0.035)


def test_bootstrap_p_value_is_the_percentile_interval_turned_round():
    for shift in (0, 1.0, 3.0, 6.0, 10.3):
        d = np.array(TEN) - shift
        low = st.bootstrap_interval(d).low
        assert (st.bootstrap_p_value(d) < 0.05) == (low > 0), shift
    assert st.bootstrap_p_value(TEN, null=10.3) > 0.8
    assert st.bootstrap_p_value(TEN) == 2 / 10_001 and st.bootstrap_p_value([0., 0, 0]) == 1
    assert st.bootstrap_p_value([5.]) == 1 and st.bootstrap_p_value([1, 2, 3], [1, 2, 3]) == 1


@pytest.mark.parametrize("low, high, margin, up, down", [
    (0.1, 0.5, 0, "supported", "not supported"),
    (-0.5, -0.1, 0, "not supported", "supported"),
    (-0.1, 0.5, 0, "undecided", "undecided"),
    (0.0, 0.5, 0, "undecided", "not supported"),  # strictly above is asked; at the margin is ruled out
    (-0.5, 0.0, 0, "not supported", "undecided"),
    (0.0, 0.0, 0, "not supported", "not supported"),
    (0.3, 0.3, 0.2, "supported", "not supported"),
    (0.1, 0.5, 0.2, "undecided", "not supported"),
    (0.1, 0.2, 0.2, "not supported", "not supported"),  # wholly inside the margin: better, but not by enough
    (0.2, 0.4, 0.2, "undecided", "not supported"),
    (-0.1, 0.1, -0.2, "supported", "supported"),  # a negative margin claims to be no worse than by 0.2
    (0.1 + 0.2, 0.4, 0.3, "undecided", "not supported"),  # 0.30000000000000004 is at the margin
    (0.1, 0.1 + 0.2, 0.3, "not supported", "not supported"),
    (-math.inf, math.inf, 0, "undecided", "undecided"),
    (math.nan, math.nan, 0, "undecided", "undecided"),
])
def test_verdicts(low, high, margin, up, down):
    effect = Effect((low + high) / 2, low, high, 0.95, 10)
    assert st.verdict(effect, margin) == st.verdict(effect, margin, "max") == up
    assert st.verdict(effect, margin, direction="min") == down


# ---- cost --------------------------------------------------------------------------------------------------------------------

def test_ten_thousand_resamples_are_quick():
    x, y = np.random.default_rng(0).normal(size=(2, 10, 20))
    many = np.random.default_rng(0).normal(size=100)
    for limit, call in [(0.1, lambda m: st.bootstrap_interval(many, method=m)),
                        (1.0, lambda m: st.paired_difference(x, y, method=m))]:
        for method in ("percentile", "bca", "studentized"):
            best = math.inf
            for _ in range(3):  # the least of three: the machine may be busy
                start = time.perf_counter()
                call(method)
                best = min(best, time.perf_counter() - start)
            assert best < limit, (method, best)


def test_memory_is_bounded_by_blocks(monkeypatch):
    whole = st.stratified_interval(X, "iqm", resamples=2000)
    monkeypatch.setattr(st, "_BLOCK", 1000)
    parts = st.stratified_interval(X, "iqm", resamples=2000)
    assert parts[:3] == pytest.approx(whole[:3], abs=0.3) and parts.value == whole.value
    assert parts == st.stratified_interval(X, "iqm", resamples=2000)
    assert list(st._jackknife([np.array(TEN)], lambda p: np.mean(p[0], axis=-1)))[0] == pytest.approx(np.array(TEN) - 10.3)
