"""The statistics of claims and comparisons: aggregates, bootstrap intervals, paired differences, tests, verdicts.

Scores are higher-is-better or lower-is-better numbers, one for each run. `scores` below is one of
    a 1-D array           (seeds,): one task
    a 2-D array           (seeds, tasks), as rliable has it
    a dict                {task: (seeds,)}; the tasks may have different numbers of seeds
A *stratum* is a task: seeds are resampled within each task, independently of the others, and the tasks stay as they are,
so an interval speaks of other seeds on the same tasks, never of other tasks.

Everything is deterministic: the same numbers, `seed` and `resamples` give the same result, in any order of the seeds.
Results carry `warnings`, a tuple of sentences (empty if all is well), and `method`, what really made the interval.
What cannot be computed honestly is refused (UserError) or unbounded, never dropped: a value that is not finite is refused,
and a stratum of one seed says nothing about its own spread, so the interval is (-inf, inf).

Three ways to make an interval, of which none is right for all:
    percentile    quantiles of the resampled statistic; simple, any statistic, too narrow on few values: of five normal ones,
                  85 % hold rather than 95 %, and a true zero is "supported" in 7 % of cases rather than 2.5 %
    bca           the same, corrected for bias and skew (Efron 1987); better on skewed values, as narrow on few
    studentized   resampled (mean* - mean) / se* (Efron & Tibshirani 1993, ch. 12.5); the mean only; keeps its confidence
                  down to four values; of three, unbounded

Sources: Agarwal et al. 2021, arXiv:2108.13264 (rliable: IQM, optimality gap, probability of improvement, profiles);
Efron 1987, JASA 82:171 (BCa); Davison & Hinkley 1997, eq. 5.22-5.27 (BCa of several strata);
Westfall & Young 1993 (max-t); Holm 1979, Scand. J. Statist. 6:65.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from runner.errors import UserError, unknown

RESAMPLES = 10_000
EXACT = 12  # up to this many pairs, all 2^n sign flips are enumerated
FEW = 8  # below this many in a stratum, percentile and bca intervals are said to be too narrow
_BLOCK = 4_000_000  # numbers held at once while resampling: 32 MB
_NORMAL = NormalDist()

SUPPORTED, NOT_SUPPORTED, UNDECIDED = "supported", "not supported", "undecided"


class Interval(NamedTuple):
    """A statistic and its confidence interval. `n` is the number of values, of all strata together."""

    value: float
    low: float
    high: float
    confidence: float
    n: int
    method: str = "percentile"
    warnings: tuple[str, ...] = ()


class Effect(NamedTuple):
    """A paired difference a - b, in the unit of the scores, and its confidence interval. `n` is the number of pairs."""

    difference: float
    low: float
    high: float
    confidence: float
    n: int
    method: str = "percentile"
    warnings: tuple[str, ...] = ()


class Simultaneous(NamedTuple):
    """Effects of several arms against one baseline; their intervals hold all together at the confidence stated."""

    best: str
    effects: dict[str, Effect]

    @property
    def effect(self) -> Effect:
        """The best arm's, paid for the choice among all of them."""
        return self.effects[self.best]


class Holm(NamedTuple):
    """Adjusted p-values and decisions, in the order given."""

    adjusted: np.ndarray
    rejected: np.ndarray


class Profile(NamedTuple):
    """Fractions of runs (or tasks) above each threshold, with a pointwise band. All arrays (thresholds,)."""

    thresholds: np.ndarray
    fraction: np.ndarray
    low: np.ndarray
    high: np.ndarray
    confidence: float


