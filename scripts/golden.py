"""Write tests/golden/<method>.json anew: the metrics of a method's first updates at size=smoke.

    python scripts/golden.py [METHOD …]        (only after a change that is meant to change them)
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

UPDATES = 8


def main(names: list[str]):
    spec = importlib.util.spec_from_file_location("lab", ROOT / "tests/conformance/lab.py")
    lab = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lab)
    for name in names or lab.METHODS:
        method, _, stream = lab.assembled(name)
        text = {"words": lab.words_for(name), "metrics": lab.train(method, stream, UPDATES)}
        (ROOT / "tests/golden" / f"{name}.json").write_text(json.dumps(text, indent=1) + "\n")
        print(f"tests/golden/{name}.json")


if __name__ == "__main__":
    main(sys.argv[1:])
