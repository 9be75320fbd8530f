"""Checkpoints: all state of a run, as safetensors + json, each with a digest; written whole or not at all.

A checkpoint is a folder `step_000000123/` with `tensors.safetensors` and `state.json`. Rows that are only ever added
(a replay buffer) lie once in `journal/`, in segments that later checkpoints share.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load, save


class Corrupt(Exception):
    """A checkpoint that cannot be read; the message says why."""


def _split(value, path, tensors):
    """Nested state -> a json skeleton; tensors go to `tensors` under their path."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().to("cpu").contiguous().clone()
        return {"__tensor__": path}
    if isinstance(value, dict):
        # json has text keys only: a pair list keeps ints (optimisers index their state by int)
        return {"__dict__": [[k, _split(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "__list__" if isinstance(value, list) else "__tuple__"
        return {kind: [_split(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"state at '{path}' is a {type(value).__name__}: only tensors, numbers, text, dicts and lists can "
                    "be saved")


def _join(value, tensors):
    if isinstance(value, dict):
        if "__tensor__" in value:
            return tensors[value["__tensor__"]]
        if "__dict__" in value:
            return {k: _join(v, tensors) for k, v in value["__dict__"]}
        if "__list__" in value:
            return [_join(v, tensors) for v in value["__list__"]]
        return tuple(_join(v, tensors) for v in value["__tuple__"])
    return value


def _write(path: Path, data: bytes):
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Checkpoints:
    """The checkpoints of one run, in `folder`; the newest `keep` are kept."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = Path(folder), keep
        self.journal = self.folder / "journal"
        self.last_segments: list[dict] = []  # of the newest checkpoint saved or loaded

    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, newest first."""
        return sorted((int(p.name[5:]) for p in self.folder.glob("step_*") if p.name[5:].isdigit()), reverse=True)

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:09d}"

    def save(self, step: int, state: dict, stream=None):
        """Write a checkpoint; `stream` may bring a journal (see Stream.journal_rows)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, torch.Tensor] = {}
        skeleton = _split(state, "", tensors)
        segments = self._save_journal(stream) if stream is not None and stream.journal_size() else []
        data = save(tensors)
        text = json.dumps({"step": step, "state": skeleton, "digest": _sha(data), "journal": segments})
        record = json.dumps({"digest": _sha(text.encode())}) + "\n" + text
        target, temporary = self.path(step), self.folder / f".tmp_{step}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        _write(temporary / "tensors.safetensors", data)
        _write(temporary / "state.json", record.encode())
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        self._forget()

    def _save_journal(self, stream) -> list[dict]:
        self.journal.mkdir(exist_ok=True)
        first, total = stream.journal_first(), stream.journal_size()
        segments = self.last_segments
        done = max([first, *(s["end"] for s in segments)])  # rows before `first` are gone, saved or not
        if total > done:
            name = f"rows_{done:012d}_{total:012d}.safetensors"
            data = save({"rows": stream.journal_rows(done, total).contiguous()})
            temporary = self.journal / f".tmp_{name}"
            _write(temporary, data)
            os.replace(temporary, self.journal / name)
            segments = [*segments, {"name": name, "begin": done, "end": total, "digest": _sha(data)}]
        self.last_segments = [s for s in segments if s["end"] > first]
        return self.last_segments

    def _forget(self):
        steps = self.steps()
        for old in steps[self.keep:]:
            shutil.rmtree(self.path(old), ignore_errors=True)
        if self.journal.is_dir():
            needed = set()
            for step in steps[: self.keep]:
                try:
                    needed |= {s["name"] for s in self._read_text(step)["journal"]}
                except Corrupt:
                    continue
            for path in self.journal.iterdir():
                if path.name not in needed:
                    path.unlink(missing_ok=True)

    def _read_text(self, step: int) -> dict:
        path = self.path(step) / "state.json"
        try:
            head, _, text = path.read_text().partition("\n")
            digest = json.loads(head)["digest"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Corrupt(f"{path}: {error}") from None
        if _sha(text.encode()) != digest:
            raise Corrupt(f"{path}: its content does not match its digest")
        return json.loads(text)

    def load(self, step: int, stream=None) -> dict:
        """The state saved at `step`; the stream's journal is given back to it. Raises Corrupt."""
        record = self._read_text(step)
        path = self.path(step) / "tensors.safetensors"
        try:
            data = path.read_bytes()
        except OSError as error:
            raise Corrupt(f"{path}: {error}") from None
        if _sha(data) != record["digest"]:
            raise Corrupt(f"{path}: its content does not match its digest")
        state = _join(record["state"], load(data))
        rows = []
        for segment in record["journal"]:
            try:
                data = (self.journal / segment["name"]).read_bytes()
            except OSError as error:
                raise Corrupt(f"{self.journal / segment['name']}: {error}") from None
            if _sha(data) != segment["digest"]:
                raise Corrupt(f"{self.journal / segment['name']}: its content does not match its digest")
            rows.append(load(data)["rows"])
        if rows and stream is not None:
            stream.load_journal(torch.cat(rows), record["journal"][0]["begin"])
        self.last_segments = record["journal"]
        return state