class Band(NamedTuple):
    """A mean learning curve over `n` seeds with a pointwise band. All arrays (points,)."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    confidence: float
    n: int


# ---- aggregates: each over all values, or along `axis` ----------------------------------------------------------------

def mean(values, axis=None):
    """The arithmetic mean."""
    return np.mean(_given(values, axis), axis=axis)


def median(values, axis=None):
    """The median; the mean of the middle two for an even number."""
    return np.median(_given(values, axis), axis=axis)


def trimmed_mean(values, proportion=0.25, axis=None):
    """The mean of what is left after floor(proportion * n) values are cut from each end (scipy.stats.trim_mean).
    proportion lies in [0, 0.5)."""
    if not 0 <= proportion < 0.5:
        raise UserError(f"trimmed_mean: proportion={proportion} must lie in [0, 0.5): it is cut from each end")
    values = _given(values, axis)
    if axis is None:
        values, axis = values.ravel(), -1
    values = np.moveaxis(values, axis, -1)
    n = values.shape[-1]
    cut = int(proportion * n)
    if cut:
        values = np.partition(values, (cut, n - cut - 1), axis=-1)[..., cut:n - cut]
    return np.mean(values, axis=-1)


def iqm(values, axis=None):
    """The interquartile mean: the 25 % trimmed mean over all runs of all tasks together (rliable's aggregate_iqm)."""
    return trimmed_mean(values, 0.25, axis)


def optimality_gap(scores, gamma=1.0, axis=None):
    """gamma - mean(min(score, gamma)): how far the runs fall short of gamma; lower is better (rliable)."""
    return gamma - np.mean(np.minimum(_given(scores, axis), gamma), axis=axis)


def _given(values, axis=None):
    values = np.asarray(values, dtype=np.float64)
    if (values.size if axis is None else values.shape[axis]) == 0:
        raise UserError("statistics: there are no values")
    return values


_FLAT = {"mean": mean, "median": median, "iqm": iqm, "trimmed_mean": trimmed_mean, "optimality_gap": optimality_gap}

# Of a list of strata, each (..., seeds of that stratum), to (...). A task counts as one task, however many seeds it has;
# only the IQM is, by definition, over all runs together.
_STRATIFIED = {
    "mean": lambda parts: sum(np.mean(p, axis=-1) for p in parts) / len(parts),
    "median": lambda parts: np.median(np.stack([np.mean(p, axis=-1) for p in parts], axis=-1), axis=-1),
    "iqm": lambda parts: iqm(_joined(parts), axis=-1),
    "optimality_gap": lambda parts: sum(optimality_gap(p, axis=-1) for p in parts) / len(parts),
}


def _joined(parts):
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def _aggregate(statistic, table) -> Callable:
    """The function of a list of strata that `statistic` means: a name in `table`, or a callable with `axis`."""
    if callable(statistic):
        return lambda parts: statistic(_joined(parts), axis=-1)
    if statistic not in table:
        raise unknown("statistic", statistic, table, "or a callable that takes axis=-1")
    if table is _FLAT:
        return lambda parts: _FLAT[statistic](_joined(parts), axis=-1)
    return table[statistic]


# ---- intervals --------------------------------------------------------------------------------------------------------

def bootstrap_interval(values, statistic="mean", confidence=0.95, method="percentile", resamples=RESAMPLES,
                       seed=0) -> Interval:
    """A statistic of one sample (n,). `statistic`: mean, median, iqm, trimmed_mean, optimality_gap, or a callable f(x, axis)
    that reduces the last axis of (resamples, n). method="studentized" is for the mean only."""
    values = _array(values, "values")
    if values.ndim != 1:
        raise UserError(f"bootstrap_interval takes one sample (n,), not shape {values.shape}: see stratified_interval")
    return Interval(*_interval([values], _aggregate(statistic, _FLAT), statistic, confidence, method, resamples, seed))


def stratified_interval(scores, statistic="iqm", confidence=0.95, method="percentile", resamples=RESAMPLES,
                        seed=0) -> Interval:
    """An aggregate over tasks; seeds are resampled within each task (rliable's stratified bootstrap).

    statistic: iqm, over all runs together; mean and optimality_gap (gamma 1), averaged over tasks; median, of the tasks'
    means, as rliable has it; or a callable f(x, axis) of all runs joined to (resamples, runs)."""
    parts = list(_strata(scores, "scores").values())
    out = Interval(*_interval(parts, _aggregate(statistic, _STRATIFIED), statistic, confidence, method, resamples, seed))
    if (statistic == "iqm" or callable(statistic)) and len({len(p) for p in parts}) > 1:
        said = "the tasks have different numbers of seeds, and this statistic is over runs: more seeds, more weight"
        out = out._replace(warnings=(*out.warnings, said))
    return out


def paired_difference(a, b, strata=None, statistic="mean", confidence=0.95, method="percentile", resamples=RESAMPLES,
                      seed=0) -> Effect:
    """The difference a - b of runs paired by their seeds: pairs are resampled within each stratum.

    a, b: scores of equal shape, a[i] and b[i] of the same seed. strata: for 1-D scores, one label for each pair.
    statistic: of the differences: mean (averaged over strata) or iqm (of all differences, not a difference of IQMs).
    Too few pairs for the method are said in `warnings`: fewer than three always, fewer than eight unless studentized."""
    parts = list(_pairs(a, b, strata).values())
    return Effect(*_interval(parts, _aggregate(statistic, _STRATIFIED), statistic, confidence, method, resamples, seed, "pairs"))


def _interval(parts, aggregate, statistic, confidence, method, resamples, seed, things="values"):
    """(value, low, high, confidence, n, method, warnings) of strata, each (seeds,)."""
    _check(confidence, resamples)
    if method not in ("percentile", "bca", "studentized"):
        raise unknown("method of an interval:", method, ("percentile", "bca", "studentized"))
    if method == "studentized" and statistic != "mean" and statistic is not mean:
        raise UserError('method="studentized" needs a standard error in closed form: statistic="mean" only')
    parts = [np.sort(p) for p in parts]  # in a given order, the draws do not depend on the order of the seeds
    n, least, tail = sum(map(len, parts)), min(map(len, parts)), (1 - confidence) / 2
    value = float(aggregate(parts))
    warnings = []
    if least == 1:
        warnings.append(f"a single {things[:-1]}{'' if n == 1 else ' in a stratum'} says nothing about spread: no interval")
        return value, -np.inf, np.inf, confidence, n, method, tuple(warnings)
    if least < 3:
        warnings.append(f"only {least} {things}{'' if n == least else ' in a stratum'}: the interval means little")
    elif least < FEW and method != "studentized":
        warnings.append(f"{least} {things}{'' if n == least else ' in a stratum'} are few: a {method} interval is too narrow "
                        "(of five, 85 to 90 % hold rather than 95 %)")
    if all(p[0] == p[-1] for p in parts):
        warnings.append(f"all {things} are equal: an interval without width")
        return value, value, value, confidence, n, method, tuple(warnings)
    if method == "studentized":
        _, low, high = _max_t([p[:, None] for p in parts], confidence, resamples, seed)
        if not np.isfinite([low[0], high[0]]).all():
            warnings.append(f"too few {things} for a studentized interval: unbounded")
        return value, float(low[0]), float(high[0]), confidence, n, method, tuple(warnings)

    draws = _resampled(parts, aggregate, resamples, seed)
    levels = np.array([tail, 1 - tail])
    if method == "bca":
        corrected = _bca_levels(parts, aggregate, draws, value, levels)
        if isinstance(corrected, str):
            warnings.append(f"BCa: {corrected}; a percentile interval instead")
            method = "percentile"
        else:
            levels = corrected
    low, high = np.quantile(draws, levels)
    return value, float(low), float(high), confidence, n, method, tuple(warnings)


def _resampled(parts, aggregate, resamples, seed):
    """(resamples,) values of `aggregate` over strata resampled with replacement, in blocks of bounded memory."""
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // sum(map(len, parts)))
    out = np.empty(resamples)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        out[start:start + rows] = aggregate([p[rng.integers(len(p), size=(rows, len(p)))] for p in parts])
    return out


def _bca_levels(parts, aggregate, draws, value, levels):
    """The quantiles to read instead of `levels`, or a sentence on why there are none.

    Bias z0 = Phi^-1(share of draws below the value), ties counted half. Acceleration from the jackknife,
    a = sum_s sum_i l_si^3 / n_s^3 / (6 (sum_s sum_i l_si^2 / n_s^2)^1.5), l_si = (n_s - 1)(mean_s - value without i)."""
    tie = 1e-12 * (np.ptp(draws) + abs(value))  # sums of the same values in another order
    below = np.mean(draws < value - tie) / 2 + np.mean(draws <= value + tie) / 2
    if not 0 < below < 1:
        return "all resampled values lie on one side of the statistic, or are equal"
    square = cube = 0.0
    for influence in _jackknife(parts, aggregate):
        n = len(influence)
        square += np.sum(influence ** 2) / n ** 2
        cube += np.sum(influence ** 3) / n ** 3
    if not square > tie ** 2:
        return "the statistic does not change when any one value is left out"
    acceleration = cube / (6 * square ** 1.5)
    z0 = _NORMAL.inv_cdf(below)
    z = z0 + np.array([_NORMAL.inv_cdf(q) for q in levels])
    scale = 1 - acceleration * z
    if not np.all(scale > 0):
        return "the correction for skew is too large"
    return np.array([_NORMAL.cdf(q) for q in z0 + z / scale])


def _jackknife(parts, aggregate):
    """For each stratum, (seeds,) influences: (n - 1)(mean - value without i), over the strata's leave-one-outs."""
    total = sum(map(len, parts))
    for s, part in enumerate(parts):
        n, without = len(part), []
        block = max(1, _BLOCK // total)
        for start in range(0, n, block):
            rows = np.arange(start, min(n, start + block))
            kept = np.arange(n - 1) + (np.arange(n - 1) >= rows[:, None])
            others = [part[kept] if t == s else np.broadcast_to(p, (len(rows), len(p))) for t, p in enumerate(parts)]
            without.append(aggregate(others))
        without = np.concatenate(without)
        yield (n - 1) * (without.mean() - without)


def _counts(rng, n, resamples):
    """(resamples, n) float: how often each of n values is in each resample of n. A resampled mean is counts @ values / n."""
    drawn = rng.integers(n, size=(resamples, n))
    drawn += n * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=n * resamples).reshape(resamples, n).astype(np.float64)


# ---- comparisons ------------------------------------------------------------------------------------------------------

def simultaneous(arms: Mapping[str, object], baseline, strata=None, direction="max", confidence=0.95, resamples=RESAMPLES,
                 seed=0) -> Simultaneous:
    """The best of k arms against a baseline, its interval corrected for the choice (a claim over a sweep).

    Max-t: seeds are resampled jointly over arms and baseline, within strata. The lower ends stand at
    mean_j - q se_j, with q the (1 + confidence) / 2 quantile of max_j (mean*_j - mean_j) / se*_j; the upper ends likewise by the
    minimum. So each side holds for all arms at once, whichever is picked: if no arm differs from the baseline, the
    best is found "supported" in at most (1 - confidence) / 2 of cases. Arms that go together cost less than Bonferroni's k.
    Valid but blunt on few seeds: of ten arms, the ends stand some 22 se out for 5 seeds, 5 for 8, 3.3 for 20.
    The best arm is that of the greatest mean difference (direction="max") or the least ("min"). For one arm it is
    paired_difference(method="studentized"). Arms: {name: scores}, each paired with `baseline` by seeds."""
    _check(confidence, resamples)
    sign = _sign(direction)
    if not arms:
        raise UserError("simultaneous: there are no arms")
    pairs = {name: _pairs(scores, baseline, strata, f"arm {name}", "the baseline") for name, scores in arms.items()}
    tasks = list(next(iter(pairs.values())))
    parts = [np.stack([p[task] for p in pairs.values()], axis=1) for task in tasks]  # each (seeds, arms)
    parts = [p[np.lexsort(p.T[::-1])] for p in parts]
    n, least = sum(map(len, parts)), min(map(len, parts))
    differences, low, high = _max_t(parts, confidence, resamples, seed)
    best = max(range(len(pairs)), key=lambda j: sign * differences[j])
    effects = {}
    for j, name in enumerate(pairs):
        warnings = []
        if least == 1:
            warnings.append(f"a single pair{'' if n == 1 else ' in a stratum'} says nothing about spread: no interval")
        elif all(np.ptp(p[:, j]) == 0 for p in parts):
            warnings.append("all pairs are equal: an interval without width")
        else:
            if least < 3:
                warnings.append(f"only {least} pairs{'' if n == least else ' in a stratum'}: the interval means little")
            if not np.isfinite([low[j], high[j]]).all():
                warnings.append("too few pairs for a studentized interval: unbounded")
        effects[name] = Effect(float(differences[j]), float(low[j]), float(high[j]), confidence, n, "max-t", tuple(warnings))
    return Simultaneous(list(pairs)[best], effects)


def _max_t(parts, confidence, resamples, seed):
    """(means, lows, highs), each (k,), of strata (seeds, k): k means with intervals that hold together.

    The rows are resampled jointly. A resample without any spread has se* = 0 and t* = +-inf: with three rows one in
    nine, and then the interval is unbounded, which is what three rows know."""
    strata, k = len(parts), parts[0].shape[1]
    means = sum(p.mean(axis=0) for p in parts) / strata
    if min(map(len, parts)) == 1:
        return means, np.full(k, -np.inf), np.full(k, np.inf)
    constant = np.all([np.ptp(p, axis=0) == 0 for p in parts], axis=0)
    variance = sum(p.var(axis=0) / (len(p) - 1) for p in parts) / strata ** 2  # of the mean
    rng = np.random.default_rng(seed)
    shift, spread = np.zeros((resamples, k)), np.zeros((resamples, k))
    for p in parts:
        n, centred = len(p), p - p.mean(axis=0)
        counts = _counts(rng, n, resamples)
        first = counts @ centred / n
        shift += first / strata
        spread += (counts @ centred ** 2 / n - first ** 2) / (n - 1) / strata ** 2
    se = np.sqrt(variance)
    spread[spread <= 1e-12 * variance] = 0  # rounding
    shift[np.abs(shift) <= 1e-12 * se] = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(shift == 0, 0.0, shift / np.sqrt(spread))
    t[:, constant] = 0
    tail = (1 - confidence) / 2  # method: no interpolation, for it would make nan of inf - inf
    most = np.quantile(t.max(axis=1), 1 - tail, method="higher")
    least = np.quantile(t.min(axis=1), tail, method="lower")
    with np.errstate(invalid="ignore"):
        low, high = means - most * se, means - least * se
    return means, np.where(constant, means, low), np.where(constant, means, high)


def probability_of_improvement(a, b, confidence=0.95, resamples=RESAMPLES, seed=0) -> Interval:
    """P(X > Y) + P(X = Y) / 2 over all pairs of a run X of `a` and Y of `b`, averaged over tasks (rliable; Mann-Whitney's U
    over n_a n_b). Not paired by seeds: the two may differ in their numbers. Both are resampled within each task
    (percentile interval). A side with one run of a task: [0, 1]. `n` counts the runs of both."""
    _check(confidence, resamples)
    a, b = _strata(a, "a"), _strata(b, "b")
    _same_tasks(a, b, "a", "b")
    rng = np.random.default_rng(seed)
    value, draws = 0.0, np.zeros(resamples)
    least, n = np.inf, 0
    for task in a:
        x, y = np.sort(a[task]), np.sort(b[task])
        wins = (x[:, None] > y) + 0.5 * (x[:, None] == y)  # (n_a, n_b)
        value += wins.mean() / len(a)
        least, n = min(least, len(x), len(y)), n + len(x) + len(y)
        drawn = np.sum((_counts(rng, len(x), resamples) @ wins) * _counts(rng, len(y), resamples), axis=1)
        draws += drawn / wins.size / len(a)
    if least == 1:
        return Interval(float(value), 0.0, 1.0, confidence, n, "percentile", ("a single run says nothing about spread",))
    warnings = (f"only {least} runs of a side: the interval means little",) if least < 3 else ()
    if draws.min() == draws.max():
        warnings += ("no resample changes the order: an interval without width",)
    low, high = np.clip(np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2]), 0, 1)
    return Interval(float(value), float(low), float(high), confidence, n, "percentile", warnings)


