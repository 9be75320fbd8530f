"""Claims: a paper's central statement as a plan, the runs it needs, and the verdict that is published whichever way it falls.

A plan is conf/claim/<family>/<name>.yaml:

    hypothesis: one sentence                 methods: [names the claim is about]
    env: NAME    size: claim    seeds: 5     overrides: [for every arm]
    settings: {name: [overrides]}            optional strata: the claim is over all of them together
    metric: NAME   direction: max   margin: 0.0   refuted_by: one sentence
    arms:
      anchored:   {method: adpo, role: method, overrides: […], tune: {method.tau: [0.5, 1]}}
      unanchored: {method: adpo, role: baseline, overrides: […], tune: {method.learning_rate: [1e-3, 3e-3]}}

Exactly one arm is the baseline. Several arms of role `method`, or one with `sweep: {key: [values]}`, make a claim about the
best of them, and its interval pays for the choice. A study may instead fit a curve:

    analysis: {kind: slope, arm: NAME, knob: method.tau, scale: log2}     also: [further metrics, shown for every arm]

judges the slope of the metric over a swept arm's knob, fitted seed by seed (runner/analyses.py).

`tune` picks each arm's values on seeds that are not used again; every arm must be given equally many points, and a number
picked at the end of its range is told with the verdict. Seeds are paired:
arm by arm the same seeds, and so the same data and start states.

Verdict: of the paired differences (method - baseline) the studentised bootstrap interval at 95 %, stratified by setting:
supported (all of it beyond the margin), not supported (none of it), undecided.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from itertools import product
from pathlib import Path
from typing import NamedTuple

from runner import analyses, catalogue
from runner import record as records
from runner.catalogue import CONF, ROOT, Catalogue, load_yaml
from runner.compose import Job, compose, identity
from runner.errors import UserError, nearest, unknown
from runner.plan import execute, slots
from runner.record import Record
from runner.run import check_hardware, folder_of

KEYS = {"hypothesis", "methods", "env", "size", "seeds", "overrides", "settings", "metric", "direction", "margin",
        "refuted_by", "arms", "cost", "analysis", "also", "planned"}
ARM_KEYS = {"method", "role", "overrides", "tune", "sweep", "env"}
NEEDED = ("hypothesis", "methods", "env", "metric", "arms", "refuted_by")
TUNE_SEED = 1000  # tuning uses this seed and the next ones; claims start at 0


class Arm(NamedTuple):
    name: str
    method: str
    role: str            # "method", "baseline" or "other" (shown, not judged)
    overrides: list[str]
    tune: dict


class Plan(NamedTuple):
    name: str
    family: str
    text: dict
    arms: list[Arm]
    seeds: list[int]
    settings: dict[str, list[str]]


def paths() -> dict[str, Path]:
    return {p.stem: p for p in sorted((CONF / "claim").glob("*/*.yaml"))}


def _overrides(values: dict) -> list[list[str]]:
    """{key: [values]} -> every combination, as overrides."""
    axes = [[f"{k}={json.dumps(v)}" for v in vs] for k, vs in values.items()]
    return [list(c) for c in product(*axes)]


def load(name: str, book: Catalogue, seeds: str | None = None) -> Plan:
    """The checked plan of a claim; `seeds`: a number of them, or a list such as 0,1,2."""
    known = paths()
    if name not in known:
        raise unknown("claim", name, known, "claims lie in conf/claim/<family>/<name>.yaml")
    path, text = known[name], load_yaml(known[name])
    for key in text:
        if key not in KEYS:
            raise unknown(f"key in {path.name}:", key, KEYS)
    for key in NEEDED:
        if not text.get(key):
            raise UserError(f"claim {name}: '{key}' is missing")
    arms = []
    for arm, spec in text["arms"].items():
        for key in spec:
            if key not in ARM_KEYS:
                raise unknown(f"key of arm '{arm}' in {path.name}:", key, ARM_KEYS)
        role = spec.get("role", "method")
        if role not in ("method", "baseline", "other"):
            raise unknown(f"role of arm '{arm}':", role, ["method", "baseline", "other"])
        book.methods(spec["method"])
        given = list(spec.get("overrides", []))
        for point in _overrides(spec.get("sweep") or {}):
            label = ",".join(p.split("=")[0].rpartition(".")[2] + "=" + p.split("=", 1)[1] for p in point)
            arms.append(Arm(f"{arm}[{label}]" if point else arm, spec["method"], role, given + point, spec.get("tune") or {}))
    roles = [a.role for a in arms]
    if roles.count("baseline") != 1 or "method" not in roles:
        raise UserError(f"claim {name}: exactly one arm must have `role: baseline`, and one at least `role: method`")
    budgets = {a.name: len(_overrides(a.tune)) for a in arms if a.role != "other"}
    if len(set(budgets.values())) > 1:
        raise UserError(f"claim {name}: arms have unequal tuning budgets ({', '.join(f'{k}: {v}' for k, v in budgets.items())} "
                        "points); a baseline is tuned as much as the method")
    metrics = catalogue.metrics(book.get("env", text["env"]))
    for metric in (text["metric"], *text.get("also", [])):
        if metric not in metrics:
            raise UserError(f"claim {name}: env {text['env']} has no metric '{metric}'\n"
                            f"did you mean: {', '.join(nearest(metric, metrics)) or ', '.join(metrics)}?")
    if "analysis" in text:
        analyses.check(text["analysis"], name, {a.name: a.overrides for a in arms})
    return Plan(name, path.parent.name, text, arms, _seeds(seeds if seeds is not None else text.get("seeds", 5)),
                text.get("settings") or {"": []})


def _seeds(given) -> list[int]:
    try:
        if isinstance(given, int) or "," not in str(given):
            number = int(given)
            if number < 1:
                raise ValueError
            return list(range(number))
        out = [int(s) for s in str(given).split(",")]
    except ValueError:
        raise UserError(f"seeds={given}: give their number, or a list such as 0,1,2") from None
    if len(set(out)) < len(out):
        raise UserError(f"seeds={given}: a seed is given twice")
    return out


def jobs(plan: Plan, book: Catalogue, common: list[str], chosen: dict[str, list[str]]) -> dict[tuple, tuple[list[str], Job]]:
    """{(arm, setting, seed): (words, job)} of the claim proper; `chosen`: what tuning picked for each arm."""
    out = {}
    for arm, (setting, extra) in product(plan.arms, plan.settings.items()):
        picked = chosen.get(arm.name, [])
        for seed, pair in _seeded(plan, arm, extra, plan.seeds, common, picked, book).items():
            out[arm.name, setting, seed] = pair
    return out


def _seeded(plan, arm, extra, seeds, common, point, book) -> dict[int, tuple[list[str], Job]]:
    """One job a seed, composed once: composing costs 50 ms, and seeds differ in nothing else."""
    first = compose(_words(plan, arm, extra, seeds[0], common) + point, book)
    out = {}
    for seed in seeds:
        config = {**first.config, "seed": seed}
        out[seed] = (_words(plan, arm, extra, seed, common) + point, first._replace(config=config, id=identity(config)))
    return out


def _words(plan, arm, extra, seed, common):
    return [f"method={arm.method}", f"env={plan.text['env']}", f"size={plan.text.get('size', 'claim')}", "logger=none",
            *plan.text.get("overrides", []), *extra, *arm.overrides, f"seed={seed}", *common]


def _run(todo: list[tuple[list[str], Job]], options, say) -> int:
    """Run what is not done, each once."""
    unique = {str(folder_of(job)): (words, job) for words, job in todo}
    left = [(w, j) for w, j in unique.values() if (_record(j) or {}).get("status") != "done"]
    if not left:
        return 0
    for _, job in left:
        check_hardware(job.config)
    available = slots(left[0][1])
    if "jobs" in options:
        available = [available[i % len(available)] for i in range(max(1, int(options["jobs"])))]
    records.require_space(Path(left[0][1].config["runs"]))
    return execute(left, available, ["--quiet", *(f"--include={d}" for d in options["include"])], say)


def _record(job: Job) -> dict | None:
    try:
        return Record(folder_of(job)).read()
    except UserError:
        return None


def _tune(plan: Plan, book, common, options, say) -> dict[str, list[str]]:
    """Each arm's best point, by the metric on seeds that the claim does not use."""
    sign = 1 if plan.text.get("direction", "max") == "max" else -1
    seeds = range(TUNE_SEED, TUNE_SEED + 2)
    trials = {}
    for arm in plan.arms:
        for number, point in enumerate(_overrides(arm.tune)):
            if point:
                for extra in plan.settings.values():
                    pairs = _seeded(plan, arm, extra, seeds, common, point, book).values()
                    trials.setdefault((arm.name, number, tuple(point)), []).extend(pairs)
    _run([t for ts in trials.values() for t in ts], options, say)
    best: dict[str, tuple] = {}
    for (arm, _, point), ts in trials.items():
        values = [(_record(j) or {}).get("metrics", {}).get(plan.text["metric"]) for _, j in ts]
        score = -float("inf") if None in values else sign * sum(values) / len(values)  # a point that fails is not picked
        if arm not in best or score > best[arm][0]:
            best[arm] = (score, list(point))
    return {arm: point for arm, (_, point) in best.items()}


