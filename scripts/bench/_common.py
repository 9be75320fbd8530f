"""What the benchmarks share: one thread, both clocks, interleaved repeats, a table, a json file.

Import it before torch: it sets the number of threads. CPU seconds (time.process_time) are what the ratios are made of,
since other processes on the machine disturb them least; wall seconds stand beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
sys.dont_write_bytecode = True
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))


def one_thread():
    import torch

    torch.set_num_threads(1)


def parser(text: str) -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--json", metavar="FILE", help="also write the figures, with command, hardware, versions and commit")
    return out


class Clock:
    """`with Clock() as c: …` -> c.cpu, c.wall in seconds. The collector runs before, not inside."""

    def __enter__(self):
        import gc

        gc.collect()
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        self.cpu, self.wall = time.process_time() - self._cpu, time.perf_counter() - self._wall


def interleave(sides: dict, repeats: int, say=None) -> dict[str, list[Clock]]:
    """Run every side once a repeat, in an order that turns round each time (A B, B A, A B, …). {name: clocks}"""
    out: dict[str, list[Clock]] = {name: [] for name in sides}
    for repeat in range(repeats):
        names = list(sides) if repeat % 2 == 0 else list(reversed(sides))
        for name in names:
            with Clock() as clock:
                sides[name]()
            out[name].append(clock)
        if say:
            print(f"  repeat {repeat + 1}/{repeats}: " + ", ".join(f"{n} {say(out[n][-1])}" for n in sides),
                  file=sys.stderr, flush=True)
    return out


def least(clocks, which: str) -> float:
    return min(getattr(c, which) for c in clocks)


def middle(clocks, which: str) -> float:
    return statistics.median(getattr(c, which) for c in clocks)


def ratios(above, below) -> dict[str, float]:
    """above / below on both clocks: of the minima, of the medians, and the median of the ratios repeat by repeat."""
    out = {}
    for which in ("cpu", "wall"):
        out[f"{which}_min"] = least(above, which) / least(below, which)
        out[f"{which}_median"] = middle(above, which) / middle(below, which)
        out[f"{which}_paired"] = statistics.median(getattr(a, which) / getattr(b, which) for a, b in zip(above, below))
    return out


def table(head: list[str], rows: list[list]):
    rows = [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in r] for r in [head, *rows]]
    widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
    for r in rows:
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths))).rstrip())


def verdict(name: str, value: float, target: float, most: bool) -> bool:
    ok = value <= target if most else value >= target
    print(f"{'ok  ' if ok else 'MISS'} {name}: {value:.3g} (target {'<=' if most else '>='} {target})")
    return ok


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def write_json(path: str | None, figures: dict):
    if not path:
        return
    from importlib import metadata

    from runner import record

    packages = record.versions()
    try:
        packages["stable-baselines3"] = metadata.version("stable-baselines3")
    except metadata.PackageNotFoundError:
        pass
    about = {"command": " ".join(["python", *sys.argv]), "time": record.now(), "cpu": cpu_model(), "cores": os.cpu_count(),
             "load_average": list(os.getloadavg()), "platform": platform.platform(), "versions": packages,
             **record.commit(ROOT)}
    Path(path).write_text(json.dumps({**about, **figures}, indent=1) + "\n")
    print(f"written: {path}")