def performance_profile(scores, thresholds, of="runs", confidence=0.95, resamples=RESAMPLES, seed=0) -> Profile:
    """The fraction of scores above each threshold tau, strictly (rliable). of="runs": the share of a task's runs with
    score > tau, averaged over tasks (run-score distribution). of="tasks": the share of tasks whose mean is > tau
    (average-score distribution). The band is pointwise, percentile, seeds resampled within tasks; one seed: [0, 1]."""
    _check(confidence, resamples)
    if of not in ("runs", "tasks"):
        raise unknown("value of `of`:", of, ("runs", "tasks"))
    parts = [np.sort(p) for p in _strata(scores, "scores").values()]
    thresholds = np.atleast_1d(_array(thresholds, "thresholds"))
    rng = np.random.default_rng(seed)
    fraction, draws = np.zeros(len(thresholds)), np.zeros((len(thresholds), resamples))
    for p in parts:
        counts = _counts(rng, len(p), resamples)
        if of == "runs":
            above = (p > thresholds[:, None]).astype(np.float64)  # (thresholds, seeds)
            fraction += above.mean(axis=1)
            draws += above @ counts.T / len(p)
        else:
            fraction += p.mean() > thresholds
            draws += counts @ p / len(p) > thresholds[:, None]
    fraction /= len(parts)
    if min(map(len, parts)) == 1:
        return Profile(thresholds, fraction, np.zeros_like(fraction), np.ones_like(fraction), confidence)
    low, high = np.quantile(draws / len(parts), [(1 - confidence) / 2, (1 + confidence) / 2], axis=1)
    return Profile(thresholds, fraction, np.clip(low, 0, 1), np.clip(high, 0, 1), confidence)


