"""Runs jobs in forked children and kills them: `python forked.py RUNS WORD …` (a helper of test_kill.py).

Imports torch and Lightning once, then for each job: one child runs it undisturbed in RUNS/whole; in RUNS/broken one
child is killed with SIGKILL as soon as it has logged a random number of lines, again and again, until one finishes.
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


def child(words: list[str]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            from runner.catalogue import Catalogue
            from runner.compose import compose
            from runner.run import execute
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


def main(runs: Path, words: list[str], kills: int, seed: int):
    import lightning.fabric  # noqa: F401

    from runner.catalogue import Catalogue
    from runner.compose import compose
    from runner.run import folder_of

    assert os.waitpid(child([*words, f"runs={runs / 'whole'}"]), 0)[1] == 0
    broken = [*words, f"runs={runs / 'broken'}"]
    folder = folder_of(compose(broken, Catalogue()))
    total = lines(runs / "whole" / folder.name / "metrics.jsonl")
    dice, killed = random.Random(seed), []
    for target in sorted(dice.sample(range(2, total - 1), kills)):
        pid = child(broken)
        while lines(folder / "metrics.jsonl") < target:
            assert os.waitpid(pid, os.WNOHANG)[0] == 0, "the child ended before it could be killed"
            time.sleep(0.0005)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        killed.append(lines(folder / "metrics.jsonl"))
    assert os.waitpid(child(broken), 0)[1] == 0
    print(json.dumps({"killed_after_lines": killed, "lines": total, "folder": folder.name}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[4:], int(sys.argv[2]), int(sys.argv[3]))
