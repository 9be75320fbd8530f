"""Train HalfCheetah's teacher with td3 through the runner and export its actor into the tree.

    python scripts/teacher.py [--to FILE] [override …]

Leaves envs/control/teachers/halfcheetah.safetensors and a json with command, commit, steps, return. Killed, the same
command continues. Refuses to export a teacher below RETURN.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runner.catalogue import Catalogue  # noqa: E402
from runner.cli import main as runner  # noqa: E402
from runner.compose import compose  # noqa: E402
from runner.record import Record  # noqa: E402
from runner.run import folder_of  # noqa: E402

RETURN = 5000.0
WORDS = ["method=td3", "env=halfcheetah", "size=paper", "loop.steps=375000", "loop.eval_every=25000", "loop.log_every=1000",
         "logger=none"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", default=str(ROOT / "envs/control/teachers/halfcheetah.safetensors"))
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    words = [*WORDS, *arguments.overrides]
    code = runner(words)
    if code:
        return code
    job = compose(words, Catalogue())
    reached = Record(folder_of(job)).read()["metrics"]["return"]
    if reached < RETURN:
        print(f"this teacher returns {reached:.0f}, below {RETURN:.0f}: not exported; try another seed", file=sys.stderr)
        return 1
    return runner(["export", str(folder_of(job)), "--to", arguments.to])


if __name__ == "__main__":
    sys.exit(main())
