"""Write requirements.lock: every dependency of the extras `dev`, exactly, with hashes, for Python 3.11 to 3.13.

    python scripts/lock.py            (needs the package uv: pip install uv)

torch is left out together with what only its GPU builds need (nvidia-*, cuda-*, triton): its build differs by machine, so
the Makefile installs it by itself, at the version named here. So is labmaze: only the mazes of dm-control use it, which are
not used here, and it has no wheel for Python 3.13.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
LEFT_OUT = re.compile(r"^(torch==|triton==|nvidia-|cuda-|labmaze==)")


def main():
    with tempfile.TemporaryDirectory() as folder:
        pins, raw = Path(folder) / "pins.in", Path(folder) / "out.txt"
        pins.write_text(f"{TORCH}\nsetuptools>=77\nwheel\n")  # what `pip install -e .` builds with
        subprocess.run([sys.executable, "-m", "uv", "pip", "compile", str(ROOT / "pyproject.toml"), str(pins), "--extra",
                        "dev", "-o", str(raw), "--universal", "--python-version", "3.11", "--generate-hashes",
                        "--no-header", "--no-annotate", "--quiet"], check=True)
        blocks = re.split(r"\n(?=[a-zA-Z])", raw.read_text().strip())
    kept = [b for b in blocks if not LEFT_OUT.match(b)]
    text = (f"# Every dependency, exactly; made by scripts/lock.py. {TORCH} is installed apart (see Makefile).\n"
            + "\n".join(kept) + "\n")
    (ROOT / "requirements.lock").write_text(text)
    print(f"requirements.lock: {len(kept)} packages")


if __name__ == "__main__":
    main()