def ends(arm: Arm, chosen: list[str]) -> list[str]:
    """Sentences on numbers that tuning picked at an end of three values or more: the best may lie beyond."""
    picked, out = dict(o.split("=", 1) for o in chosen), []
    for setting, tried in arm.tune.items():
        if len(tried) > 2 and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in tried) and setting in picked:
            value = float(picked[setting].strip('"'))
            if value in (min(tried), max(tried)):
                out.append(f"arm {arm.name}: {setting}={value:g} is the {'lowest' if value == min(tried) else 'highest'} value "
                           f"tried ({', '.join(f'{v:g}' for v in sorted(tried))}); the best may lie beyond")
    return out


def check(name: str, book: Catalogue, options: dict, common: list[str], seeds: str | None, say) -> dict:
    """Run a claim's missing runs and judge. Returns the record (the schema of claims/<name>.json)."""
    plan = load(name, book, seeds)
    began = time.monotonic()
    chosen = _tune(plan, book, common, options, say)
    todo = jobs(plan, book, common, chosen)
    _run(list(todo.values()), options, say)
    return judge(plan, todo, chosen, bool(options.get("allow-mixed")), time.monotonic() - began)


def judge(plan: Plan, todo: dict, chosen: dict, allow_mixed: bool, wall: float) -> dict:
    """The verdict from finished runs. A failed run is named, and there is no verdict without its value."""
    text = plan.text
    found = {key: _record(job) or {"status": "missing"} for key, (_, job) in todo.items()}
    done = {k: r for k, r in found.items() if r["status"] == "done"}
    warnings = _mixed(done, allow_mixed)
    arms = {arm.name: _arm(plan, arm, todo, done, chosen) for arm in plan.arms}
    for name, arm in arms.items():
        if arm["failed"]:
            warnings.append(f"arm {name}: {len(arm['failed'])} of {len(arm['values'])} runs failed or gave no finite "
                            f"{text['metric']} (seeds {sorted(set(arm['failed']))})")
    if len(plan.seeds) < 3:
        warnings.append(f"only {len(plan.seeds)} seeds: no verdict should be drawn from them")
    verdict, comparisons, study, said = (_study if "analysis" in text else _contest)(plan, arms)
    warnings += [w for w in said if w not in warnings]
    warnings += [said for arm in plan.arms if arm.role != "other" for said in ends(arm, chosen.get(arm.name, []))]
    first = next(iter(done.values()), {})
    return {
        "claim": plan.name, "hypothesis": text["hypothesis"], "family": plan.family, "methods": text["methods"],
        "verdict": verdict, "metric": text["metric"], "direction": _direction(plan), "margin": _margin(plan),
        "env": text["env"], "size": text.get("size", "claim"), "settings": plan.settings, "seeds": plan.seeds,
        "refuted_by": text["refuted_by"],
        "effect": comparisons[0]["difference"] if comparisons else None,
        "interval": comparisons[0]["interval"] if comparisons else [None, None],
        "arms": arms, "comparisons": comparisons, "analysis": study,
        "curves": _curves(plan, todo, done, text["metric"]), "warnings": warnings,
        "command": f"python -m runner claim {plan.name}", "commit": first.get("commit"),
        "dirty": any(r.get("dirty") for r in done.values()),
        "versions": first.get("versions"), "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {first.get('device')}",
        "run_seconds": sum(r.get("seconds", 0.0) for r in done.values()), "wall_seconds": wall,
        "date": time.strftime("%Y-%m-%d"),
    }


