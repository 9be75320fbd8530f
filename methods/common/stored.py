"""What a person names on disk: finished runs, and the folders that other programs wrote."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from runner.errors import UserError, nearest


def load_run(network: nn.Module, path: str, parts: tuple[str, ...]) -> nn.Module:
    """Fill `network` with the weights of a finished run: its folder, the file weights.safetensors in it, or what `export` wrote.
    parts: which of a method's modules it is, the first that is there. What the network tells by them (Method.kind) is kept as
    `network.begun_as`, "" where the file does not say; the file's digest, for the run's record, as `network.begun_from`.

    UserError: no weights there, or of another shape."""
    place = Path(path).expanduser()
    file = place / "weights.safetensors" if place.is_dir() else place
    if not file.is_file():
        raise UserError(f"policy.path={path}: no weights there (looked for {file})\ngive the folder of a finished run")
    try:
        found = load_file(file)
        with safe_open(file, "pt") as opened:
            said = opened.metadata() or {}
    except SafetensorError as e:
        raise UserError(f"policy.path={path}: {file.name} can't be read: {e}\ngive the folder of a finished run") from None
    part = next((p for p in parts if any(k.startswith(f"{p}.") for k in found)), None)
    if part:
        found = {k.removeprefix(f"{part}."): v for k, v in found.items() if k.startswith(f"{part}.")}
    mine = network.state_dict()
    wrong = [k for k in {**mine, **found} if k not in mine or k not in found or found[k].shape != mine[k].shape]
    if wrong:
        there, needed = (str(tuple(w[wrong[0]].shape)) if wrong[0] in w else "missing" for w in (found, mine))
        raise UserError(f"policy.path={path}: the weights there are of another shape: {wrong[0]} is {there}, in this policy "
                        f"it is {needed}\nset the policy's sizes as that run had them (policy.width, "
                        "…), and take an env like its own")
    network.load_state_dict(found)
    network.begun_from = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    network.begun_as = said.get("kind") or json.loads(said.get("run", "{}")).get("kind", "")
    return network


def folder_of(path: str, sign: str, what: str) -> Path:
    """The folder `path`, which holds the file `sign`."""
    place = Path(path).expanduser()
    if not place.is_dir():
        around = [p.name for p in place.parent.iterdir() if p.is_dir()] if place.parent.is_dir() else []
        near = nearest(place.name, around)
        raise UserError(f"policy.path={path}: no such folder" + (f"\ndid you mean: {', '.join(near)}?" if near else "")
                        + f"\ngive {what}")
    if not (place / sign).is_file():
        held = ", ".join(sorted(p.name for p in place.iterdir())[:8]) or "nothing"
        raise UserError(f"policy.path={path}: no {sign} there; it holds: {held}\ngive {what}")
    return place


def read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{file} can't be read: {e}\ncopy that folder again") from None
