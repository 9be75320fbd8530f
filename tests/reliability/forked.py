"""Runs jobs in forked children and kills them (a helper of test_kill.py).

Reads a job a line from stdin, [RUNS, kills, seed, WORD, …], and answers each with a line of json. Imports are made once, here;
then one child runs the job undisturbed in RUNS/whole; in RUNS/broken one child is killed with SIGKILL as soon as it has logged
a random number of lines, again and again, until one finishes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["OMP_NUM_THREADS"] = "1"

from runner.catalogue import Catalogue, load_class  # noqa: E402
from runner.compose import compose  # noqa: E402
from runner.fabric import fabric_class  # noqa: E402
from runner.run import execute, folder_of  # noqa: E402

SAVED = 5  # lines after which a checkpoint is there, with loop.log_every=5 and loop.save_steps=17


def child(words: list[str]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        os.dup2(2, 1)  # stdout is for answers
        try:
            execute(compose(words, Catalogue()), quiet=True)
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run(runs: Path, kills: int, seed: int, words: list[str]) -> dict:
    broken = compose([*words, f"runs={runs / 'broken'}"], Catalogue())
    for entry in (*broken.methods, broken.env):  # imported once, not by every child
        load_class(entry)
    assert os.waitpid(child([*words, f"runs={runs / 'whole'}"]), 0)[1] == 0, "the undisturbed run failed"
    folder = folder_of(broken)
    total = lines(runs / "whole" / folder.name / "metrics.jsonl")
    dice, killed = random.Random(seed), []
    words = [*words, f"runs={runs / 'broken'}"]
    late = dice.sample(range(SAVED, total - 1), kills - 1)
    first = dice.choice([n for n in range(2, total - 1) if n not in late])  # may come before anything is saved, the others not
    for target in sorted([first, *late]):
        pid = child(words)
        while lines(folder / "metrics.jsonl") < target:
            assert os.waitpid(pid, os.WNOHANG)[0] == 0, "the child ended before it could be killed"
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        killed.append(lines(folder / "metrics.jsonl"))
    assert os.waitpid(child(words), 0)[1] == 0, "the run that was killed did not end well"
    return {"killed_after_lines": killed, "lines": total, "folder": folder.name}


def main():
    fabric_class()
    for line in sys.stdin:
        runs, kills, seed, *words = json.loads(line)
        try:
            answer = run(Path(runs), kills, seed, words)
        except AssertionError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
