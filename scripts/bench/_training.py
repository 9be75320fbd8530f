"""A training as a run makes it (loop, stream, records), for benchmarks: train(steps) goes on from where it stands."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from runner import capture
from runner.catalogue import Catalogue
from runner.checkpoint import Checkpoints
from runner.compose import compose
from runner.loop import Loop
from runner.record import Record
from runner.run import _assemble, make_fabric, member_jobs
from runner.settings import Hardware
from runner.settings import Loop as Settings


class Training:
    def __init__(self, folder: Path, *words: str):
        """`words`: as on the command line; no checkpoint is written."""
        book = Catalogue([str(Path(__file__).parent / "worlds")])
        job = compose(["logger=none", "loop.save_seconds=0", *words], book)
        fabric = make_fabric(job.config["hardware"])
        self.method, world, self.stream, stack = _assemble(job, fabric)
        self.device, self.seeds = fabric.device, job.config["hardware"]["seeds"]
        records = []
        for member in member_jobs(job):
            (folder / member.name).mkdir(parents=True)
            records.append(Record(folder / member.name))
        graph = capture.possible(self.method, self.stream, fabric.device, Hardware(**job.config["hardware"]))
        self.loop = Loop(self.method, world, self.stream, Settings(**job.config["loop"]), seed=0, record=records[0],
                         fabric=fabric, checkpoints=Checkpoints(folder / "checkpoints", 1), stack=stack, records=records,
                         graph=graph)
        self.loop.resume()

    def train(self, steps: int):
        self.loop.settings = dataclasses.replace(self.loop.settings, steps=self.loop.step + steps)
        self.loop.run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
