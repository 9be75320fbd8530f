"""The recorded verdicts: they follow from their values, belong to today's plans, and a few are run again."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from runner import analyses, claims
from runner.catalogue import Catalogue

ROOT = Path(__file__).resolve().parents[2]
PLANS = claims.paths()
EVERY = [n for n in PLANS if (ROOT / "claims" / f"{n}.json").is_file()]
CHEAP = 30.0  # seconds of one seed's runs: only such claims are run again here


def test_a_plan_without_a_record_says_since_when_it_waits():
    """`planned: DATE`: hypothesis and margin stand since then, no run has been judged."""
    waiting = [n for n in PLANS if n not in EVERY]
    print("\nclaims that wait for their runs:", ", ".join(waiting) or "none")
    for name in waiting:
        since = claims.load(name, Catalogue()).text.get("planned")
        assert since, f"conf/claim/…/{name}.yaml has no record in claims/, and no `planned: DATE`"
        assert datetime.date.fromisoformat(str(since)) <= datetime.date.today()


@pytest.mark.parametrize("name", EVERY)
def test_every_claim_has_a_verdict_that_follows_from_its_record(name):
    """The recorded verdict is what today's statistics say of the recorded values, and the plan is still the one judged."""
    import numpy as np

    from runner import statistics as st

    record = json.loads((ROOT / "claims" / f"{name}.json").read_text())
    p = claims.load(name, Catalogue())
    assert record["hypothesis"] == p.text["hypothesis"] and record["margin"] == float(p.text.get("margin", 0))
    assert record["seeds"] == p.seeds and list(record["arms"]) == [a.name for a in p.arms]
    baseline = next(a.name for a in p.arms if a.role == "baseline")
    tested = {a.name: np.array(record["arms"][a.name]["values"]) for a in p.arms if a.role == "method"}
    labels = [s for s in p.settings for _ in p.seeds]
    result = st.simultaneous(tested, np.array(record["arms"][baseline]["values"]), strata=labels,
                             direction=record["direction"])
    effect = result.effect
    if "analysis" in p.text:
        effect = analyses.run(p.text["analysis"], {n: (a["overrides"], a["values"]) for n, a in record["arms"].items()},
                              labels)["effect"]
    assert st.verdict(effect, record["margin"], record["direction"]) == record["verdict"]
    assert record["effect"] == pytest.approx(effect.difference)
    assert record["commit"] and record["dirty"] is False


def test_a_rotating_claim_is_checked_again(tmp_path, monkeypatch):
    """Each day another cheap claim, at one seed: fails if the effect has the other sign, beyond the recorded interval."""
    from runner import run

    def here(jobs, available, flags, say):
        for _, job in jobs:
            run.execute(job, quiet=True)
        return 0

    monkeypatch.setattr(claims, "execute", here)
    records = {n: json.loads((ROOT / "claims" / f"{n}.json").read_text()) for n in EVERY}
    cost = {n: r["run_seconds"] / len(r["seeds"]) for n, r in records.items()}
    cheap = sorted(n for n in records if cost[n] <= CHEAP)
    name = cheap[datetime.date.today().toordinal() % len(cheap)]
    plan, record, book = claims.load(name, Catalogue(), "1"), records[name], Catalogue()
    tuned = {arm: [o for o in entry["overrides"] if o.split("=")[0] in
                   next(a.tune for a in plan.arms if a.name == arm)] for arm, entry in record["arms"].items()}
    todo = claims.jobs(plan, book, [f"runs={tmp_path}"], tuned)
    claims._run(list(todo.values()), {"include": []}, print)
    again = claims.judge(plan, todo, tuned, True, 0.0)
    assert again["effect"] is not None
    assert not claims.contradicts(record, again), f"{name}: recorded {record['effect']}, now {again['effect']}"
