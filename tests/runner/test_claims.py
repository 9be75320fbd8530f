"""Claims: plans are checked before anything runs, verdicts follow from the runs, records are kept honest."""

from __future__ import annotations

import json

import pytest
import yaml

from runner import claims
from runner.catalogue import Catalogue
from runner.errors import UserError

PLAN = {
    "hypothesis": "a < b & \"c\"", "methods": ["kd"], "env": "pointmass", "size": "smoke", "seeds": 5, "metric": "return",
    "direction": "max", "margin": 0.0, "refuted_by": "an interval below zero",
    "arms": {"new": {"method": "adpo", "role": "method"}, "old": {"method": "kd", "role": "baseline"}},
}


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Write a plan (PLAN with changes) as the claim `mine` and load it."""
    def write(**changes):
        text = {k: v for k, v in {**PLAN, **changes}.items() if v is not None}
        path = tmp_path / "claim" / "preference" / "mine.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(text, sort_keys=False))
        monkeypatch.setattr(claims, "paths", lambda: {"mine": path})
        return claims.load("mine", Catalogue())
    return write


def finished(plan, values, tmp_path, fail=(), **fields):
    """Folders of finished runs with given metric values {arm: [per setting and seed]}."""
    from runner.record import Record
    from runner.run import folder_of

    todo = claims.jobs(plan, Catalogue(), [f"runs={tmp_path / 'runs'}"], {})
    counters = dict.fromkeys(values, 0)
    for (arm, _, _), (_, job) in todo.items():
        index, folder = counters[arm], folder_of(job)
        counters[arm] += 1
        folder.mkdir(parents=True, exist_ok=True)
        status = "failed" if (arm, index) in fail else "done"
        Record(folder).write(id=job.id, status=status, config=job.config, seed=job.config["seed"], commit="c0ffee",
                             device="cpu", seconds=1.0, metrics={plan.text["metric"]: values[arm][index]}, **fields)
    return todo


NOISE = [0.3, -0.2, 0.1, 0.25, -0.15]


@pytest.mark.parametrize(("shift", "direction", "margin", "expected"), [
    (2.0, "max", 0.0, "supported"), (-2.0, "max", 0.0, "not supported"), (0.02, "max", 0.0, "undecided"),
    (-2.0, "min", 0.0, "supported"), (2.0, "min", 0.0, "not supported"),
    (2.0, "max", 5.0, "not supported"), (2.0, "max", 2.0, "undecided")])
def test_verdicts(plan, tmp_path, shift, direction, margin, expected):
    p = plan(direction=direction, margin=margin)
    base = [10.0, 30.0, 20.0, 25.0, 15.0]  # seeds differ far more than arms: only pairing can see the effect
    todo = finished(p, {"new": [b + shift + n for b, n in zip(base, NOISE)], "old": base}, tmp_path)
    result = claims.judge(p, todo, {}, False, 1.0)
    assert result["verdict"] == expected
    assert result["effect"] == pytest.approx(shift + sum(NOISE) / 5)
    assert result["interval"][0] <= result["effect"] <= result["interval"][1]
    assert result["arms"]["old"]["values"] == base and result["arms"]["old"]["iqm"] == pytest.approx(20.0)


def test_a_diverged_run_counts_as_failed(plan, tmp_path):
    p = plan()
    values = {"new": [12.0, float("nan"), 12.5, 13.0, 12.0], "old": [1.0, 2.0, 3.0, 4.0, 5.0]}
    result = claims.judge(p, finished(p, values, tmp_path), {}, False, 1.0)
    assert result["arms"]["new"]["failed"] == [1] and result["verdict"] == "undecided"
    json.dumps(result, allow_nan=False)


SWEPT = {"tau": {"method": "adpo", "sweep": {"method.tau": [0.5, 1.0, 2.0, 4.0]}}, "old": PLAN["arms"]["old"]}


@pytest.mark.parametrize(("slope", "expected"), [(0.7, "supported"), (-0.7, "not supported"), (0.01, "undecided")])
def test_a_study_judges_a_fitted_slope(plan, tmp_path, slope, expected):
    """Values slope * log2(tau) + a level of the seed + noise without slope: the fit must find the slope, seed by seed."""
    p = plan(arms=SWEPT, analysis={"kind": "slope", "arm": "tau", "knob": "method.tau", "scale": "log2"}, also=["return_std"])
    values = {"old": [0.0] * 5}
    for log, name in zip((-1, 0, 1, 2), (a.name for a in p.arms)):
        values[name] = [slope * log + 100 * s + n * log for s, n in enumerate([0.1, -0.1, 0.05, -0.05, 0.0])]
    result = claims.judge(p, finished(p, values, tmp_path), {}, False, 1.0)
    assert result["verdict"] == expected and result["effect"] == pytest.approx(slope)
    assert result["comparisons"][0]["arm"] == "slope over log2 method.tau"
    assert result["analysis"]["slopes"] == pytest.approx([slope + n for n in [0.1, -0.1, 0.05, -0.05, 0.0]])
    assert result["arms"]["old"]["also"] == {"return_std": [None] * 5}


@pytest.mark.parametrize("analysis", [
    {"kind": "slop"}, {"kind": "slope", "arm": "new", "knob": "method.tau"}, {"kind": "slope", "arm": "tau", "knob": "method.a"},
    {"kind": "slope", "arm": "tau", "knob": "method.tau", "scale": "ln"}, {"kind": "slope", "arms": "tau"}])
def test_wrong_analyses_are_refused(plan, analysis):
    with pytest.raises(UserError):
        plan(arms=SWEPT, analysis=analysis)


def test_swept_arms_keep_their_names_in_the_table(plan, tmp_path, capsys):
    from runner.report import print_claim

    p = plan(arms=SWEPT)
    values = {a.name: [i + n for n in NOISE] for i, a in enumerate(p.arms)}
    print_claim(claims.judge(p, finished(p, values, tmp_path), {}, False, 1.0))
    assert "tau[tau=0.5] - old" in capsys.readouterr().out


def test_a_failed_run_is_shown_and_leaves_no_verdict(plan, tmp_path):
    p = plan()
    values = {"new": [12.0] * 5, "old": [1.0, 2.0, 3.0, 4.0, 5.0]}
    result = claims.judge(p, finished(p, values, tmp_path, fail={("new", 3)}), {}, False, 1.0)
    assert result["arms"]["new"]["failed"] == [3] and result["arms"]["new"]["values"][3] is None
    assert result["verdict"] == "undecided" and not result["comparisons"]
    assert any("arm new: 1 of 5 runs failed" in w for w in result["warnings"])


def test_the_best_of_several_arms_pays_for_the_choice(plan, tmp_path):
    """Alone this arm is supported; picked as the best of eight, of which the others are as noisy, it is not."""
    arms = {f"arm{i}": {"method": "adpo", "role": "method", "overrides": [f"method.tau={1 + i / 10}"]} for i in range(8)}
    p = plan(arms={**arms, "old": PLAN["arms"]["old"]})
    noise = [[((7 * i + 3 * s) % 11 - 5) / 10 for s in range(5)] for i in range(8)]
    values = {f"arm{i}": [n + 0.05 for n in noise[i]] for i in range(8)} | {"old": [0.0] * 5}
    values["arm0"] = [0.45, 0.2, 0.35, 0.1, 0.3]
    many = claims.judge(p, finished(p, values, tmp_path), {}, False, 1.0)
    p = plan(arms={"arm0": arms["arm0"], "old": PLAN["arms"]["old"]})
    alone = claims.judge(p, finished(p, {k: values[k] for k in ("arm0", "old")}, tmp_path / "b"), {}, False, 1.0)
    assert many["comparisons"][0]["arm"] == "arm0"
    assert many["interval"][0] < alone["interval"][0] and alone["verdict"] == "supported"


@pytest.mark.parametrize(("tried", "picked", "said"), [
    ([1e-3, 3e-4, 1e-2], "0.0003", "lowest"), ([1, 5, 20], "20", "highest"), ([1, 5, 20], "5", ""),
    ([1, 5], "5", ""), (["drop", "coin", "keep"], "keep", ""), ([1e-4, 3e-4, 1e-3], '"1e-4"', "lowest")])
def test_what_tuning_picks_at_the_end_of_a_range_is_said(tried, picked, said):
    arm = claims.Arm("ours", "td3", "method", [], {"method.tau": tried})
    told = claims.ends(arm, ["method.other=1", f"method.tau={picked}"])
    assert len(told) == bool(said) and all(said in t and "arm ours: method.tau=" in t for t in told)


def test_a_sweep_becomes_arms(plan):
    p = plan(arms={"new": {"method": "adpo", "sweep": {"method.tau": [0.5, 1.0]}}, "old": PLAN["arms"]["old"]})
    assert [a.name for a in p.arms] == ["new[tau=0.5]", "new[tau=1.0]", "old"]
    assert p.arms[0].overrides == ["method.tau=0.5"]


def test_settings_are_strata(plan, tmp_path):
    """A setting's own level must not widen the interval."""
    p = plan(settings={"easy": ["env.drag=0.1"], "hard": ["env.drag=0.2"]})
    base = [1.0] * 5 + [100.0] * 5
    todo = finished(p, {"new": [b + 1 + n for b, n in zip(base, NOISE * 2)], "old": base}, tmp_path)
    result = claims.judge(p, todo, {}, False, 1.0)
    assert result["verdict"] == "supported" and len(result["arms"]["new"]["values"]) == 10


