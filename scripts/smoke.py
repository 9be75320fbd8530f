"""Every method at size=smoke, in one process: `make smoke`. Exits with 1 if one fails.

    python scripts/smoke.py [METHOD …]
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runner.catalogue import Catalogue  # noqa: E402
from runner.compose import compose  # noqa: E402


def smallest(book: Catalogue, method: str) -> str:
    """The env to smoke a method on: the quickest that fits (a testbed before a simulator)."""
    fits = book.fitting(book.methods(method))
    return next((e for e in ("pointmass", "pendulum") if e in fits), fits[0])


def smoke(method: str, runs: str) -> dict:
    """One smoke run, in this process; returns its record."""
    from runner.run import execute

    book = Catalogue()
    words = [f"method={method}", f"env={smallest(book, method)}", "size=smoke", "logger=none", f"runs={runs}"]
    return execute(compose(words, book), quiet=True)


def main(names: list[str]) -> int:
    failed = []
    from runner.fabric import fabric_class
    fabric_class()  # the seconds of its import belong to no method
    with tempfile.TemporaryDirectory() as runs:
        for name in names or Catalogue().names("method"):
            began = time.monotonic()
            try:
                result = smoke(name, runs)
                print(f"{name:24} {time.monotonic() - began:5.1f} s  on {result['config']['env']['name']}", flush=True)
            except Exception as error:
                failed.append(name)
                print(f"{name:24} FAILED {type(error).__name__}: {error}", flush=True)
    print(f"{len(names or Catalogue().names('method')) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