def curve_band(steps, values, confidence=0.95, resamples=RESAMPLES, seed=0) -> Band:
    """The mean of learning curves, values (seeds, points) at steps (points,), with a pointwise percentile band: whole
    curves are resampled. Where a seed's value is not finite all three are nan (no seed is dropped); one seed: no band."""
    _check(confidence, resamples)
    steps, values = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or steps.shape != values.shape[1:] or not len(values):
        raise UserError(f"curve_band: values (seeds, points) and steps (points,) are needed, not {values.shape}, {steps.shape}")
    n, points = values.shape
    whole = np.isfinite(values).all(axis=0)
    average, low, high = (np.full(points, np.nan) for _ in range(3))
    first = values[0, whole]
    average[whole] = first + (values[:, whole] - first).mean(axis=0)  # exact where all seeds agree
    if n > 1:
        counts = _counts(np.random.default_rng(seed), n, resamples).T
        chosen, block = np.flatnonzero(whole), max(1, _BLOCK // resamples)
        for start in range(0, len(chosen), block):
            at = chosen[start:start + block]
            draws = (values[:, at] - average[at]).T @ counts / n
            low[at], high[at] = average[at] + np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2], axis=1)
    return Band(steps, average, low, high, confidence, n)


# ---- tests and verdicts -----------------------------------------------------------------------------------------------