@pytest.mark.parametrize(("changes", "said"), [
    ({"arms": {"new": {"method": "adpo"}}}, "role: baseline"),
    ({"arms": {"a": {"method": "kd", "role": "baseline"}, "b": {"method": "kd", "role": "baseline"}}}, "role: baseline"),
    ({"arms": {"new": {"method": "adpoo"}, "old": PLAN["arms"]["old"]}}, "adpo"),
    ({"arms": {"new": {"method": "adpo", "rolle": "x"}, "old": PLAN["arms"]["old"]}}, "role"),
    ({"metric": "retrun"}, "return"),
    ({"hypothesis": None}, "'hypothesis' is missing"),
    ({"env": "pointmas"}, "pointmass"),
    ({"sedes": 3}, "seeds"),
    ({"arms": {"new": {"method": "adpo", "tune": {"method.tau": [1, 2]}}, "old": PLAN["arms"]["old"]}}, "unequal tuning"),
    ({"seeds": "0,1,1"}, "twice"),
    ({"seeds": "some"}, "seeds=some"),
])
def test_wrong_plans_are_refused(plan, changes, said):
    with pytest.raises(UserError, match=said):
        plan(**changes)


def test_mixed_commits_are_refused_or_banner(plan, tmp_path):
    from runner.record import Record
    from runner.run import folder_of

    p = plan()
    todo = finished(p, {"new": [2.0, 3.0, 4.0, 5.0, 6.5], "old": [1.0, 2.0, 3.0, 4.0, 5.0]}, tmp_path)
    Record(folder_of(next(iter(todo.values()))[1])).write(commit="0ther")
    with pytest.raises(UserError, match="different commits"):
        claims.judge(p, todo, {}, False, 1.0)
    assert claims.judge(p, todo, {}, True, 1.0)["warnings"][0].startswith("MIXED")


