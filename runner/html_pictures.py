"""The pictures of runs on the report's page, inside it: <img> of data, nothing is fetched."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from runner.pictures import FOLDER

MOST = 12          # pictures of an env
LARGEST = 100_000  # bytes of one; larger ones stay in their folder


def gallery(folders: dict[str, Path]) -> str:
    """A strip of the pictures of some runs, {label: folder}; "" where there are none."""
    out = []
    for label, folder in folders.items():
        for path in sorted((folder / FOLDER).glob("*.png")):
            if len(out) < MOST and path.stat().st_size <= LARGEST:
                data = base64.b64encode(path.read_bytes()).decode()
                words = escape(f"{path.stem} of {label}")
                out.append(f'<figure class="picture"><img src="data:image/png;base64,{data}" alt="{words}" loading="lazy">'
                           f"<figcaption>{words}</figcaption></figure>")
    return f'<div class="gallery">{"".join(out)}</div>' if out else ""
