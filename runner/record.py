"""One run's folder: run.json, metrics.jsonl, events.jsonl, checkpoints/, weights. Files are the truth.

    run.json       status, config, versions, commit, seed, timings, final metrics; replaced whole at every change
    metrics.jsonl  one line per logged step; only appended to, holds nothing that depends on the clock. A run that
                   continues from a checkpoint first drops the lines after it (a killed process may have written some)
    events.jsonl   started, resumed, saved, evaluated, …: with the time; the history of the attempts
    lock           who is working on it: host, pid, heartbeat
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

from runner.errors import UserError

STATUSES = ("planned", "running", "done", "failed", "preempted")
HEARTBEAT = 5.0     # seconds between heartbeats
STALE = 60.0        # seconds without one after which another host's lock is taken over


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def write_atomic(path: Path, text: str):
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def commit(root: Path) -> dict:
    """The project's git commit and whether its tracked files differ from it; empty outside a repository."""
    try:
        def git(*words):
            return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=10)
        head = git("rev-parse", "HEAD")
        if head.returncode:
            return {}
        return {"commit": head.stdout.strip(), "dirty": bool(git("status", "--porcelain", "-uno").stdout.strip())}
    except (OSError, subprocess.SubprocessError):
        return {}


def versions() -> dict:
    from importlib import metadata

    out = {"python": platform.python_version()}
    for package in ("torch", "lightning", "hydra-core", "numpy", "gymnasium", "mujoco", "safetensors"):
        try:
            out[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    return out


class Lock:
    """One process per run. The heartbeat tells other hosts; on this host a dead process's lock is taken at once."""

    def __init__(self, folder: Path):
        self.path, self._stop = folder / "lock", threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self):
        for _ in range(3):
            try:
                with open(self.path, "x") as f:
                    json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": now(),
                               "boot": _started(os.getpid())}, f)
                self._thread = threading.Thread(target=self._beat, daemon=True)
                self._thread.start()
                return self
            except FileExistsError:
                holder = self.holder()
                if holder is not None:
                    raise UserError(
                        f"another process works on this run: pid {holder.get('pid')} on {holder.get('host')}, since "
                        f"{holder.get('since')}\nwait for it, stop it, or start a copy of your own with --fork") from None
                self.path.unlink(missing_ok=True)
        raise UserError(f"the lock {self.path} changes hands too fast; try again")

    def holder(self) -> dict | None:
        """Who holds the lock, or None when it is free or its holder is dead."""
        try:
            age = time.time() - self.path.stat().st_mtime
            holder = json.loads(self.path.read_text())
        except FileNotFoundError:
            return None
        except ValueError:  # being written, or torn by a kill
            return {"pid": "?", "host": "?", "since": "just now"} if age < HEARTBEAT else None
        if holder.get("host") == socket.gethostname():
            alive = _started(holder.get("pid")) is not None and _started(holder["pid"]) == holder.get("boot")
            return holder if alive else None
        return holder if age < STALE else None

    def _beat(self):
        while not self._stop.wait(HEARTBEAT):
            try:
                os.utime(self.path)
            except OSError:
                return

    def release(self):
        self._stop.set()
        self.path.unlink(missing_ok=True)


def _started(pid) -> str | None:
    """When a process of this host began (its 22nd field in /proc), or None if there is none: pids are used again."""
    try:
        return Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, ValueError, TypeError, IndexError):
        try:
            os.kill(int(pid), 0)
            return "alive"
        except (OSError, ValueError, TypeError):
            return None


class Record:
    """The folder of one run."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.metrics_path = self.folder / "metrics.jsonl"
        self._metrics = None

    # -- run.json
    def read(self) -> dict | None:
        try:
            return json.loads((self.folder / "run.json").read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            raise UserError(f"{self.folder / 'run.json'} cannot be read; move the folder away or pass --force") from None

    def write(self, **changes):
        run = {**(self.read() or {}), **changes, "updated": now()}
        write_atomic(self.folder / "run.json", json.dumps(run, indent=1) + "\n")
        return run

    # -- metrics.jsonl
    def open_metrics(self, size: int):
        """Continue after the first `size` bytes: what a lost future wrote after the checkpoint is dropped."""
        with open(self.metrics_path, "ab"):
            pass
        have = self.metrics_path.stat().st_size
        if have < size:
            raise UserError(f"{self.metrics_path} is shorter ({have} bytes) than its checkpoint says ({size}); "
                            "it was changed by hand. Start again with --force")
        if have > size:
            os.truncate(self.metrics_path, size)
        self._metrics = open(self.metrics_path, "ab", buffering=0)

    def log(self, line: dict):
        self._metrics.write((json.dumps(line) + "\n").encode())

    def metrics_size(self) -> int:
        return self._metrics.tell()

    def event(self, what: str, **more):
        with open(self.folder / "events.jsonl", "a") as f:
            f.write(json.dumps({"time": now(), "event": what, **more}) + "\n")

    def close(self):
        if self._metrics:
            self._metrics.close()
            self._metrics = None


def lines(path: Path) -> list[dict]:
    """The lines of a jsonl file; a torn last line (a killed process) is left out."""
    out = []
    try:
        for line in Path(path).read_text().splitlines():
            try:
                out.append(json.loads(line))
            except ValueError:
                break
    except FileNotFoundError:
        pass
    return out


def killed(folder: Path, run: dict) -> bool:
    """Whether a run recorded as running has nobody working on it. Of seeds trained at once the first's folder is locked."""
    return run["status"] == "running" and Lock(folder.parent / run.get("batch", {}).get("state", folder.name)).holder() is None


def folders(runs: Path) -> list[Path]:
    return sorted((p.parent for p in Path(runs).glob("*/run.json")), key=lambda p: p.name)


def find(name: str, runs: Path) -> Path:
    """The folder of a run, by path, name, id or the beginning of one of them."""
    path = Path(name)
    if (path / "run.json").is_file():
        return path
    known = folders(runs)
    ids = {p.name.rpartition("-")[2]: p for p in known}
    hits = [p for p in known if p.name == name or p.name.startswith(name)]
    hits += [p for i, p in ids.items() if i.startswith(name) and p not in hits]
    exact = [p for p in hits if p.name == name]
    if len(exact or hits) == 1:
        return (exact or hits)[0]
    if hits:
        raise UserError(f"'{name}' fits several runs: {', '.join(p.name for p in hits[:6])}")
    from runner.errors import unknown
    if not known:
        raise UserError(f"no run '{name}': there are no runs in {runs}")
    raise unknown("run", name, [p.name for p in known], "`python -m runner status` lists runs")


def require_space(folder: Path, need: int = 200_000_000):
    """Refuse to start on a disk that is nearly full; nothing is written."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < need:
        raise UserError(f"not enough disk at {folder}: {free / 1e6:.0f} MB free, {need / 1e6:.0f} MB needed for "
                        "checkpoints and metrics\nmake room, or put runs elsewhere with runs=DIR")
