"""DeepMind control suite (Tassa et al. 2018, arXiv 1801.00690): 1000 control steps, rewards in [0, 1], returns in [0, 1000].

Observations are the task's own entries, flattened and joined in the order of its observation spec. An episode ends by its
time limit, where a value goes on (the suite's discount stays 1), or by a true end (discount 0), which few tasks have.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings

import numpy as np

from envs.control.base import ControlWorld
from runner.errors import UserError, unknown
from runner.interface import knob


def suite():
    """dm_control.suite, imported without noise, with a way to render where there is no display."""
    if "dm_control.suite" in sys.modules:
        return sys.modules["dm_control.suite"]
    try:
        import dm_control  # noqa: F401
    except ImportError as error:
        hint = "" if sys.version_info < (3, 13) else (
            "\nits dependency labmaze, which the suite does not use, has no wheel for Python 3.13: pip install --no-deps "
            "dm-control dm-env dm-tree, then pip install lxml scipy requests pyparsing protobuf absl-py")
        raise UserError(f"the DeepMind control suite needs a package that is missing: {error}\n"
                        f"install the extra: pip install -e '.[dmc]'{hint}") from None
    from absl import logging
    logging.set_verbosity(logging.ERROR)  # its model files use deprecated attributes; it says so on every load
    chosen = "MUJOCO_GL" in os.environ
    if not chosen and not os.environ.get("DISPLAY"):
        os.environ["MUJOCO_GL"] = "egl"  # by itself dm_control takes GLFW, which then finds no display
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from dm_control import suite
        except Exception:
            if chosen or "MUJOCO_GL" not in os.environ:
                raise
            del os.environ["MUJOCO_GL"]  # no EGL here: train all the same
            for name in [n for n in sys.modules if n.split(".")[0] == "dm_control"]:
                del sys.modules[name]
            from dm_control import suite
    return suite


class DmcCopies:
    """The interface of envs/control/copies.py over `number` copies of one task of the suite."""

    def __init__(self, domain: str, task: str, number: int, render_mode: str | None = None, height: int = 240, width: int = 320):
        tasks = suite().TASKS_BY_DOMAIN
        if domain not in tasks:
            raise unknown("domain of the control suite", domain, tasks)
        if task not in tasks[domain]:
            raise unknown(f"task of '{domain}'", task, tasks[domain], f"tasks of {domain}: {', '.join(tasks[domain])}")
        self.envs = [suite().load(domain, task, task_kwargs={"random": 0}) for _ in range(number)]
        self.size = (height, width)
        self.before = [env.task.random.get_state() for env in self.envs]  # generators as they stood before the episodes
        spec = self.envs[0].action_spec()
        self.low, self.high = (np.broadcast_to(x, spec.shape).astype(np.float64) for x in (spec.minimum, spec.maximum))
        if not (np.isfinite(self.low).all() and np.isfinite(self.high).all()):
            raise UserError(f"{domain} {task}: its actions have no bounds, so [-1, 1] cannot be scaled to them")
        self.observation_size = sum(int(np.prod(s.shape)) for s in self.envs[0].observation_spec().values())
        self.action_size = int(np.prod(spec.shape))

    def _flat(self, step) -> np.ndarray:
        return np.concatenate([np.ravel(v) for v in step.observation.values()]).astype(np.float64)

    def reset(self, index: int, seed: int | None = None) -> np.ndarray:
        """A new episode in copy `index`; a seed starts that copy's generator anew."""
        env = self.envs[index]
        if seed is not None:
            env.task.random.seed(seed % 2**32)
        self.before[index] = env.task.random.get_state()
        return self._flat(env.reset())

    def step(self, index: int, action: np.ndarray):
        """-> observation, reward, terminated, truncated"""
        action = np.clip(action.astype(np.float64), -1.0, 1.0)
        step = self.envs[index].step(self.low + (action + 1) * 0.5 * (self.high - self.low))
        ended = step.last()
        return self._flat(step), float(step.reward), bool(ended and step.discount == 0), bool(ended and step.discount != 0)

    def render(self, index: int) -> np.ndarray:
        """(height, width, 3) uint8"""
        return self.envs[index].physics.render(*self.size, camera_id=0)

    def close(self):
        for env in self.envs:
            env.close()

    # -- state: a task places targets in the model itself, so an episode's beginning is played again before the rest is set
    def state_dict(self) -> list[dict]:
        import mujoco

        out = []
        for env, before in zip(self.envs, self.before, strict=True):
            model, data, kind = env.physics.model.ptr, env.physics.data.ptr, mujoco.mjtState.mjSTATE_INTEGRATION
            values = np.empty(mujoco.mj_stateSize(model, kind))
            mujoco.mj_getState(model, data, values, kind)
            out.append({"mujoco": values.tolist(), "steps": env._step_count, "over": bool(env._reset_next_step),
                        "before": _plain(before), "generator": _plain(env.task.random.get_state())})
        return out

    def load_state_dict(self, states: list[dict]):
        import mujoco

        for index, (env, state) in enumerate(zip(self.envs, states, strict=True)):
            self.before[index] = _tuple(state["before"])
            env.task.random.set_state(self.before[index])
            env.reset()
            env.task.random.set_state(_tuple(state["generator"]))
            env._step_count, env._reset_next_step = state["steps"], state["over"]
            model, data = env.physics.model.ptr, env.physics.data.ptr
            mujoco.mj_setState(model, data, np.asarray(state["mujoco"]), mujoco.mjtState.mjSTATE_INTEGRATION)
            mujoco.mj_step1(model, data)  # the suite steps by halves: what follows from positions is ready between two steps


def _plain(state: tuple) -> list:
    name, words, position, has, cached = state
    return [name, words.tolist(), int(position), int(has), float(cached)]


def _tuple(state: list) -> tuple:
    name, words, position, has, cached = state
    return name, np.asarray(words, dtype=np.uint32), int(position), int(has), float(cached)


class ControlSuite(ControlWorld):
    @dataclasses.dataclass(frozen=True)
    class Config(ControlWorld.Config):
        domain: str = knob("cheetah", "the suite's domain")
        task: str = knob("run", "a task of that domain")

    def copies(self, number, **options):
        return DmcCopies(self.config.domain, self.config.task, number, **options)

    def teacher(self):
        raise UserError(f"env {self.config.domain}_{self.config.task} of the control suite ships no teacher")