@pytest.mark.parametrize(("verdict", "direction", "interval", "again", "expected"), [
    ("supported", "max", [0.5, 2.0], 1.0, False), ("supported", "max", [0.5, 2.0], -0.1, True),
    ("supported", "max", [0.5, 2.0], 0.1, False), ("supported", "min", [-2.0, -0.5], 0.3, True),
    ("not supported", "max", [-2.0, -0.5], 0.1, True), ("not supported", "max", [-2.0, -0.5], -3.0, False),
    ("undecided", "max", [-1.0, 1.0], -9.0, False)])
def test_contradiction(verdict, direction, interval, again, expected):
    recorded = {"verdict": verdict, "direction": direction, "interval": interval, "margin": 0.0}
    assert claims.contradicts(recorded, {"effect": again}) is expected


def test_a_claim_runs_what_is_missing_judges_and_does_not_run_twice(plan, tmp_path, monkeypatch, capsys):
    plan(arms={"new": {"method": "adpo", "tune": {"method.tau": [0.5, 1.0]}},
               "old": {"method": "kd", "role": "baseline", "tune": {"method.tau": [0.5, 1.0]}}}, seeds=2)
    from runner import run
    ran = []

    def here(jobs, available, flags, say):  # in this process: starting one a run costs six seconds each
        for _, job in jobs:
            ran.append(job.id)
            run.execute(job, quiet=True)
        return 0

    monkeypatch.setattr(claims, "execute", here)
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    words = ["mine", f"runs={tmp_path / 'runs'}"]
    assert claims.command(words, {"include": []}) == 0
    assert len(ran) == 2 * 2 * 2 + 2 * 2 and len(set(ran)) == len(ran)
    result = json.loads((tmp_path / "claims/mine.json").read_text())
    assert result["arms"]["new"]["overrides"][0] in ("method.tau=0.5", "method.tau=1.0") and result["arms"]["new"]["tuned"]
    assert "only 2 seeds" in " ".join(result["warnings"])
    assert "verdict:" in capsys.readouterr().out
    assert claims.command(words, {"include": []}) == 0 and len(ran) == 12, "the same claim again runs nothing"
    assert claims.command([*words, "seeds=1"], {"include": []}) == 0
    assert "not recorded" in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot be changed here"):
        claims.command([*words, "size=paper"], {"include": []})
    with pytest.raises(UserError, match="leave hardware.seeds out"):
        claims.command([*words, "hardware.seeds=5"], {"include": []})


def test_many_claims_are_corrected_together(plan, tmp_path):
    """Five improvements of one sign: p = 1/32, the smallest that five pairs allow; two claims: Holm doubles the smaller."""
    p = plan()
    base = [10.0, 30.0, 20.0, 25.0, 15.0]
    high = [b + 1 + n for b, n in zip(base, NOISE)]
    good = claims.judge(p, finished(p, {"new": high, "old": base}, tmp_path / "a"), {}, False, 1.0)
    bad = claims.judge(p, finished(p, {"new": base, "old": high}, tmp_path / "b"), {}, False, 1.0)
    assert claims.p_value(good) == pytest.approx(1 / 32) and claims.p_value(bad) == pytest.approx(1.0)
    text = claims.holm_text([good, {**bad, "claim": "other"}])
    assert "mine: p 0.0312, adjusted 0.0625" in text and "other: p 1, adjusted 1" in text


EVERY = claims.paths()


@pytest.mark.parametrize("name", EVERY)
def test_every_plan_of_the_house_composes(name):
    book = Catalogue()
    p = claims.load(name, book)
    todo = claims.jobs(p, book, [], {})
    assert len({job.id for _, job in todo.values()}) == len(todo), "two arms are the same run"
    for arm in p.arms:
        for point in claims._overrides(arm.tune):
            claims.compose(claims._words(p, arm, [], 0, []) + point, book)
