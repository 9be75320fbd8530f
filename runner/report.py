"""Tables in the terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from runner.errors import UserError
from runner.record import Record, folders, killed, lines


def _console():
    from rich.console import Console
    # Into a file or a pipe a table is as wide as it needs to be; on a terminal it folds.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 220)


def _table(columns, right=()):
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i in right else "left", overflow="fold")
    return table


def number(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def result_table(name: str, metrics: dict, references: dict, meaning: dict):
    """One row a metric; one column for the run and one for each reference (teacher, random policy, …)."""
    table = _table(["", name, *references, ""], right=range(1, len(references) + 2))
    for metric, value in metrics.items():
        direction, unit = meaning.get(metric, ("none", ""))[:2]
        better = {"max": "higher is better", "min": "lower is better"}.get(direction, "")
        table.add_row(metric, f"[bold]{number(value)}", *(number(row.get(metric)) for row in references.values()),
                      "[dim]" + ", ".join(w for w in (unit, better) if w))
    return table


def print_result(run: dict):
    console, config = _console(), run["config"]
    if run.get("already"):
        console.print("this run is finished; here is its result (--force runs it again, --fork makes a copy)")
    title = (f"{config['method']['name']} on {config['env']['name']}: size {config['size']}, seed {run['seed']}, "
             f"step {run['evaluated_step']:,} of {run['step']:,}, {run['seconds']:.0f} s")
    print(title)
    console.print(result_table(config["method"]["name"], run["metrics"], run["references"],
                               run["metric_meaning"]))
    print(f"record: {run['folder']}")


def print_evaluation(folder: Path, job, metrics, references, meaning):
    print(f"{folder.name} on {job.config['env']['name']}")
    _console().print(result_table(job.config["method"]["name"], metrics, references, meaning))
    print(f"recorded in {folder / 'evaluations.jsonl'}")


def _load(runs: Path, filters: list[str]) -> list[dict]:
    """Records of the runs whose name, or whose key=value, fits every filter word."""
    out = []
    for folder in folders(runs):
        try:
            run = Record(folder).read()
        except UserError as error:  # one torn record does not hide the others
            print(f"left out: {error}", file=sys.stderr)
            continue
        run["folder"] = str(folder)
        if killed(folder, run):
            run["status"] = "killed"
        if all(_fits(run, word) for word in filters):
            out.append(run)
    return out


def _fits(run: dict, word: str) -> bool:
    key, eq, value = word.partition("=")
    if not eq:
        return word in Path(run["folder"]).name
    if key == "status":
        return run["status"] in value.split(",")
    found = run["config"]
    for step in key.split("."):
        if not isinstance(found, dict) or step not in found:
            raise UserError(f"filter '{word}': runs have no '{key}'; try method=…, env=…, seed=…, size=…, status=…")
        found = found[step]
    if isinstance(found, dict):
        found = found.get("name", found)
    return str(found).lower() in value.lower().split(",")


def _nothing(runs, filters):
    print(f"no runs in {runs}" + (f" fit {' '.join(filters)}" if filters else ""))
    return 0


def print_status(runs: Path, filters: list[str], as_json: bool) -> int:
    found = _load(runs, filters)
    if as_json:
        print(json.dumps([{k: r.get(k) for k in ("name", "id", "status", "folder", "started", "updated", "seconds", "error")}
                          | {"step": _step(r), "steps": r["config"]["loop"]["steps"]} for r in found], indent=1))
        return 0
    if not found:
        return _nothing(runs, filters)
    table = _table(["run", "status", "step", "of", "updated"], right=(2, 3))
    for r in found:
        note = f" ({r['error'][:60]})" if r["status"] == "failed" else ""
        table.add_row(Path(r["folder"]).name, r["status"] + note, number(_step(r)), number(r["config"]["loop"]["steps"]),
                      r.get("updated", ""))
    _console().print(table)
    return 0


def _step(run: dict):
    if run.get("status") == "done":
        return run.get("step")
    logged = lines(Path(run["folder"]) / "metrics.jsonl")
    return logged[-1]["step"] if logged else 0


def print_results(runs: Path, filters: list[str], as_json: bool, only: list[str] | None = None) -> int:
    """Finished runs; `only` names folders (a sweep's own)."""
    found = [r for r in _load(runs, filters) if r["status"] == "done"]
    if only is not None:
        found = [r for r in found if Path(r["folder"]).name in only]
    if as_json:
        print(json.dumps([{k: r.get(k) for k in ("name", "id", "folder", "seed", "metrics", "references", "seconds", "commit")}
                          | {"method": r["config"]["method"]["name"], "env": r["config"]["env"]["name"],
                             "size": r["config"]["size"]} for r in found], indent=1))
        return 0
    if not found:
        return _nothing(runs, filters)
    metrics = list(dict.fromkeys(k for r in found for k in r["metrics"]))
    table = _table(["method", "env", "size", "seed", "id", *metrics], right=range(3, 5 + len(metrics)))
    for r in sorted(found, key=lambda r: (r["config"]["env"]["name"], r["config"]["method"]["name"], r["seed"])):
        c = r["config"]
        table.add_row(c["method"]["name"], c["env"]["name"], c["size"], str(r["seed"]), r["id"],
                      *(number(r["metrics"].get(m)) for m in metrics))
    _console().print(table)
    return 0


def print_claim(result: dict):
    """The arms, the comparisons with the baseline, and the verdict of one claim."""
    from rich.markup import escape  # a sweep's arms are called tau[tau=0.5]

    console = _console()
    print(f"\nclaim {result['claim']}: {result['hypothesis']}")
    print(f"{result['metric']} on {result['env']} ({'higher' if result['direction'] == 'max' else 'lower'} is better), "
          f"size {result['size']}, seeds {result['seeds']}"
          + (f", settings {', '.join(result['settings'])}" if "" not in result["settings"] else ""))
    table = _table(["arm", "role", "mean", "IQM", "95 % interval", "failed"], right=(2, 3, 4, 5))
    for name, arm in result["arms"].items():
        table.add_row(escape(name), arm["role"], number(arm["mean"]), number(arm["iqm"]),
                      " … ".join(number(x) for x in arm["interval"]), str(len(arm["failed"]) or "-"))
    console.print(table)
    table = _table(["compared", "difference", "95 % interval", "P(better)", "verdict"], right=(1, 2, 3))
    for c in result["comparisons"]:
        table.add_row(escape(f"{c['arm']} - {c['against']}"), number(c["difference"]),
                      " … ".join(number(x) for x in c["interval"]), f"{c['probability_of_improvement']:.2f}", c["verdict"])
    console.print(table)
    for text in result["warnings"]:
        print(f"note: {text}")
    console.print(f"verdict: [bold]{result['verdict']}[/] (margin {result['margin']:g}); refuted by: {result['refuted_by']}")
