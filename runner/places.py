"""Where data sets lie on this machine. Nothing is created by asking."""

from __future__ import annotations

import os
from pathlib import Path


def data_root() -> Path:
    """The project's own data sets and the runs that made them: $BALLAST_DATA, else ~/.cache/ballast/data."""
    return Path(os.environ.get("BALLAST_DATA") or "~/.cache/ballast/data").expanduser()


def minari_root() -> Path:
    """Data sets that Minari has downloaded: $MINARI_DATASETS_PATH, else Minari's own folder."""
    return Path(os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets").expanduser()


def own_id(own: str, size: str) -> str:
    """Minari's name of a data set that the project builds itself."""
    return f"{own}-{size}-v0"


def holds(root: Path, dataset: str) -> bool:
    return (root / dataset / "data" / "metadata.json").is_file()


def choose_source(dataset: list[str], size: str) -> str:
    """What `source=auto` means here and now: the published sets if all of them are on disk, else the project's own; for
    size smoke always the latter, so that tests do not hang on what was downloaded."""
    return "published" if size != "smoke" and dataset and all(holds(minari_root(), d) for d in dataset) else "own"