def holm(p_values, alpha=0.05) -> Holm:
    """Holm's step-down correction of m p-values: adjusted p_(i) = max over j <= i of min(1, (m - j + 1) p_(j)); a hypothesis
    is rejected if its adjusted p <= alpha. The chance of any false rejection is at most alpha, whatever the dependence."""
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not np.all((p >= 0) & (p <= 1)):
        raise UserError("holm: p-values (m,) in [0, 1] are needed")
    if not 0 < alpha < 1:
        raise UserError(f"alpha={alpha} must lie in (0, 1)")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]))
    return Holm(adjusted, adjusted <= alpha)


def sign_flip_p_value(a, b=None, strata=None, alternative="two-sided", resamples=RESAMPLES, seed=0) -> float:
    """The permutation p-value of a mean paired difference (of `a` itself if b is None): the share of sign flips of the
    differences with a mean at least as extreme. Exact by enumeration up to 12 pairs, where it is never below 2^-n (one
    side) or 2^(1-n); beyond, `resamples` random flips, (1 + hits) / (1 + resamples).
    alternative: two-sided, greater (a > b), less."""
    _check(0.5, resamples)
    if alternative not in ("two-sided", "greater", "less"):
        raise unknown("alternative", alternative, ("two-sided", "greater", "less"))
    parts = list((_pairs(a, b, strata) if b is not None else _strata(a, "differences", strata)).values())
    terms = np.sort(np.concatenate([p / len(p) for p in parts]))  # so that a sum is the mean over strata, up to a factor
    n, observed = len(terms), terms.sum()
    tie = 1e-12 * np.abs(terms).sum()
    rng = np.random.default_rng(seed)
    total, hits = (2 ** n, 0) if n <= EXACT else (resamples, 1)
    block = max(1, _BLOCK // n)
    for start in range(0, total, block):
        rows = np.arange(start, min(total, start + block))
        flips = (rows[:, None] >> np.arange(n)) & 1 if n <= EXACT else rng.integers(2, size=(len(rows), n))
        sums = (1 - 2 * flips) @ terms
        if alternative == "two-sided":
            hits += np.count_nonzero(np.abs(sums) >= abs(observed) - tie)
        else:
            sign = 1 if alternative == "greater" else -1
            hits += np.count_nonzero(sign * sums >= sign * observed - tie)
    return float(hits / (total + (n > EXACT)))


def bootstrap_p_value(a, b=None, strata=None, null=0.0, statistic="mean", resamples=RESAMPLES, seed=0) -> float:
    """Two-sided p-value of a paired difference (of `a` itself if b is None) being `null`: the percentile interval turned
    round, 2 min(P*(d* <= null), P*(d* >= null)) with one added to each count. As optimistic on few pairs as that
    interval is; prefer sign_flip_p_value. 1 if a stratum has one pair."""
    _check(0.5, resamples)
    parts = list((_pairs(a, b, strata) if b is not None else _strata(a, "differences", strata)).values())
    parts = [np.sort(p) for p in parts]
    if min(map(len, parts)) == 1:
        return 1.0
    draws = _resampled(parts, _aggregate(statistic, _STRATIFIED), resamples, seed) - null
    tie = 1e-12 * np.abs(np.concatenate(parts)).max()
    tail = min(np.count_nonzero(draws <= tie), np.count_nonzero(draws >= -tie))
    return float(min(1.0, 2 * (1 + tail) / (1 + resamples)))


def verdict(effect: Effect, margin=0.0, direction="max") -> str:
    """What an effect (method - baseline) says about a claim of an improvement by more than `margin`. The improvement is the
    difference, its sign turned for direction="min".

    "supported": the whole interval of the improvement lies strictly above the margin.
    "not supported": the upper end of the interval lies at or below the margin: so great an improvement is ruled out.
    "undecided": the interval reaches from the margin or below it to above it, or there is none: more seeds are needed."""
    low, high = (effect.low, effect.high) if _sign(direction) > 0 else (-effect.high, -effect.low)
    if not np.isfinite(margin):
        raise UserError(f"margin={margin} must be finite")
    rounding = 1e-12 * max(abs(v) for v in (low, high, margin) if np.isfinite(v))  # an end equal but for it is at the margin
    if low > margin + rounding:
        return SUPPORTED
    return NOT_SUPPORTED if high <= margin + rounding else UNDECIDED


# ---- what is given ----------------------------------------------------------------------------------------------------

def _sign(direction):
    if direction not in ("max", "min"):
        raise unknown("direction", direction, ("max", "min"))
    return 1 if direction == "max" else -1


def _check(confidence, resamples):
    if not 0 < confidence < 1:
        raise UserError(f"confidence={confidence} must lie in (0, 1), for example 0.95")
    if not resamples >= 1:
        raise UserError(f"resamples={resamples} must be at least 1")


def _array(values, what):
    """float64 copy, not empty, finite, or a UserError."""
    try:
        values = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"{what}: numbers of a regular shape are needed") from None
    if not values.size:
        raise UserError(f"{what}: there are no values")
    bad = np.count_nonzero(~np.isfinite(values))
    if bad:
        raise UserError(f"{what}: {bad} of {values.size} values are not finite\n"
                        "a run that diverged is a result: give it the score it deserves, or leave it out by name")
    return values


