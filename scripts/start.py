"""Put a start that `data build` has made into the tree, where it is shipped (at most 1 MB), with its card as provenance.

    python scripts/start.py ENV        # after: python -m runner data build ENV
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runner.catalogue import Catalogue  # noqa: E402
from runner.data import folder_of  # noqa: E402

MOST = 1_000_000  # bytes


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    entry = Catalogue().get("env", sys.argv[1])
    made, target = folder_of(entry, "claim"), ROOT / "envs/prompts/starts"
    file = made / "start.safetensors"
    if not file.is_file() or file.stat().st_size > MOST:
        print(f"{file}: " + (f"larger than {MOST:,} bytes" if file.is_file() else "not built yet"), file=sys.stderr)
        return 1
    name = Path(entry.values["own"]).parent.name
    target.mkdir(exist_ok=True)
    shutil.copyfile(file, target / f"{name}.safetensors")
    shutil.copyfile(made / "card.json", target / f"{name}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
