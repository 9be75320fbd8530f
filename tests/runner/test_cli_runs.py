"""Runs through the command line: what they leave, that they are not run twice, locks, sweeps, the tools after a run."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest

from runner.record import _started

SMOKE = ("env=pointmass", "size=smoke", "logger=none")


def run_folders(cwd: Path) -> list[Path]:
    return sorted(p.parent for p in (cwd / "runs").glob("*/run.json"))


def only(cwd: Path) -> Path:
    (folder,) = run_folders(cwd)
    return folder


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def snapshot(folder: Path) -> dict:
    return {p.relative_to(folder): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def same_weights(one: Path, two: Path):
    from safetensors.torch import load_file
    a, b = load_file(one / "weights.safetensors"), load_file(two / "weights.safetensors")
    assert set(a) == set(b) and all(a[k].equal(b[k]) for k in a)


def done(result) -> None:
    assert result.code == 0, result.text


# ---- one run -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["adpo", "td3"])
def test_what_a_run_leaves(cli, method):
    result = cli(f"method={method}", *SMOKE, "seed=3")
    done(result)
    folder = only(cli.cwd)
    run = record(folder)
    assert folder.name == f"{method}-pointmass-s3-{run['id']}" == run["name"]
    assert run["status"] == "done" and run["seed"] == 3 and run["step"] == run["evaluated_step"] == 12
    assert run["command"] == f"python -m runner method={method} env=pointmass size=smoke logger=none seed=3"
    assert run["config"]["method"]["name"] == method and run["config"]["loop"]["steps"] == 12
    assert set(run["config"]) == {"method", "env", "size", "loop", "hardware", "logger", "seed", "runs"}
    assert {"python", "torch", "lightning", "numpy"} <= set(run["versions"])
    if shutil.which("git") and (Path(__file__).resolve().parents[2] / ".git").exists():
        assert re.fullmatch("[0-9a-f]{40}", run["commit"]) and isinstance(run["dirty"], bool)
    assert run["seconds"] > 0 and run["started"] <= run["finished"] and run["attempts"] == 1 and run["world_size"] == 1
    assert isinstance(run["metrics"]["return"], float)
    expected = {"random policy", "all-zero action"} | ({"teacher"} if method == "adpo" else set())
    assert set(run["references"]) == expected
    assert all(isinstance(row["return"], float) for row in run["references"].values())
    for name in expected:
        assert name in result.out
    assert "higher is better" in result.out and folder.name in result.out
    assert set(run["metric_meaning"]) == set(run["metrics"]) and run["metric_meaning"]["return"][0] == "max"

    lines = json_lines(folder / "metrics.jsonl")
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)) and steps[-1] == 12 and {4, 8, 12} <= set(steps)
    events = [e["event"] for e in json_lines(folder / "events.jsonl")]
    assert events[0] == "started" and events[-1] == "done"
    assert (folder / "weights.safetensors").is_file() and not (folder / "lock").exists()
    assert not (folder / "wandb").exists() and not (folder / "metrics.csv").exists()


def test_plain_lines_where_there_is_no_terminal(cli):
    result = cli("method=kd", *SMOKE)
    done(result)
    assert "kd on pointmass: step 0 of 12" in result.err
    assert re.search(r"12/12  [\d,]+ steps/s  0:00 left  loss ", result.err)
    assert "\x1b" not in result.text
    quiet = cli("method=kd", *SMOKE, "--force", "--quiet")
    done(quiet)
    assert quiet.err == "" and "return" in quiet.out


def test_csv(cli):
    done(cli("method=kd", "env=pointmass", "size=smoke", "logger=csv"))
    folder = only(cli.cwd)
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert rows[0].startswith("step,") and len(rows) == 1 + len(json_lines(folder / "metrics.jsonl"))


def test_the_same_command_again_runs_nothing(cli, monkeypatch):
    done(cli("method=kd", *SMOKE))
    before = snapshot(only(cli.cwd))
    import runner.run
    monkeypatch.setattr(runner.run, "assemble", lambda *a, **k: pytest.fail("it was run again"))
    again = cli("method=kd", *SMOKE)
    done(again)
    assert "finished" in again.out and "--force" in again.out and "return" in again.out
    done(cli("method=kd", "env=pointmass", "size=smoke", "logger=csv"))  # a mirror is no other run
    done(cli("method=kd", *SMOKE, "loop.save_steps=2", "loop.keep=5"))
    assert snapshot(only(cli.cwd)) == before


def test_force_and_fork(cli):
    done(cli("method=kd", *SMOKE))
    folder = only(cli.cwd)
    first, metrics = record(folder), (folder / "metrics.jsonl").read_bytes()
    (folder / "left-over.txt").write_text("x")
    done(cli("method=kd", *SMOKE, "--force"))
    assert only(cli.cwd) == folder and not (folder / "left-over.txt").exists()
    second = record(folder)
    assert second["attempts"] == 1 and second["metrics"] == first["metrics"]
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    before = snapshot(folder)
    for number in (2, 3):
        done(cli("method=kd", *SMOKE, "--fork"))
        copy = folder.with_name(f"{folder.name}-fork{number}")
        assert record(copy)["status"] == "done" and record(copy)["id"] == first["id"]
        assert (copy / "metrics.jsonl").read_bytes() == metrics
    assert snapshot(folder) == before and len(run_folders(cli.cwd)) == 3


def run_id(cli, *words) -> str:
    result = cli("check", *words, "--json")
    done(result)
    return json.loads(result.out)["id"]


def test_identity(cli):
    base = run_id(cli, "method=kd", *SMOKE)
    for same in ("logger=csv", "logger=wandb", "logger.project=other", "runs=elsewhere", "loop.save_steps=3",
                 "loop.save_seconds=0", "loop.keep=7", "seed=0", "method.tau=1", "method.tau=1.0", "method.clip=1e0",
                 "+method.tau=1", "method=preference/kd"):
        assert run_id(cli, "method=kd", *SMOKE, same) == base, same
    others = {word: run_id(cli, "method=kd", *SMOKE, word) for word in
              ("seed=1", "method.tau=0.5", "loop.steps=13", "loop.select=best", "env.episodes=3", "method.hidden=[8]",
               "hardware.precision=bf16-mixed", "loop.validate_every=0", "method=adpo", "size=claim")}
    assert len({base, *others.values()}) == 1 + len(others), others


def test_another_runs_folder(cli):
    done(cli("method=kd", *SMOKE, "runs=else/where"))
    assert not (cli.cwd / "runs").exists()
    (folder,) = (cli.cwd / "else" / "where").iterdir()
    assert folder.name in cli("status", "--runs", "else/where").out
    assert folder.name in cli("status", "runs=else/where").out  # as it was written for the run
    assert "no runs" in cli("status").out


# ---- locks ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    yield process
    process.kill()
    process.wait()


def lock(folder: Path, pid: int, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    text = {"host": socket.gethostname(), "pid": pid, "since": "2026-01-01T00:00:00", "boot": _started(pid), **changes}
    (folder / "lock").write_text(json.dumps(text))


def folder_to_be(cli, *words) -> Path:
    out = cli("check", *words).out
    return cli.cwd / re.search(r"folder (\S+)", out).group(1)


def test_a_live_lock_refuses(cli, sleeper, monkeypatch):
    import runner.run
    folder = folder_to_be(cli, "method=kd", *SMOKE)
    lock(folder, sleeper.pid)
    with monkeypatch.context() as patch:
        patch.setattr(runner.run, "assemble", lambda *a, **k: pytest.fail("it was started"))
        for more in ((), ("--force",)):
            result = cli("method=kd", *SMOKE, *more)
            assert result.code == 2
            assert f"pid {sleeper.pid}" in result.err and socket.gethostname() in result.err and "--fork" in result.err
    assert [p.name for p in folder.iterdir()] == ["lock"]
    done(cli("method=kd", *SMOKE, "--fork"))
    assert [p.name for p in run_folders(cli.cwd)] == [f"{folder.name}-fork2"]


def test_a_live_lock_does_not_keep_a_finished_run_from_being_read(cli, sleeper):
    done(cli("method=kd", *SMOKE))
    folder = only(cli.cwd)
    lock(folder, sleeper.pid)
    done(cli("method=kd", *SMOKE))
    assert cli("method=kd", *SMOKE, "--force").code == 2
    assert record(folder)["status"] == "done"


@pytest.mark.parametrize("kind", ["dead", "pid used again", "torn", "other host, silent"])
def test_a_dead_lock_is_taken_over(cli, sleeper, kind):
    folder = folder_to_be(cli, "method=kd", *SMOKE)
    lock(folder, sleeper.pid)
    if kind == "dead":
        sleeper.kill()
        sleeper.wait()
    elif kind == "pid used again":
        lock(folder, sleeper.pid, boot="1")
    elif kind == "torn":
        (folder / "lock").write_text('{"host": "')
    else:
        lock(folder, 1, host="elsewhere")
    old = time.time() - 3600
    if kind != "dead":
        os.utime(folder / "lock", (old, old))
    done(cli("method=kd", *SMOKE))
    assert record(folder)["status"] == "done" and not (folder / "lock").exists()


def test_another_host_that_beats_is_respected(cli):
    folder = folder_to_be(cli, "method=kd", *SMOKE)
    lock(folder, 1, host="elsewhere")
    result = cli("method=kd", *SMOKE)
    assert result.code == 2 and "elsewhere" in result.err


# ---- a method of one's own, failures -------------------------------------------------------------------------------

def test_own_method_runs_alone_and_composed(cli, own, bodies):
    own.method("mine").method("yours").method("slim", bodies["actor_penalty"], "actor_penalty", base="DDPG")
    done(cli("method=mine", *SMOKE, own.option))
    done(cli("method=td3+slim", *SMOKE, own.option))
    done(cli("method=mine+yours", *SMOKE, own.option))
    again = cli("method=yours+mine", *SMOKE, own.option)
    done(again)
    assert "finished" in again.out and len(run_folders(cli.cwd)) == 3
    runs = {record(f)["config"]["method"]["name"]: f for f in run_folders(cli.cwd)}
    assert set(runs) == {"mine", "slim+td3", "mine+yours"}
    assert record(runs["mine"])["command"] == f"python -m runner method=mine {' '.join(SMOKE)} {own.option}"
    losses = {n: [line["critic_loss"] for line in json_lines(f / "metrics.jsonl")] for n, f in runs.items()}
    assert losses["mine"] != losses["mine+yours"]
    name = runs["mine+yours"].name
    done(cli("eval", name, own.option))
    without = cli("eval", name)
    assert without.code == 2 and "--include" in without.err


def test_neutral_settings_of_an_own_method_are_its_base_to_the_bit(cli, own):
    own.method("mine")
    done(cli("method=mine", *SMOKE, "method.mine_weight=0", own.option))
    done(cli("method=td3", *SMOKE))
    one, two = (record(f)["metrics"] for f in run_folders(cli.cwd))
    assert one == two
    a, b = (f / "metrics.jsonl" for f in run_folders(cli.cwd))
    assert a.read_bytes() == b.read_bytes()


RAISES = '''\
    def {where}:
        if not os.path.exists("mended"):
            raise ValueError("a mistake of mine")
        return super().{call}
'''


@pytest.mark.parametrize("where, call", [("critic_penalty(self, *args)", "critic_penalty(*args)"),
                                         ("setup(self, spec)", "setup(spec)"),
                                         ("act(self, *args, **more)", "act(*args, **more)")])
def test_a_method_that_raises(cli, own, where, call):
    own.method("mine", RAISES.format(where=where, call=call))
    result = cli("method=mine", *SMOKE, own.option)
    folder = only(cli.cwd)
    assert result.code == 1 and result.err.count("failed: ") == 1
    assert "ValueError: a mistake of mine" in result.err
    assert str(folder.relative_to(cli.cwd) / "traceback.txt") in result.err
    text = (folder / "traceback.txt").read_text()
    assert "Traceback" in text and "mine.py" in text and "a mistake of mine" in text
    run = record(folder)
    assert run["status"] == "failed" and "a mistake of mine" in run["error"]
    assert run["config"]["method"]["name"] == "mine"
    assert not (folder / "lock").exists()
    assert "a mistake of mine" in cli("status").out
    assert cli("results").out.startswith("no runs")
    # mended, the same command does it, and nothing says any more that it failed
    (cli.cwd / "mended").touch()
    done(cli("method=mine", *SMOKE, own.option))
    assert only(cli.cwd) == folder
    assert record(folder)["status"] == "done" and not record(folder).get("error")
    assert not (folder / "traceback.txt").exists()


def test_code_that_cannot_be_imported(cli, own):
    own.method("mine")
    path = own.folder / "mine.py"
    path.write_text(path.read_text().replace("import os\n", "import os\nimport nowhere_to_be_found\n"))
    result = cli("method=mine", *SMOKE, own.option)
    assert result.code == 1 and "nowhere_to_be_found" in result.err and "traceback.txt" in result.err


def test_disk_full(cli, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 10**6, 10**6))
    for words in (("method=kd", *SMOKE), ("-m", "method=kd", "seed=0,1", *SMOKE)):
        result = cli(*words)
        assert result.code == 2 and "not enough disk" in result.err and "runs=DIR" in result.err
        assert not any(cli.cwd.iterdir())


def test_a_record_that_cannot_be_read(cli):
    done(cli("method=kd", *SMOKE))
    folder = only(cli.cwd)
    (folder / "run.json").write_text("{torn")
    result = cli("method=kd", *SMOKE)
    assert result.code == 2 and "run.json" in result.err and "--force" in result.err
    done(cli("method=kd", *SMOKE, "--force"))
    assert record(folder)["status"] == "done"


# ---- looking back --------------------------------------------------------------------------------------------------

@pytest.fixture
def two(cli):
    """A finished kd and a finished td3 run."""
    done(cli("method=kd", *SMOKE))
    done(cli("method=td3", *SMOKE, "seed=1"))
    cli.kd, cli.td3 = run_folders(cli.cwd)
    return cli


def test_status_and_results(two):
    for command in ("status", "results"):
        text = two(command).out
        assert "kd" in text and "td3" in text
        rows = json.loads(two(command, "--json").out)
        assert [r["name"] for r in rows] == [two.kd.name, two.td3.name]
        for filters, names in ((["method=kd"], ["kd"]), (["seed=1"], ["td3"]), (["seed=0,1"], ["kd", "td3"]),
                               (["env=pointmass", "method=td3"], ["td3"]), (["td3-point"], ["td3"]),
                               (["env=halfcheetah"], []), (["status=done"], ["kd", "td3"]), (["status=failed"], []),
                               (["loop.steps=12", "size=smoke"], ["kd", "td3"]), (["env.episodes=2"], ["kd", "td3"])):
            rows = json.loads(two(command, *filters, "--json").out)
            assert [r["name"].partition("-")[0] for r in rows] == names, (command, filters)
        wrong = two(command, "mehtod=kd")
        assert wrong.code == 2 and "mehtod" in wrong.err and "method=" in wrong.err
    (row,) = json.loads(two("status", "method=kd", "--json").out)
    assert row["status"] == "done" and row["step"] == row["steps"] == 12
    (row,) = json.loads(two("results", "method=td3", "--json").out)
    assert row["metrics"] == record(two.td3)["metrics"] and row["references"] and row["method"] == "td3"
    assert "no runs" in two("results", "method=adpo").out and two("results", "method=adpo").code == 0


def test_a_run_whose_process_is_gone_is_called_killed(two):
    run = record(two.kd)
    (two.kd / "run.json").write_text(json.dumps({**run, "status": "running"}))
    (row,) = json.loads(two("status", "method=kd", "--json").out)
    assert row["status"] == "killed" and row["step"] == 12
    assert json.loads(two("status", "status=killed", "--json").out)


def test_one_torn_record_does_not_hide_the_others(two):
    (two.kd / "run.json").write_text("{torn")
    for command in ("status", "results"):
        result = two(command, "--json")
        assert result.code == 0 and [r["name"] for r in json.loads(result.out)] == [two.td3.name]
        assert two.kd.name in result.err and "cannot be read" in result.err


def test_an_unfinished_fork_is_continued_by_the_same_command(cli):
    done(cli("method=kd", *SMOKE, "--fork"))
    copy = only(cli.cwd)
    run = record(copy)
    assert run["command"].endswith(" --fork")
    (copy / "run.json").write_text(json.dumps({**run, "status": "preempted"}))
    done(cli("method=kd", *SMOKE, "--fork"))
    assert only(cli.cwd) == copy and record(copy)["attempts"] == 2 and record(copy)["status"] == "done"


def test_eval(two):
    result = two("eval", two.kd.name, "--json")
    done(result)
    told = json.loads(result.out)
    assert told["metrics"] == record(two.kd)["metrics"]  # the same yardstick to the bit
    assert told["references"] == record(two.kd)["references"]
    result = two("eval", two.kd.name.rpartition("-")[2][:6], "env.episodes=3")  # by the beginning of its id
    done(result)
    assert "return" in result.out and "teacher" in result.out and "evaluations.jsonl" in result.out
    first, second = json_lines(two.kd / "evaluations.jsonl")
    assert first["env"]["episodes"] == 2 and second["env"]["episodes"] == 3
    assert first["metrics"]["return"] != second["metrics"]["return"]
    assert record(two.kd)["status"] == "done"
    for words, wanted in ((["method.tau=2"], "only env=NAME"), (["env.episode=2"], "env.episodes"),
                          (["env=pointmas"], "pointmass"), (["env=pendulum"], "needs candidates")):
        wrong = two("eval", two.kd.name, *words)
        assert wrong.code == 2 and wanted in wrong.err, wrong.text
    wrong = two("eval", "kkd")
    assert wrong.code == 2 and "unknown run 'kkd'" in wrong.err and "kd-pointmass" in wrong.err
    assert len(json_lines(two.kd / "evaluations.jsonl")) == 2


def test_eval_where_the_shapes_differ(two):
    result = two("eval", two.td3, "env=inverted_pendulum")
    assert result.code == 2 and "do not fit env 'inverted_pendulum'" in result.err
    assert not (two.td3 / "evaluations.jsonl").exists()


def test_a_name_that_fits_several_runs(two):
    done(two("method=kd", *SMOKE, "seed=1"))
    result = two("eval", "kd-pointmass")
    assert result.code == 2 and "several" in result.err and two.kd.name in result.err


def test_unfinished_runs_have_nothing_to_evaluate(two):
    run = record(two.kd)
    (two.kd / "run.json").write_text(json.dumps({**run, "status": "preempted"}))
    for words in (["eval", two.kd.name], ["export", two.kd.name, "--to", "x.safetensors"], ["video", two.kd.name]):
        result = two(*words)
        assert result.code == 2 and "preempted" in result.err and run["command"] in result.err
    assert not (two.cwd / "x.safetensors").exists()


def test_export(two):
    for name in ("policy.txt", "policy"):
        result = two("export", two.td3.name, "--to", name)
        assert result.code == 2 and ".safetensors" in result.err and not (two.cwd / name).exists()
    for folder in (two.kd, two.td3):
        result = two("export", folder.name, "--to", f"out/{folder.name}.safetensors")
        done(result)
        path = two.cwd / "out" / f"{folder.name}.safetensors"
        from safetensors import safe_open
        with safe_open(path, "pt") as f:
            tensors, meta = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()  # noqa: SIM118
        assert tensors and all(t.dim() for t in tensors.values() if t.numel() > 1) and meta
        told, run = json.loads(path.with_suffix(".json").read_text()), record(folder)
        assert told["run"] == run["id"] and told["metrics"] == run["metrics"]
        assert told["config"] == {k: v for k, v in run["config"].items() if k not in ("runs", "logger")}
        assert "runs=" not in told["command"], "where a run lay is not part of what it was"
        for key in ("command", "commit", "versions", "seed", "references", "description"):
            assert told[key] or told[key] == 0, key


def test_video_of_what_has_no_picture(two):
    before = snapshot(two.cwd)
    result = two("video", two.kd.name)
    assert result.code == 2 and "pointmass" in result.err and "picture" in result.err
    result = two("video", two.kd.name, "--to", "x.txt")
    assert result.code == 2 and ".mp4 or .gif" in result.err
    result = two("video", two.kd.name, "--steps", "many")
    assert result.code == 2 and "whole number" in result.err
    assert snapshot(two.cwd) == before


# ---- W&B: a mirror, never a condition ------------------------------------------------------------------------------

def test_wandb_offline_needs_no_account_and_no_network(cli):
    done(cli("method=kd", *SMOKE, "runs=plain"))
    result = cli("method=kd", "env=pointmass", "size=smoke", "logger=wandb")
    done(result)
    folder = only(cli.cwd)
    assert list((folder / "wandb").glob("offline-run-*/*.wandb")) and not (folder / "wandb-error.txt").exists()
    assert sorted(p.name for p in cli.cwd.iterdir()) == ["plain", "runs"]
    (plain,) = (cli.cwd / "plain").iterdir()
    assert plain.name == folder.name
    assert (plain / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()
    same_weights(plain, folder)
    assert record(plain)["metrics"] == record(folder)["metrics"]


class Sick:
    """A W&B run of which one thing fails."""

    def __init__(self, what, error):
        self.what, self.error = what, error

    def log(self, *_, **__):
        if self.what == "log":
            raise self.error

    def finish(self, *_, **__):
        if self.what == "finish":
            raise self.error


@pytest.mark.parametrize("what", ["init", "log", "finish"])
@pytest.mark.parametrize("error", [SystemExit(1), RuntimeError("no server")], ids=["SystemExit", "RuntimeError"])
def test_a_failing_wandb_changes_nothing(cli, monkeypatch, what, error):
    import wandb

    def init(*_, **__):
        if what == "init":
            raise error
        return Sick(what, error)

    done(cli("method=kd", *SMOKE, "runs=plain"))
    monkeypatch.setattr(wandb, "init", init)
    done(cli("method=kd", "env=pointmass", "size=smoke", "logger=wandb"))
    folder, (plain,) = only(cli.cwd), (cli.cwd / "plain").iterdir()
    text = (folder / "wandb-error.txt").read_text()
    assert type(error).__name__ in text and text.count("goes on without") == 1
    assert (plain / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()
    same_weights(plain, folder)
    assert record(folder)["status"] == "done" and record(plain)["metrics"] == record(folder)["metrics"]


# ---- real processes: few, each imports torch and lightning ---------------------------------------------------------

def test_sweep(shell):
    words = ("-m", "method=kd", "seed=0,1,2", *SMOKE)  # one more than there are slots; test_the_grammar_of_sweeps has grids
    result = shell(*words, "--jobs", "2")
    assert result.code == 0, result.text
    folders = run_folders(shell.cwd)
    names = [f.name.rsplit("-", 1)[0] for f in folders]
    assert names == [f"kd-pointmass-s{s}" for s in (0, 1, 2)]
    assert all(record(f)["status"] == "done" and record(f)["attempts"] == 1 for f in folders)
    for folder in folders:
        assert folder.name in result.err and record(folder)["id"] in result.out
        log = (folder / "output.log").read_text()
        assert "12/12" in log and "steps/s" in log and "\x1b" not in log
    assert "[3/3]" in result.err
    before = {f: snapshot(f) for f in folders}
    again = shell(*words, "--jobs", "2", "--json")
    assert again.code == 0, again.text
    rows = json.loads(again.out)
    assert len(rows) == 3 and {r["name"] for r in rows} == {f.name for f in folders}
    assert {f: snapshot(f) for f in folders} == before  # not even started


def planned(cli, *words) -> list[dict]:
    from runner.catalogue import Catalogue
    from runner.plan import plan

    return [job.config for _, job in plan(list(words), Catalogue())]


def test_the_grammar_of_sweeps(cli):
    base = ("env=pointmass", "size=smoke")
    assert [c["seed"] for c in planned(cli, "method=kd", *base, "seed=range(0,3)")] == [0, 1, 2]
    assert [c["seed"] for c in planned(cli, "method=kd", *base, "seed=range(0,10,step=4)")] == [0, 4, 8]
    assert [c["method"]["tau"] for c in planned(cli, "method=kd", *base, "method.tau=choice(0.5,2)")] == [0.5, 2.0]
    lists = planned(cli, "method=kd", *base, "method.hidden=[8],[16,16]")
    assert [c["method"]["hidden"] for c in lists] == [[8], [16, 16]]
    grid = [(c["method"]["name"], c["seed"]) for c in planned(cli, "method=adpo,kd", *base, "seed=0,1")]
    assert grid == [("adpo", 0), ("adpo", 1), ("kd", 0), ("kd", 1)]
    assert len(planned(cli, "method=kd", *base, "seed=0,0,1")) == 2  # one identity, one run
    assert len(planned(cli, "method=kd", *base)) == 1
    envs = planned(cli, "method=kd", "env=pointmass,halfcheetah")
    assert [c["env"]["name"] for c in envs] == ["pointmass", "halfcheetah"]


def test_finished_runs_of_a_sweep_start_no_process(cli, monkeypatch):
    for seed in (0, 1):
        done(cli("method=kd", *SMOKE, f"seed={seed}"))
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started"))
    result = cli("-m", "method=kd", "seed=0,1", *SMOKE)
    done(result)
    assert result.out.count("pointmass") == 2


def test_a_sweep_that_is_stopped_stops_its_runs(cli, monkeypatch):
    started, real = [], subprocess.Popen

    def sleeper(*_, **__):
        started.append(real(["sleep", "300"]))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", sleeper)
    left_alone = []
    old = signal.signal(signal.SIGTERM, lambda *_: left_alone.append(True))  # what a sweep must put its own in place of
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    ender = threading.Timer(10.0, lambda: [p.kill() for p in started])
    timer.start()
    ender.start()
    try:
        result = cli("-m", "method=kd", "seed=0,1,2", *SMOKE, "--jobs=2")
    finally:
        timer.cancel()
        ender.cancel()
        signal.signal(signal.SIGTERM, old)
        for process in started:
            process.kill()
            process.wait()
    assert not left_alone and result.code in (130, 143) and "stopped" in result.err
    assert [p.returncode for p in started] == [-signal.SIGTERM] * 2  # ended in order; the third was never begun


def test_live_display_on_a_terminal(shell):
    leader, follower = pty.openpty()
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
           "TERM": "xterm-256color", "COLUMNS": "150", "LINES": "40"}
    env.pop("NO_COLOR", None)
    process = subprocess.Popen([sys.executable, "-m", "runner", "method=kd", *SMOKE], cwd=shell.cwd, env=env,
                               stdin=follower, stdout=follower, stderr=follower, close_fds=True)
    os.close(follower)
    seen, deadline = b"", time.monotonic() + 200
    try:
        while time.monotonic() < deadline:
            if not select.select([leader], [], [], 1)[0]:
                continue
            try:
                chunk = os.read(leader, 65536)
            except OSError:  # the other end is closed
                break
            if not chunk:
                break
            seen += chunk
        code = process.wait(timeout=30)
    finally:
        process.kill()
        process.wait()
        os.close(leader)
    text = seen.decode(errors="replace")
    assert code == 0, text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "\x1b[" in text and "━" in plain  # drawn and redrawn
    assert "kd on pointmass" in plain and "100%" in plain and re.search(r"[\d,]+ steps/s", plain) and "left" in plain
    assert "loss" in plain and "step 0 of 12" not in plain
    assert "return" in plain and "random policy" in plain  # the result after it
