"""Several copies of one Gymnasium environment, stepped in turn, whose whole state can be saved.

Stepping in turn in one process beats Gymnasium's asynchronous vector environments by three to four times on two cores.
The state holds the simulator's (MuJoCo: time, positions, velocities, activations, warm start, bodies), the episode's step
count and the generator of the start states: enough to continue to the bit.
"""

from __future__ import annotations

import os

import numpy as np

from runner.errors import UserError


def make(env_id: str, **options):
    import gymnasium

    if "render_mode" in options:  # never without need: where there is no EGL, MuJoCo could not even be imported
        os.environ.setdefault("MUJOCO_GL", "egl")
    gymnasium.logger.min_level = gymnasium.logger.ERROR
    _quiet_mujoco()
    try:
        return gymnasium.make(env_id, disable_env_checker=True, **options)
    except gymnasium.error.DependencyNotInstalled as error:
        raise UserError(f"env '{env_id}' needs a package that is missing: {error}\n"
                        "install the extra: pip install -e '.[control]'") from None
    except gymnasium.error.Error as error:
        raise UserError(f"Gymnasium cannot make '{env_id}': {error}") from None


def _quiet_mujoco():
    """Gymnasium's model files use a deprecated attribute; MuJoCo warns on every load and writes MUJOCO_LOG.TXT."""
    try:
        import mujoco
    except ImportError:
        return
    if hasattr(mujoco, "set_mju_user_warning"):
        mujoco.set_mju_user_warning(lambda text: None if "deprecated" in str(text) else print(text))


class Copies:
    """`number` copies of `env_id`; actions in [-1, 1] are scaled to its action space. With `numbered`, actions may also be
    numbers to choose from: `actions` says how many, and `action_size` is None."""

    def __init__(self, env_id: str, number: int, numbered: bool = False, **options):
        from gymnasium.spaces import Box, Discrete

        self.envs = [make(env_id, **options) for _ in range(number)]
        box = self.envs[0].action_space
        self.actions = self.action_size = None
        if not isinstance(self.envs[0].observation_space, Box) or not isinstance(box, (Box, Discrete)):
            raise UserError(f"env '{env_id}': observations must be vectors, and actions vectors or numbers; it has "
                            f"{self.envs[0].observation_space} and {box}\ngymnasium.wrappers.FlattenObservation makes a vector")
        self.observation_size = int(np.prod(self.envs[0].observation_space.shape))
        if isinstance(box, Discrete):
            if not numbered:
                raise UserError(f"env '{env_id}' has numbered actions ({box}), where vectors are needed\n"
                                "methods that learn from rollouts (ppo) take it: env=cartpole env.id=" + env_id)
            self.actions, self.first = int(box.n), int(box.start)
            return
        if not (np.isfinite(box.low).all() and np.isfinite(box.high).all()):
            raise UserError(f"env '{env_id}' has an unbounded action space ({box}): actions in [-1, 1] cannot be scaled to it\n"
                            "wrap it with gymnasium.wrappers.RescaleAction or give its Box finite bounds")
        self.low, self.high = box.low.astype(np.float64), box.high.astype(np.float64)
        self.action_size = int(np.prod(box.shape))
        self.unit = bool(np.all(self.low == -1) and np.all(self.high == 1))

    def scale(self, action: np.ndarray):
        if self.actions:
            return self.first + int(action)
        action = np.clip(action.astype(np.float64), -1.0, 1.0)
        return action if self.unit else self.low + (action + 1) * 0.5 * (self.high - self.low)

    def reset(self, index: int, seed: int | None = None) -> np.ndarray:
        """A new episode in copy `index`; a seed starts that copy's generator anew."""
        return self.envs[index].reset(seed=seed)[0].reshape(-1)

    def step(self, index: int, action: np.ndarray):
        """-> observation, reward, terminated, truncated"""
        observation, reward, terminated, truncated, _ = self.envs[index].step(self.scale(action))
        return observation.reshape(-1), float(reward), bool(terminated), bool(truncated)

    def render(self, index: int) -> np.ndarray:
        """(height, width, 3) uint8"""
        return self.envs[index].render()

    def close(self):
        for env in self.envs:
            env.close()

    # -- state
    def state_dict(self) -> list[dict]:
        return [_state(env) for env in self.envs]

    def load_state_dict(self, states: list[dict]):
        for env, state in zip(self.envs, states, strict=True):
            _restore(env, state)


