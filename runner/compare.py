"""Groups of finished runs beside each other: `python -m runner compare …` -> a table, a plot, csv, LaTeX."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import NamedTuple

from runner import record as records
from runner.errors import UserError, unknown


class Group(NamedTuple):
    name: str
    seeds: list[int]
    values: list[float]
    failed: int
    mean: float
    iqm: float
    low: float
    high: float


def collect(runs: Path, words: list[str], options: dict) -> list[dict]:
    """The runs that are compared: named ones, a claim's, or all that fit --env and the filters key=value."""
    from runner.report import _load

    names = [w for w in words if "=" not in w]
    filters = [w for w in words if "=" in w] + ([f"env={options['env']}"] if "env" in options else [])
    found = _load(runs, filters)
    if names:
        chosen = {str(records.find(n, runs)) for n in names}
        found = [r for r in found if r["folder"] in chosen]
    if "claim" in options:
        path = Path(options["claim"])
        path = path if path.suffix == ".json" else Path(__file__).resolve().parent.parent / "claims" / f"{path}.json"
        if not path.is_file():
            raise UserError(f"claim {options['claim']} has no record; python -m runner claim {options['claim']}")
        ids = {i for arm in json.loads(path.read_text())["arms"].values() for i in arm["runs"]}
        found = [r for r in found if r["id"] in ids]
    if not found:
        raise UserError(f"no runs in {runs} fit")
    return found


def value_of(run: dict, key: str) -> str:
    """A run's config value under a dotted key; `method` and `env` mean their names."""
    found = run["config"]
    for step in key.split("."):
        if not isinstance(found, dict) or step not in found:
            raise UserError(f"--by {key}: runs have no such setting; try method, env, size, seed or method.tau")
        found = found[step]
    return str(found.get("name", found) if isinstance(found, dict) else found)


def groups(found: list[dict], by: str, metric: str) -> list[Group]:
    """One Group per value of `by`. Failed and unfinished runs are counted, never averaged over in silence."""
    import numpy as np

    from runner import statistics as st

    table: dict[str, list[dict]] = {}
    for run in found:
        table.setdefault(value_of(run, by), []).append(run)
    out = []
    for name, runs in sorted(table.items()):
        done = [r for r in runs if r["status"] == "done"]
        known = {m for r in done for m in r["metrics"]}
        if done and metric not in known:
            raise unknown("metric", metric, known)
        values = [r["metrics"][metric] for r in sorted(done, key=lambda r: r["seed"])]
        if not values:
            out.append(Group(name, [], [], len(runs), *[float("nan")] * 4))
            continue
        interval = st.bootstrap_interval(np.array(values), method="studentized" if len(values) > 3 else "percentile")
        out.append(Group(name, sorted(r["seed"] for r in done), values, len(runs) - len(done), float(st.mean(values)),
                         float(st.iqm(values)), interval.low, interval.high))
    return out


def _same(found: list[dict], by: str, allow: bool) -> list[str]:
    """What should agree over all compared runs and does not."""
    told = []
    for what in ("size", "env", "commit"):
        if what == by or by.startswith(f"{what}."):
            continue
        values = {str(r.get("commit")) if what == "commit" else value_of(r, what) for r in found if r["status"] == "done"}
        if len(values) > 1:
            said = f"runs of different {what}s are compared: {', '.join(sorted(v[:12] for v in values))}"
            if not allow:
                raise UserError(f"{said}\nnarrow the choice (--env, size=…), or accept it with --allow-mixed")
            told.append("MIXED: " + said)
    seeds: dict[str, set] = {}
    for run in found:
        seeds.setdefault(value_of(run, by), set()).add(run["seed"])
    if by != "seed" and len({frozenset(s) for s in seeds.values()}) > 1:
        said = "the groups have different seeds and cannot be paired: " + "; ".join(
            f"{name}: {', '.join(map(str, sorted(s)[:8]))}" for name, s in sorted(seeds.items()))
        if not allow:
            raise UserError(f"{said}\nrun the missing seeds, or accept unpaired groups with --allow-mixed")
        told.append("UNPAIRED: " + said)
    return told


