"""Continuous control: what every world of this kind shares. A world brings `copies` (the simulator) and a teacher.

Provides `transitions` (play and replay, for online RL), `rollouts` (play in order, for on-policy RL) and, where a teacher is
at hand, `candidates` (lists of actions scored by the teacher on states that it visits, for distillation by preferences).

A world with a data set (`columns`) provides `offline`, and `mixed`: the data set first, then online play; for that it
measures how far return and values fall after the switch (`dip`, `value_fall`; see envs/control/mixed.py).

Gold metric: the undiscounted return of the deterministic policy, mean over `episodes` episodes with fixed start states.
Beside it always stand the returns of a uniformly random policy and of the all-zero action: a policy below them has
learned nothing (HalfCheetah: random about -300, zero about 0).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from envs.control.distillation import Distillation, divergences, ndcg
from envs.control.mixed import Mixed
from envs.control.replay import Replay
from envs.control.rollouts import Rollouts
from envs.control.stored import Stored
from runner.errors import UserError
from runner.interface import Method, Metric, Spec, World, knob

EVALUATION_SEED = 10_000  # start states of evaluations: the same for every method and every seed of a run


class ControlWorld(World):
    @dataclasses.dataclass(frozen=True)
    class Config:
        episodes: int = knob(10, "episodes of an evaluation", low=1)
        copies: int = knob(1, "copies of the environment that are stepped in turn while training", low=1)
        steps_per_update: int = knob(1, "steps in every copy per update", low=1)
        rollout_steps: int = knob(2048, "T: steps in every copy per rollout", low=1, source="PPO, table 3")
        start_steps: int = knob(25_000, "uniformly random steps before the first update", low=0, source="TD3, sec. 6.1")
        capacity: int = knob(1_000_000, "transitions remembered", low=1)
        reward_scale: float = knob(1.0, "factor on rewards that a method learns from; returns are not scaled")
        batch_size: int = knob(256, "transitions, or states, of a batch", low=1)
        teacher_std: float = knob(0.3, "standard deviation that makes the teacher's mean a Gaussian policy", low=1e-6,
                                  source="project's choice")
        teacher_episodes: int = knob(20, "episodes that the teacher plays, with noise, to collect states", low=1,
                                     source="project's choice")
        held_out: float = knob(0.1, "share of those states kept for validation", low=0.01, high=0.9)
        from_teacher: int = knob(8, "candidates drawn from the teacher", low=0, source="project's choice")
        from_student: int = knob(4, "candidates drawn from the student as it is", low=0, source="project's choice")
        from_uniform: int = knob(4, "candidates drawn uniformly from [-1, 1]^A", low=0, source="project's choice")
        probe_steps: int = knob(0, "kind mixed: online steps between two evaluations from the switch on, for `dip`; 0: none",
                                low=0)
        passes: int = knob(1, "updates made on each candidate batch; on-policy anchors need at least 2", low=1)

    metrics = {
        "return": Metric("max", "reward", "undiscounted return of the deterministic policy"),
        "return_std": Metric("none", "reward", "standard deviation over episodes"),
        "episode_length": Metric("none", "steps"),
        "dip": Metric("min", "reward", "fall of the return below its value at the switch to online play, at its deepest"),
        "online_return": Metric("max", "reward", "mean return from the switch on, over the probes"),
        "value_fall": Metric("min", "reward", "fall of the mean value of stored transitions below that at the switch"),
        "kl_teacher_student": Metric("min", "nats", "KL(teacher || student) on held-out teacher states"),
        "kl_student_teacher": Metric("min", "nats", "KL(student || teacher) on held-out teacher states"),
        "kl_on_student_states": Metric("min", "nats", "KL(teacher || student) on states that the student visits"),
        "ndcg": Metric("max", "", "ranking of 32 fresh candidates, relevance = the teacher's softmax"),
        "student_std": Metric("none", "", "mean standard deviation of the student"),
    }

    def __init__(self, config, device="cpu"):
        super().__init__(config, device)
        probe = self.copies(1)
        self._spec = Spec(observation_size=probe.observation_size, action_size=probe.action_size,
                          actions=getattr(probe, "actions", None), costs=getattr(probe, "costs", 0))
        probe.close()
        self._distillation: Distillation | None = None
        self._mixed: Mixed | None = None

    # -- what a world of this kind brings
    def copies(self, number: int, **options):
        """`number` independent copies of the simulator (see envs/control/copies.py for what they can do)."""
        raise NotImplementedError

    def teacher(self):
        """The teacher policy: mean(observation (n, S)) -> (n, A), and std."""
        raise NotImplementedError

    def spec(self):
        return self._spec

    def columns(self) -> dict[str, Tensor]:
        """The data set: observation (N, S), action (N, A), reward, terminated (N,), next_observation (N, S), and start
        (N,), true where an episode begins. Rewards are as the environment gave them."""
        raise NotImplementedError

    def stream(self, method: Method, kind: str, seed: int | list[int]):
        c = self.config
        if kind == "offline":
            columns = self.columns()
            columns["reward"] = columns["reward"] * c.reward_scale
            return Stored(columns, c.batch_size * method.batches, seed, self.device)
        if isinstance(seed, list):
            raise UserError(f"batches of kind '{kind}' are made for one seed at a time: hardware.seeds goes with stored data\n"
                            "sweep over seeds instead: -m seed=0,1,…")
        if kind == "candidates":
            self._distillation = self._distil(seed)
            return self._distillation.stream(method, seed)
        if kind == "mixed":
            columns = self.columns()
            columns["reward"] = columns["reward"] * c.reward_scale
            self._mixed = Mixed(self.copies(c.copies), columns, method, c, seed, self.device, self._probe)
            return self._mixed
        if kind != "rollouts" and self._spec.actions is not None:
            raise UserError(f"this environment has {self._spec.actions} discrete actions; batches of kind '{kind}' are for "
                            "bounded real vectors\nmethods that learn from rollouts can play it: method=ppo")
        if kind == "rollouts":
            return Rollouts(self.copies(c.copies), method, c, seed, self.device)
        return Replay(self.copies(c.copies), method, c, seed, self.device)

    def _distil(self, seed: int) -> Distillation:
        """The teacher's states: `teacher_episodes` noisy episodes, each from its own start state."""
        c, teacher = self.config, self.teacher()
        generator = torch.Generator().manual_seed(seed)

        def noisy(observation: Tensor) -> Tensor:
            mean = teacher.mean(observation)
            return mean + c.teacher_std * torch.randn(mean.shape, generator=generator).to(mean.device)

        states = self.play(noisy, c.teacher_episodes, seed)["observations"]
        return Distillation(states.to(self.device), teacher, c, generator)

    # -- playing
    def play(self, policy, episodes: int, seed: int, copies=None) -> dict:
        """Whole episodes, side by side, in the world's own copies or in others. policy: observation (n, S) -> action (n, A),
        clipped before it is sent, or (n,). Returns returns, lengths (episodes,), observations and actions (steps, …), and
        `told`: sums over each episode of what the copies tell about steps beside the reward (their `told`)."""
        copies = copies or self.copies(episodes)
        observation = np.stack([copies.reset(i, seed + i) for i in range(episodes)])
        returns, lengths, ended = np.zeros(episodes), np.zeros(episodes), np.zeros(episodes, dtype=bool)
        alive, seen, chosen = list(range(episodes)), [], []
        told = {k: np.zeros(episodes) for k in getattr(copies, "told", {})}
        while alive:
            now = torch.from_numpy(observation[alive]).to(self.device, torch.float32)
            seen.append(now)
            actions = policy(now).cpu().numpy()
            chosen.append(torch.from_numpy(actions))
            still = []
            for action, i in zip(actions, alive):
                observation[i], reward, terminated, truncated = copies.step(i, action)
                returns[i] += reward
                lengths[i] += 1
                ended[i] = terminated
                for name, sums in told.items():
                    sums[i] += copies.told[name][i]
                if not (terminated or truncated):
                    still.append(i)
            alive = still
        copies.close()
        return {"returns": torch.from_numpy(returns), "lengths": torch.from_numpy(lengths),
                "terminated": torch.from_numpy(ended), "observations": torch.cat(seen), "actions": torch.cat(chosen),
                "told": {k: torch.from_numpy(v) for k, v in told.items()}}

    def _summary(self, played) -> dict[str, float]:
        returns = played["returns"]
        return {"return": returns.mean().item(), "return_std": returns.std(correction=0).item(),
                "episode_length": played["lengths"].mean().item()}

    def evaluate(self, method: Method, seed: int):
        played = self.play(lambda o: method.act(o, explore=False), self.config.episodes, EVALUATION_SEED)
        result = self._summary(played)
        if self._mixed is not None:
            result.update(self._mixed.summary())
        data = self._distillation
        if data is not None:
            result.update(divergences(method, data.teacher, data.held_out))
            on_student = divergences(method, data.teacher, played["observations"])
            result["kl_on_student_states"] = on_student["kl_teacher_student"]
            result["ndcg"] = ndcg(method, data.teacher, data.held_out, seed)
        return result

    def _probe(self, method: Method) -> float:
        """The return of the deterministic policy, on the evaluation's own start states."""
        played = self.play(lambda o: method.act(o, explore=False), self.config.episodes, EVALUATION_SEED)
        return played["returns"].mean().item()

    def validate(self, method: Method):
        if self._distillation is None:
            return {}
        figures = divergences(method, self._distillation.teacher, self._distillation.validation)
        return {"validation_kl": figures["kl_teacher_student"]}

    def references(self, seed: int):
        c, size, generator = self.config, self._spec.action_size, torch.Generator().manual_seed(seed)
        if self._spec.actions:  # numbers: none of them is zero force
            policies = {"random policy": lambda o: torch.randint(self._spec.actions, (len(o),), generator=generator)}
        else:
            policies = {
                "random policy": lambda o: torch.rand(len(o), size, generator=generator) * 2 - 1,
                "all-zero action": lambda o: torch.zeros(len(o), size),
            }
        if self._distillation is not None:
            policies = {"teacher": self._distillation.teacher.mean, **policies}
        return {name: self._summary(self.play(policy, c.episodes, EVALUATION_SEED))
                for name, policy in policies.items()}

    def frames(self, method: Method, seed: int, steps: int, size: tuple[int, int]):
        """Rendered frames of one episode: yields (height, width, 3) uint8 arrays."""
        copies = self.copies(1, render_mode="rgb_array", height=size[1], width=size[0])
        observation = copies.reset(0, seed)
        try:
            for _ in range(steps):
                yield copies.render(0)
                now = torch.from_numpy(observation[None]).to(self.device, torch.float32)
                observation, _, terminated, truncated = copies.step(0, method.act(now, explore=False).cpu().numpy()[0])
                if terminated or truncated:
                    break
        finally:
            copies.close()
