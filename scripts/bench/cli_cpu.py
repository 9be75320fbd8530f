"""CPU seconds (user + system, of the child) that a command of the command line costs before any training.

Target: at most 0.3 for each command (min over the repeats; the median stands beside it).
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time

import _common as common

COMMANDS = {
    "list": ["list"],
    "--help": ["--help"],
    "show adpo": ["show", "adpo"],
    "check method=adpo env=halfcheetah": ["check", "method=adpo", "env=halfcheetah"],
}


def once(words: list[str]) -> tuple[float, float]:
    """(CPU, wall) seconds of `python -m runner words`."""
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}  # as a person calls it
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "runner", *words], cwd=common.ROOT, capture_output=True, text=True,
                          env=environment)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"python -m runner {' '.join(words)} failed ({done.returncode}):\n{done.stderr}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, wall


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--target", type=float, default=0.3, help="CPU seconds")
    a = parser.parse_args()
    times = {name: [] for name in COMMANDS}
    for words in COMMANDS.values():
        once(words)  # the disk's cache is warm in every repeat
    for _ in range(a.repeats):
        for name, words in COMMANDS.items():
            times[name].append(once(words))
    figures, rows = {}, []
    for name, pairs in times.items():
        cpu, wall = sorted(p[0] for p in pairs), sorted(p[1] for p in pairs)
        figures[name] = {"cpu_min": cpu[0], "cpu_median": cpu[len(cpu) // 2], "wall_min": wall[0],
                         "wall_median": wall[len(wall) // 2]}
        rows.append([name, *figures[name].values()])
    common.table(["python -m runner …", "CPU s min", "median", "wall s min", "median"], rows)
    good = all([common.verdict(name, f["cpu_min"], a.target, most=True) for name, f in figures.items()])
    common.write_json(a.json, {"repeats": a.repeats, "target": a.target, "figures": figures, "ok": good})
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