def _direction(plan) -> str:
    return plan.text.get("direction", "max")


def _margin(plan) -> float:
    return float(plan.text.get("margin", 0.0))


def _labels(plan) -> list[str]:
    """The setting of each of an arm's values: the strata."""
    return [s for s in plan.settings for _ in plan.seeds]


def _arm(plan, arm: Arm, todo, done, chosen) -> dict:
    """An arm's record: its values in the order of settings and seeds; None where a run failed or diverged."""
    import numpy as np

    from runner import statistics as st

    keys = [(arm.name, s, seed) for s in plan.settings for seed in plan.seeds]

    def values(metric):
        given = [done[k]["metrics"].get(metric) if k in done else None for k in keys]
        return [v if v is not None and math.isfinite(v) else None for v in given]

    own = values(plan.text["metric"])
    entry = {"method": arm.method, "role": arm.role, "overrides": arm.overrides + chosen.get(arm.name, []),
             "tuned": bool(arm.tune), "values": own, "failed": [k[2] for k, v in zip(keys, own) if v is None],
             "runs": [todo[k][1].id for k in keys], "mean": None, "iqm": None, "interval": [None, None],
             "also": {m: values(m) for m in plan.text.get("also", [])}}
    strata = {s: np.array([v for v, label in zip(own, _labels(plan)) if label == s and v is not None]) for s in plan.settings}
    if all(len(v) for v in strata.values()):
        method = "studentized" if min(map(len, strata.values())) > 3 else "percentile"
        interval = st.stratified_interval(strata, "mean", method=method)
        entry |= {"mean": interval.value, "iqm": float(st.iqm(np.concatenate(list(strata.values())))),
                  "interval": [_finite(interval.low), _finite(interval.high)]}
    return entry


