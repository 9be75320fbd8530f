"""Put a start that `data build` has made into the tree, beside its world in a folder starts/, where it is shipped (at most 1 MB,
a larger one in half precision), with its card as provenance.

    python scripts/start.py ENV        # after: python -m runner data build ENV
"""

from __future__ import annotations

import hashlib
import json
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
    made, target = folder_of(entry, "claim"), entry.source.parent / "starts"
    file = made / "start.safetensors"
    if not file.is_file():
        print(f"{file}: not built yet", file=sys.stderr)
        return 1
    data, card = file.read_bytes(), json.loads((made / "card.json").read_text())
    if len(data) > MOST:
        from safetensors.torch import load, save

        data = save({k: v.half() for k, v in load(data).items()})
        card |= {"digest": hashlib.sha256(data).hexdigest(), "precision": "float16"}
    if len(data) > MOST:
        print(f"{file}: {len(data):,} bytes in half precision; at most {MOST:,} are shipped", file=sys.stderr)
        return 1
    name = Path(entry.values["own"]).parent.name
    target.mkdir(exist_ok=True)
    (target / f"{name}.safetensors").write_bytes(data)
    (target / f"{name}.json").write_text(json.dumps(card, indent=1, default=float) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