def _strata(scores, what, labels: Sequence | None = None) -> dict:
    """{task: (seeds,)}, in the order given, of any of the three forms of scores."""
    if isinstance(scores, Mapping):
        out = {task: _array(v, f"{what}, task {task}") for task, v in scores.items()}
        if not out:
            raise UserError(f"{what}: there are no tasks")
        for task, v in out.items():
            if v.ndim != 1:
                raise UserError(f"{what}, task {task}: one score for each seed is needed, not shape {v.shape}")
    else:
        values = _array(scores, what)
        if values.ndim not in (1, 2):
            raise UserError(f"{what}: shape (seeds,) or (seeds, tasks) is needed, not {values.shape}")
        out = {0: values} if values.ndim == 1 else dict(enumerate(values.T))
        if labels is not None and values.ndim == 1:
            labels = list(labels)
            if len(labels) != len(values):
                raise UserError(f"strata: {len(labels)} labels for {len(values)} values of {what}")
            return {name: values[[i for i, label in enumerate(labels) if label == name]] for name in dict.fromkeys(labels)}
    if labels is not None:
        raise UserError(f"strata: labels go with a 1-D array; {what} has its tasks already")
    return out


def _same_tasks(a, b, a_name, b_name):
    if a.keys() != b.keys():
        odd = [str(t) for t in [*a, *b] if (t in a) != (t in b)]
        raise UserError(f"{a_name} and {b_name} have different tasks: only one has {', '.join(odd[:6])}")


def _pairs(a, b, strata, a_name="a", b_name="b") -> dict:
    """{task: (pairs,)} of differences a - b, or a UserError where they do not pair."""
    lengths = [len(x) if hasattr(x, "__len__") else 0 for x in (a, b)]
    if not isinstance(a, Mapping) and not isinstance(b, Mapping) and lengths[0] != lengths[1]:  # before labels are counted
        raise UserError(f"{a_name} has {lengths[0]} runs and {b_name} {lengths[1]}: runs are paired by seed, one to one")
    a, b = _strata(a, a_name, strata), _strata(b, b_name, strata)
    _same_tasks(a, b, a_name, b_name)
    out = {}
    for task, x in a.items():
        y = b[task]
        if len(x) != len(y):
            raise UserError(f"{a_name} has {len(x)} runs of task {task} and {b_name} {len(y)}: "
                            "runs are paired by seed, one to one")
        d = x - y
        if np.ptp(d) <= 4 * np.finfo(np.float64).eps * max(np.abs(x).max(), np.abs(y).max()):
            d = np.full_like(d, d[0])  # equal but for rounding
        out[task] = d
    return out
