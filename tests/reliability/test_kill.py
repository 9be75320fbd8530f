"""Killed at a random step with SIGKILL and started again, a run ends with the same bits as one left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FORKED = Path(__file__).with_name("forked.py")
ROOT = Path(__file__).resolve().parents[2]


def bits(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "metrics.jsonl").read_bytes(), (folder / "weights.safetensors").read_bytes()


JOBS = {
    # the replay buffer wraps around (capacity 300 < 450 steps), episodes end, and MuJoCo's state is restored
    "td3": ["method=td3", "env=halfcheetah", "size=smoke", "loop.steps=450", "env.capacity=300", "method.hidden=[32,32]"],
    "ddpg": ["method=ddpg", "env=pendulum", "size=smoke", "loop.steps=450", "env.copies=2", "method.hidden=[32,32]"],
    "adpo": ["method=adpo", "env=pointmass", "size=smoke", "loop.steps=450", "loop.select=best", "loop.validate_every=15"],
    "adpo_on_policy": ["method=adpo", "method.anchor=on_policy", "env.passes=3", "env=pointmass", "size=smoke",
                       "loop.steps=450"],
    # killed before, at and after the switch; the replay wraps around; probes are part of the state
    "wsrl": ["method=wsrl", "env=pointmass_medium", "size=smoke", "loop.steps=450", "method.offline_updates=150",
             "method.warmup=50", "env.capacity=200", "env.probe_steps=50", "method.retained=0.25", "method.critics=3",
             "method.hidden=[16,16]"],
    "rlpd": ["method=rlpd", "env=pointmass_medium", "size=smoke", "loop.steps=450", "env.copies=2", "method.hidden=[16,16]"],
    "kd": ["method=kd", "env=pointmass", "size=smoke", "loop.steps=450"],
    "ppo": ["method=ppo", "env=hopper", "size=smoke", "loop.steps=100"],
    "ogsrl": ["method=ogsrl", "env=dosing", "size=smoke", "loop.steps=100"],
    "orpo": ["method=orpo_occupancy", "env=tomato", "size=smoke", "loop.steps=100", "method.discriminator_hidden=[16]"],
}


@pytest.fixture(scope="module")
def killer(tmp_path_factory):
    """killer(folder, words) -> what forked.py tells of it; one process for all jobs, since its imports take seconds."""
    said = tmp_path_factory.mktemp("killer") / "stderr"
    with said.open("w") as stderr, subprocess.Popen([sys.executable, str(FORKED)], stdin=subprocess.PIPE, text=True,
                                                    stdout=subprocess.PIPE, stderr=stderr, cwd=said.parent) as process:
        def call(folder, words) -> dict:
            print(json.dumps([str(folder), 3, os.getpid() % 1000, *words]), file=process.stdin, flush=True)
            told = json.loads(process.stdout.readline() or '{"error": "forked.py ended"}')
            assert "error" not in told, f"{told['error']}\n{said.read_text()[-3000:]}"
            return told

        yield call
        process.kill()


@pytest.mark.parametrize("name", JOBS)
def test_kill_9_and_again_is_bit_identical(name, killer, tmp_path):
    told = killer(tmp_path, [*JOBS[name], "loop.log_every=5", "loop.save_steps=17", "loop.save_seconds=0", "logger=none"])
    whole, broken = tmp_path / "whole" / told["folder"], tmp_path / "broken" / told["folder"]
    assert bits(whole) == bits(broken), told
    events = [json.loads(line)["event"] for line in (broken / "events.jsonl").read_text().splitlines()]
    assert events.count("started") == 4 and events.count("resumed") >= 2, events
    assert json.loads((broken / "run.json").read_text())["attempts"] == 4


def start(words, **options):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "runner", *words], env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, **options)


def wait_for_lines(path: Path, count: int, process):
    deadline = time.time() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.time() < deadline
        time.sleep(0.01)


def test_sigterm_saves_says_so_and_the_same_command_continues(tmp_path):
    words = ["method=kd", "env=pointmass", "size=smoke", "loop.steps=20000", "loop.validate_every=0", "loop.log_every=10",
             "logger=none", f"runs={tmp_path}"]
    process = start(words, cwd=tmp_path)
    deadline = time.time() + 120
    while not list(tmp_path.glob("*/metrics.jsonl")):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.05)
    metrics = next(tmp_path.glob("*/metrics.jsonl"))
    wait_for_lines(metrics, 5, process)
    second = start(words, cwd=tmp_path)  # the same run, while it runs
    text = second.communicate(timeout=60)[0]
    assert second.returncode == 2 and f"pid {process.pid}" in text and "Traceback" not in text
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and "the same command continues" in text
    run = json.loads((metrics.parent / "run.json").read_text())
    assert run["status"] == "preempted" and run["step"] % 10 == 0
    assert not (metrics.parent / "lock").exists()
    assert len(metrics.read_text().splitlines()) == run["step"] // 10
    process = start([*words, "--quiet"], cwd=tmp_path)
    wait_for_lines(metrics, run["step"] // 10 + 5, process)
    process.kill()
    process.wait()
    lines = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert lines == list(range(10, lines[-1] + 1, 10)), "steps went on where they stopped"