def command(words: list[str], runs: Path, options: dict) -> int:
    from runner.report import _console, _table, number

    by = options.get("by", "method")
    found = collect(runs, words, options)
    meaning = next((r["metric_meaning"] for r in found if r["status"] == "done"), None)
    if meaning is None:
        raise UserError("none of these runs is finished")
    metric = options.get("metric") or next(iter(meaning))
    told = _same(found, by, bool(options.get("allow-mixed")))
    table = groups(found, by, metric)
    direction = meaning.get(metric, ["max"])[0]
    baseline = _baseline(table, options.get("baseline"))
    rows = []
    for g in table:
        rows.append({by: g.name, "runs": len(g.values), "failed": g.failed, "mean": g.mean, "iqm": g.iqm, "low": g.low,
                     "high": g.high, **_against(g, baseline, direction)})
    if options.get("json"):
        print(json.dumps({"metric": metric, "direction": direction, "groups": [g._asdict() for g in table], "rows": rows},
                         indent=1))
    else:
        for line in told:
            print(line)
        print(f"{metric} ({'lower' if direction == 'min' else 'higher'} is better), compared with {baseline.name}")
        shown = _table([by, "runs", "not finished", "mean", "IQM", "95 % interval", "difference", "95 % interval", "P(better)"],
                       right=range(1, 9))
        for r in rows:
            shown.add_row(r[by], str(r["runs"]), str(r["failed"] or "-"), number(r["mean"]), number(r["iqm"]),
                          f"{number(r['low'])} … {number(r['high'])}", number(r["difference"]),
                          "-" if r["difference"] is None else f"{number(r['difference_low'])} … {number(r['difference_high'])}",
                          number(r["probability_of_improvement"]))
        _console().print(shown)
        if any(len(g.values) < 3 for g in table):
            print("note: fewer than 3 seeds in a group: its interval means little")
    if "csv" in options:
        with open(options["csv"], "w", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    if "latex" in options:
        Path(options["latex"]).write_text(latex(rows, by, metric))
    if "plot" in options:
        plot(Path(options["plot"]), table, metric, by)
    return 0


def _baseline(table: list[Group], name: str | None) -> Group:
    if name is None:
        return next((g for g in table if g.values), table[0])
    for g in table:
        if g.name == name:
            return g
    raise unknown("group for --baseline:", name, [g.name for g in table])


def _against(g: Group, baseline: Group, direction: str) -> dict:
    """Difference to the baseline, paired by seeds where the seeds are the same."""
    import numpy as np

    from runner import statistics as st

    empty = {"difference": None, "difference_low": None, "difference_high": None, "probability_of_improvement": None}
    if g is baseline or not g.values or not baseline.values:
        return empty
    better = st.probability_of_improvement(g.values, baseline.values).value
    out = {**empty, "probability_of_improvement": better if direction != "min" else 1 - better}
    if g.seeds == baseline.seeds and len(set(g.seeds)) == len(g.seeds):
        effect = st.paired_difference(np.array(g.values), np.array(baseline.values),
                                      method="studentized" if len(g.values) > 3 else "percentile")
        out |= {"difference": effect.difference, "difference_low": effect.low, "difference_high": effect.high}
    return out


def latex(rows: list[dict], by: str, metric: str) -> str:
    """A booktabs table."""
    def safe(text):
        for a in "\\&%$#_{}":
            text = text.replace(a, "\\textbackslash{}" if a == "\\" else "\\" + a)
        return text

    lines = [r"\begin{tabular}{lrrr}", r"\toprule", f"{safe(by)} & runs & {safe(metric)} & 95\\,\\% interval \\\\", r"\midrule"]
    lines += [f"{safe(r[by])} & {r['runs']} & {r['mean']:.4g} & {r['low']:.4g} \\dots\\ {r['high']:.4g} \\\\" for r in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def plot(target: Path, table: list[Group], metric: str, by: str):
    """Means with their intervals, and every run as a dot; .png or .svg."""
    if target.suffix not in (".png", ".svg"):
        raise UserError(f"--plot {target}: the file must end in .png or .svg")
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs the package matplotlib: pip install -e '.[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(1.5 + 1.1 * len(table), 3.6), layout="constrained")
    for i, g in enumerate(table):
        if g.values:
            axes.plot([i - 0.12] * len(g.values), g.values, "o", color="#8a8a8a", markersize=3.5, markeredgewidth=0)
            axes.plot([i, i], [g.low, g.high], color="#1f5fa8", linewidth=2)
            axes.plot(i, g.mean, "o", color="#1f5fa8", markersize=6)
    axes.set_xticks(range(len(table)), [g.name for g in table])
    axes.set_xlabel(by)
    axes.set_ylabel(f"{metric} (mean, 95 % interval, runs)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=160)
    plt.close(figure)
