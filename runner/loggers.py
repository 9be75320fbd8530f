"""Mirrors of metrics.jsonl: csv and W&B. A mirror that fails is dropped with a word; it never changes a run."""

from __future__ import annotations

import csv
import os
from pathlib import Path


def make_loggers(job, folder: Path) -> list:
    kind = job.config["logger"]["kind"]
    if kind == "csv":
        return [Csv(folder)]
    if kind == "wandb":
        return [Wandb(job, folder)]
    return []


class Csv:
    """metrics.csv, rebuilt from metrics.jsonl when the run ends: its columns are then known."""

    def __init__(self, folder: Path):
        self.folder = folder

    def log(self, line: dict):
        pass

    def close(self, ok: bool):
        from runner.record import lines

        rows = lines(self.folder / "metrics.jsonl")
        columns = list(dict.fromkeys(k for row in rows for k in row))
        with open(self.folder / "metrics.csv", "w", newline="") as f:
            writer = csv.DictWriter(f, columns)
            writer.writeheader()
            writer.writerows(rows)


class Wandb:
    """Weights & Biases. Offline by default: no account, no network, nothing asked."""

    def __init__(self, job, folder: Path):
        self.run, self.folder = None, folder
        logger = job.config["logger"]
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_CONSOLE", "off")
        try:
            import wandb

            quiet = wandb.Settings(init_timeout=30, x_disable_stats=True, disable_git=True, disable_code=True)
            self.run = wandb.init(
                mode=logger["mode"], project=logger["project"], entity=logger["entity"], dir=str(folder),
                name=folder.name, id=folder.name.replace(".", "-")[-64:],
                resume="allow" if logger["mode"] == "online" else None, config=job.config, settings=quiet)
        except BaseException as error:  # wandb raises its own, and SystemExit, for many reasons
            self._drop(error)

    def _drop(self, error):
        if isinstance(error, KeyboardInterrupt):
            raise error
        self.run = None
        with open(self.folder / "wandb-error.txt", "a") as f:
            f.write(f"{type(error).__name__}: {error}\nthe run goes on without W&B; metrics.jsonl holds everything\n")

    def log(self, line: dict):
        if self.run is not None:
            try:
                self.run.log({k: v for k, v in line.items() if v is not None}, step=line["step"])
            except BaseException as error:
                self._drop(error)

    def close(self, ok: bool):
        if self.run is not None:
            try:
                self.run.finish(exit_code=0 if ok else 1)
            except BaseException as error:
                self._drop(error)