class OwnCopies:
    """The same interface for a testbed of this project, whose dynamics are a few lines of numpy: of each copy a state (S,),
    which is what is observed, its step count and its generator. Actions are vectors in [-1, 1]."""

    observation_size: int
    action_size: int
    horizon: int

    def __init__(self, number: int):
        self.envs, self.state, self.steps = range(number), np.zeros((number, self.observation_size)), [0] * number
        self.generators = [np.random.default_rng(i) for i in range(number)]

    def start(self, generator: np.random.Generator) -> np.ndarray:
        """(S,): the first state of an episode"""
        raise NotImplementedError

    def advance(self, index: int, action: np.ndarray):
        """One step from `self.state[index]` -> next state (S,), reward, terminated"""
        raise NotImplementedError

    def reset(self, index: int, seed: int | None = None) -> np.ndarray:
        if seed is not None:
            self.generators[index] = np.random.default_rng(seed)
        self.steps[index], self.state[index] = 0, self.start(self.generators[index])
        return self.state[index].copy()

    def step(self, index: int, action: np.ndarray):
        """-> observation, reward, terminated, truncated"""
        action = np.clip(np.asarray(action, dtype=np.float64), -1, 1)
        self.state[index], reward, terminated = self.advance(index, action)
        self.steps[index] += 1
        return self.state[index].copy(), float(reward), bool(terminated), self.steps[index] >= self.horizon

    def close(self):
        pass

    def state_dict(self) -> list[dict]:
        return [{"state": self.state[i].tolist(), "steps": self.steps[i], "generator": g.bit_generator.state}
                for i, g in enumerate(self.generators)]

    def load_state_dict(self, states: list[dict]):
        for i, saved in enumerate(states):
            self.state[i], self.steps[i] = saved["state"], saved["steps"]
            self.generators[i].bit_generator.state = saved["generator"]


def _layers(env):
    while True:
        yield env
        if not hasattr(env, "env"):
            return
        env = env.env


def _state(env) -> dict:
    inner = env.unwrapped
    state = {"generator": inner.np_random.bit_generator.state}
    steps = [w._elapsed_steps for w in _layers(env) if hasattr(w, "_elapsed_steps")]
    state["elapsed"] = steps[0] if steps else None
    if hasattr(inner, "data") and hasattr(inner, "model"):
        import mujoco

        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        values = np.empty(mujoco.mj_stateSize(inner.model, kind))
        mujoco.mj_getState(inner.model, inner.data, values, kind)
        state["mujoco"] = values.tolist()
        # Ant rewards the way of a body's position as MuJoCo left it: one substep behind the state, so not to be had from it.
        state["bodies"] = inner.data.xpos.tolist()
    else:
        state["values"] = np.asarray(inner.state, dtype=np.float64).tolist()
        if getattr(inner, "last_u", None) is not None:
            state["last_u"] = float(inner.last_u)
    return state


def _restore(env, state: dict):
    env.reset(seed=0)  # wrappers refuse to step before a reset
    inner = env.unwrapped
    inner.np_random.bit_generator.state = state["generator"]
    for wrapper in _layers(env):
        if hasattr(wrapper, "_elapsed_steps"):
            wrapper._elapsed_steps = state["elapsed"]
    if "mujoco" in state:
        import mujoco

        mujoco.mj_setState(inner.model, inner.data, np.asarray(state["mujoco"]), mujoco.mjtState.mjSTATE_INTEGRATION)
        inner.data.xpos[:] = state.get("bodies", inner.data.xpos)
    else:
        inner.state = np.asarray(state["values"])
        if "last_u" in state:
            inner.last_u = state["last_u"]
