"""Gymnasium simulators: MuJoCo v5 tasks and classic control."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from envs.control.base import ControlWorld
from envs.control.copies import Copies
from envs.control.teacher import Teacher
from runner.errors import UserError
from runner.interface import knob


class Simulator(ControlWorld):
    @dataclasses.dataclass(frozen=True)
    class Config(ControlWorld.Config):
        id: str = knob("HalfCheetah-v5", "Gymnasium's name of the environment")
        teacher: str = knob("", "safetensors file of a teacher's actor; empty: the one that ships with the env")

    def copies(self, number, **options):
        return Copies(self.config.id, number, **options)

    def teacher(self):
        path = self.config.teacher
        if not path:
            path = Path(__file__).parent / "teachers" / (self.config.id.split("-")[0].lower() + ".safetensors")
            if not path.is_file():
                raise UserError(f"env {self.config.id} ships no teacher; train one (python -m runner method=td3 …), "
                                "export it (python -m runner export RUN --to FILE) and pass env.teacher=FILE")
        teacher = Teacher.load(path, self.config.teacher_std, self.device)
        have = (self._spec.observation_size, self._spec.action_size)
        if (teacher.observation_size, teacher.action_size) != have:
            raise UserError(f"teacher {path} maps {teacher.observation_size} observations to {teacher.action_size} "
                            f"actions; {self.config.id} has {have[0]} and {have[1]}")
        return teacher