def _contest(plan, arms) -> tuple[str, list[dict], None, list[str]]:
    """(verdict, comparisons, no study, warnings): the best arm of role `method` against the baseline, paid for the choice;
    then the other arms, each for itself."""
    import numpy as np

    from runner import statistics as st

    by_role = {role: [a.name for a in plan.arms if a.role == role] for role in ("method", "baseline", "other")}
    tested, baseline = by_role["method"], by_role["baseline"][0]
    if any(arms[n]["failed"] for n in [*tested, baseline]):
        return st.UNDECIDED, [], None, []

    def against(names) -> st.Simultaneous:
        return st.simultaneous({n: np.array(arms[n]["values"]) for n in names}, np.array(arms[baseline]["values"]),
                               strata=_labels(plan), direction=_direction(plan))

    result = against(tested)
    effects = {result.best: result.effect, **result.effects}
    effects |= {n: against([n]).effect for n in by_role["other"] if not arms[n]["failed"]}
    comparisons = [_comparison(st, n, baseline, arms, e, _margin(plan), _direction(plan)) for n, e in effects.items()]
    return comparisons[0]["verdict"], comparisons, None, list(result.effect.warnings)


def _study(plan, arms) -> tuple[str, list[dict], dict | None, list[str]]:
    """(verdict, comparisons, study, warnings): a fitted curve in place of a contest."""
    from runner import statistics as st

    if any(a["failed"] for a in arms.values()):
        return st.UNDECIDED, [], None, []
    fitted = {n: (a["overrides"], a["values"]) for n, a in arms.items()}
    study = analyses.run(plan.text["analysis"], fitted, _labels(plan))
    effect = study.pop("effect")
    verdict = st.verdict(effect, _margin(plan), _direction(plan))
    share = study["share"] if _direction(plan) == "max" else 1 - study["share"]
    comparison = {"arm": study["name"], "against": "no dependence", "difference": effect.difference,
                  "interval": [_finite(effect.low), _finite(effect.high)], "probability_of_improvement": share,
                  "verdict": verdict}
    return verdict, [comparison], study, list(effect.warnings)


