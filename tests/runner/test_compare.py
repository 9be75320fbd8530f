"""compare: groups of finished runs, paired where seeds agree; nothing is dropped in silence, nothing mixed without a word."""

from __future__ import annotations

import csv
import json

import pytest

from runner.cli import main
from runner.record import Record

VALUES = {"adpo": [3.0, 5.0, 7.0, 9.5, 11.0], "kd": [1.0, 3.2, 5.0, 7.0, 9.1]}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def add(method, seed, value, status="done", size="claim", env="pointmass", commit="c0ffee", tau=1.0):
        folder = tmp_path / "runs" / f"{method}-{env}-s{seed}-{hash((method, seed, size, env, commit, tau)) % 10**10:012d}"
        folder.mkdir(parents=True)
        config = {"method": {"name": method, "tau": tau}, "env": {"name": env}, "size": size, "seed": seed,
                  "loop": {"steps": 3}}
        Record(folder).write(id=folder.name[-12:], status=status, config=config, seed=seed, commit=commit,
                             metrics={"return": value, "kl": -value}, seconds=1.0,
                             metric_meaning={"return": ["max", "reward"], "kl": ["min", "nats"]})
        return folder

    for method, values in VALUES.items():
        for seed, value in enumerate(values):
            add(method, seed, value)
    return add


def compare(capsys, *words):
    code = main(["compare", *words])
    return code, *capsys.readouterr()


def test_table_json_csv_latex_plot(runs, tmp_path, capsys):
    code, out, _ = compare(capsys, "--json", "--baseline", "kd", "--csv", "t.csv", "--latex", "t.tex", "--plot", "t.svg")
    assert code == 0
    told = json.loads(out)
    adpo, kd = told["rows"]
    assert told["metric"] == "return" and adpo["method"] == "adpo"
    assert adpo["mean"] == pytest.approx(7.1) and kd["iqm"] == pytest.approx((3.2 + 5 + 7) / 3)
    differences = [a - b for a, b in zip(VALUES["adpo"], VALUES["kd"])]
    assert adpo["difference"] == pytest.approx(sum(differences) / 5)
    assert adpo["difference_low"] > 0, "paired by seed: the seeds differ far more than the methods"
    wins = sum((a > b) + 0.5 * (a == b) for a in VALUES["adpo"] for b in VALUES["kd"]) / 25
    assert adpo["probability_of_improvement"] == pytest.approx(wins)
    assert [r["method"] for r in csv.DictReader((tmp_path / "t.csv").open())] == ["adpo", "kd"]
    assert "\\toprule" in (tmp_path / "t.tex").read_text() and "<svg" in (tmp_path / "t.svg").read_text()
    code, out, _ = compare(capsys, "--metric", "kl", "--baseline", "kd")
    assert code == 0 and "lower is better" in out and f"{wins:.4g}" in out, "P(better) turns with the direction"


def test_failed_runs_are_shown(runs, capsys):
    for method in ("kd", "adpo"):
        runs(method, 7, 0.0, status="failed" if method == "kd" else "done")
    told = json.loads(compare(capsys, "--json", "--baseline", "kd")[1])
    assert {r["method"]: (r["runs"], r["failed"]) for r in told["rows"]} == {"adpo": (6, 0), "kd": (5, 1)}
    assert told["rows"][0]["difference"] is None, "no pairs can be made with a run that failed"


def test_unequal_seeds_are_refused_or_bannered(runs, capsys):
    runs("kd", 7, 4.0)
    code, _, err = compare(capsys)
    assert code == 2 and "different seeds" in err and "kd: 0, 1, 2, 3, 4, 7" in err
    code, out, _ = compare(capsys, "--allow-mixed", "--baseline", "kd")
    assert code == 0 and "UNPAIRED" in out
    row = json.loads(compare(capsys, "--json", "--allow-mixed", "--baseline", "kd")[1])["rows"][0]
    assert row["difference"] is None and row["probability_of_improvement"] is not None


@pytest.mark.parametrize("change", [{"size": "paper"}, {"env": "pendulum"}, {"commit": "0ther"}])
def test_mixtures_are_refused_or_bannered(runs, capsys, change):
    for method in ("kd", "adpo"):
        runs(method, 8, 4.0, **change)
    code, _, err = compare(capsys)
    assert code == 2 and f"different {next(iter(change))}s" in err and "--allow-mixed" in err
    code, out, _ = compare(capsys, "--allow-mixed")
    assert code == 0 and "MIXED" in out


def test_by_a_setting_and_filters(runs, capsys):
    for seed in range(5):
        runs("adpo", seed, 20.0 + seed, tau=0.5)
    told = json.loads(compare(capsys, "--json", "--by", "method.tau", "method=adpo")[1])
    assert [(r["method.tau"], r["runs"]) for r in told["rows"]] == [("0.5", 5), ("1.0", 5)]


@pytest.mark.parametrize(("words", "said"), [
    (["--metric", "retrun"], "return"), (["--by", "method.nosuch"], "no such setting"), (["--baseline", "kdd"], "kd"),
    (["--env", "nosuch"], "no runs"), (["--claim", "nosuch"], "has no record"), (["--plot", "x.pdf"], ".png or .svg"),
    (["nosuchrun"], "nosuchrun")])
def test_wrong_words(runs, capsys, words, said):
    code, out, err = compare(capsys, *words)
    assert code == 2 and said in err and "Traceback" not in err