def _finite(x: float):
    return float(x) if x == x and abs(x) != float("inf") else None


def _comparison(st, name, baseline, arms, effect, margin, direction) -> dict:
    better = st.probability_of_improvement(arms[name]["values"], arms[baseline]["values"])
    chance = better.value if direction == "max" else 1 - better.value
    return {"arm": name, "against": baseline, "difference": effect.difference,
            "interval": [_finite(effect.low), _finite(effect.high)], "probability_of_improvement": chance,
            "verdict": st.verdict(effect, margin, direction)}


def _mixed(done: dict, allow: bool) -> list[str]:
    """Runs of one claim must come from one commit and one machine's kind of device."""
    out = []
    for what in ("commit", "device"):
        found = {str(r.get(what)) for r in done.values()}
        if len(found) > 1:
            said = f"the runs were made at different {what}s: {', '.join(sorted(f[:12] for f in found))}"
            if not allow:
                raise UserError(f"{said}\nmake them anew in another folder (runs=DIR), or accept it with --allow-mixed")
            out.append("MIXED: " + said)
    return out


def _curves(plan, todo, done, metric) -> dict:
    """Mean learning curve of each arm over its seeds (first setting), of the figure nearest to the metric."""
    import numpy as np

    from runner import statistics as st

    setting, logs = next(iter(plan.settings)), {}
    for arm in plan.arms:
        keys = [(arm.name, setting, seed) for seed in plan.seeds]
        if all(k in done for k in keys):
            logs[arm.name] = [records.lines(folder_of(todo[k][1]) / "metrics.jsonl") for k in keys]
    flat = [line for runs in logs.values() for run in runs for line in run]
    found = {k for line in flat for k, v in line.items() if isinstance(v, (int, float))}
    key = next((k for k in (f"eval/{metric}", *sorted(k for k in found if k.startswith("validation")), "train_return", "loss")
                if k in found), None)
    out = {}
    for arm, runs in logs.items():
        series = [{line["step"]: line[key] for line in run if isinstance(line.get(key), (int, float))} for run in runs]
        steps = sorted(set.intersection(*map(set, series))) if series else []
        steps = steps[:: max(1, len(steps) // 100)]
        if len(steps) > 1:
            band = st.curve_band(steps, np.array([[s[t] for t in steps] for s in series]), resamples=1000)
            out[arm] = {"metric": key, "step": steps, **{k: [_finite(round(float(x), 6)) for x in getattr(band, k)]
                                                        for k in ("mean", "low", "high")}}
    return out


# ---- the command ------------------------------------------------------------------------------------------------------

def command(words: list[str], options: dict) -> int:
    from runner.report import print_claim

    book = Catalogue(options["include"])
    names = [w for w in words if "=" not in w]
    given = dict(w.split("=", 1) for w in words if "=" in w)
    for key in given:
        if key not in ("seeds", "runs", "hardware") and not key.startswith("hardware."):
            raise UserError(f"'{key}' belongs to the claim's plan and cannot be changed here; seeds, runs and hardware can")
    if "hardware.seeds" in given:  # each of its runs would be taken for the first of an overlapping batch
        raise UserError("a claim makes one run a seed; leave hardware.seeds out (seeds=N says how many there are)")
    if options.get("all"):
        names = list(paths())
    elif "family" in options:
        names = [n for n, p in paths().items() if p.parent.name == options["family"]]
        if not names:
            raise unknown("family with claims", options["family"], {p.parent.name for p in paths().values()})
    if not names:
        raise UserError(f"name a claim, or give --family F or --all\nknown: {', '.join(paths())}")
    plans = [load(n, book, given.get("seeds")) for n in names]  # every one is checked before one starts
    common = [f"{k}={v}" for k, v in given.items() if k != "seeds"]
    results = []
    for plan in plans:
        result = check(plan.name, book, options, common, given.get("seeds"),
                       say=lambda text: print(text, file=sys.stderr, flush=True))
        if plan.text.get("cost"):
            result["cost"] = plan.text["cost"]
        results.append(result)
        if not options.get("json"):
            print_claim(result)
        target = ROOT / "claims" / f"{plan.name}.json"
        if target.exists():  # runs that were there already: their time stands
            before = json.loads(target.read_text())
            if [a["runs"] for a in before["arms"].values()] == [a["runs"] for a in result["arms"].values()]:
                result["wall_seconds"] = max(result["wall_seconds"], before["wall_seconds"])
        full = len(plan.seeds) >= len(_seeds(plan.text.get("seeds", 5)))
        if full:
            target.parent.mkdir(exist_ok=True)
            records.write_atomic(target, json.dumps(result, indent=1) + "\n")
            if not options.get("json"):
                print(f"recorded in {target.relative_to(ROOT)}")
        elif not options.get("json"):
            print("not recorded: fewer seeds than the plan asks for" + _against(target, result))
    if len(results) > 1 and not options.get("json"):
        print("\n" + holm_text(results))
    if options.get("json"):
        print(json.dumps(results if len(results) > 1 else results[0], indent=1))
    return 1 if any(a["failed"] for r in results for a in r["arms"].values()) else 0


def p_value(result: dict) -> float | None:
    """One-sided sign-flip p-value that the claim's own comparison does not exceed its margin; None without a comparison.
    For the best of several arms it is multiplied by their number (Bonferroni)."""
    import numpy as np

    from runner import statistics as st

    if not result["comparisons"]:
        return None
    sign = 1 if result["direction"] == "max" else -1
    labels = [s for s in result["settings"] for _ in result["seeds"]]
    if result.get("analysis"):
        improvement, tested = sign * np.array(result["analysis"]["slopes"]), 1
    else:
        first, arms = result["comparisons"][0], result["arms"]
        improvement = sign * (np.array(arms[first["arm"]]["values"]) - np.array(arms[first["against"]]["values"]))
        tested = sum(a["role"] == "method" for a in arms.values())
    p = st.sign_flip_p_value(improvement - result["margin"], strata=labels, alternative="greater")
    return min(1.0, p * tested)


def holm_text(results: list[dict]) -> str:
    """Over several claims some look supported by chance: Holm's adjusted p-values of those that have a comparison."""
    from runner import statistics as st

    found = {r["claim"]: p for r in results if (p := p_value(r)) is not None}
    if not found:
        return "no claim has a comparison"
    adjusted = st.holm(list(found.values())).adjusted
    lines = [f"  {name}: p {p:.3g}, adjusted {a:.3g}" for (name, p), a in zip(found.items(), adjusted)]
    return f"Holm's correction over {len(found)} claims (one-sided sign-flip p-values)\n" + "\n".join(lines)


def _against(target: Path, result: dict) -> str:
    if not target.exists():
        return ""
    recorded = json.loads(target.read_text())
    return "; it contradicts the record" if contradicts(recorded, result) else "; it does not contradict the record"


def contradicts(recorded: dict, again: dict) -> bool:
    """Whether a re-check's effect has the other sign than a decided verdict's, beyond the recorded interval."""
    if recorded["verdict"] == "undecided" or again["effect"] is None:
        return False
    sign = 1 if recorded["direction"] == "max" else -1
    effect, low, high = sign * again["effect"], *sorted(sign * x for x in recorded["interval"])
    if recorded["verdict"] == "supported":
        return effect <= recorded["margin"] and effect < low
    return effect > recorded["margin"] and effect > high
