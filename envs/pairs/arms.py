"""Scored arms: responses of two letters to numbered prompts, logged by a poor and a good policy, with rewards that are known.

Prompts are numbers of two digits (contexts), responses one letter of `abcde`, one of `fghi` and the end: 20 arms. The reward of
an arm is sigma(1.5 n), n standard normal. Items are logged by the good policy, softmax(sharpness s), in a share `good`, else by
the poor one, softmax(-sharpness s), s the arm's n within its context; in a share `noisy` of the items the reward has noise
N(0, noise^2) more and is cut to [0, 1]. Everything is exact: all arms of all contexts are scored. What is no arm is worth 0.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from envs.pairs.scored import Scored
from runner.interface import Metric, Spec, World, knob

FIRST, SECOND, END = "abcde", "fghi", "."
ARMS = [a + b + END for a in FIRST for b in SECOND]


def figures(p: Tensor, true: Tensor) -> dict[str, float]:
    """Gold metrics of probabilities (contexts, arms)."""
    return {"reward": (p * true).sum(1).mean().item(), "arm_entropy": torch.special.entr(p).sum(1).mean().item(),
            "valid": p.sum(1).mean().item()}


class ScoredArms(World):
    @dataclasses.dataclass(frozen=True)
    class Config:
        contexts: int = knob(50, "prompts", low=1, high=100, source="project's choice")
        items: int = knob(3000, "logged responses", low=1, source="project's choice")
        good: float = knob(0.4, "share of them that the good policy gave", low=0.0, high=1.0, source="project's choice")
        sharpness: float = knob(1.0, "of both policies", low=0.0, source="project's choice")
        noisy: float = knob(0.3, "share of rewards with noise", low=0.0, high=1.0, source="project's choice")
        noise: float = knob(0.3, "its standard deviation", low=0.0, source="project's choice")
        values: str = knob("sampled", "value of a prompt: the mean reward of sampled responses, or the exact one of the policy "
                           "that training begins with", choices=["sampled", "exact"])
        samples_per_prompt: int = knob(5, "responses sampled for that", low=1, when={"values": "sampled"},
                                       source="project's choice")
        batch_size: int = knob(32, "responses a batch", low=1, source="project's choice")
        world_seed: int = knob(0, "of the rewards and the log", low=0)

    metrics = {
        "reward": Metric("max", "", "expected true reward of the policy's responses, exact"),
        "arm_entropy": Metric("none", "nats", "-sum p log p over the arms, mean over prompts"),
        "valid": Metric("max", "", "probability of responses that are an arm"),
    }

    def __init__(self, config, device="cpu"):
        super().__init__(config, device)
        c, g = config, torch.Generator().manual_seed(config.world_seed)
        score = torch.randn(c.contexts, len(ARMS), generator=g)
        self.true = torch.sigmoid(1.5 * score)  # (contexts, arms)
        good = torch.rand(c.items, 1, generator=g) < c.good
        context = torch.randint(c.contexts, (c.items,), generator=g)
        behaviour = (torch.where(good, c.sharpness, -c.sharpness) * score[context]).softmax(-1)
        arm = torch.multinomial(behaviour, 1, generator=g).squeeze(1)
        reward = self.true[context, arm]
        noise = c.noise * torch.randn(c.items, generator=g) * (torch.rand(c.items, generator=g) < c.noisy)
        reward = torch.where(noise != 0, (reward + noise).clamp(0, 1), reward)
        self.log = [(f"{x:02d}", ARMS[y], r) for x, y, r in zip(context.tolist(), arm.tolist(), reward.tolist())]

    def spec(self):
        return Spec(alphabet="0123456789" + FIRST + SECOND + END, end=END, prompt_length=2, response_length=3)

    def stream(self, method, kind, seed):
        exact = None
        if self.config.values == "exact":
            worth = (self.arms(method).exp() * self.true).sum(1)
            exact = {f"{x:02d}": v for x, v in enumerate(worth.tolist())}
        return Scored(method, self.log, self.config.batch_size, self.judge, self.config.samples_per_prompt, values=exact)

    def judge(self, prompt: str, response: str) -> float:
        """The true reward."""
        return float(self.true[int(prompt), ARMS.index(response)]) if response in ARMS else 0.0

    @torch.no_grad()
    def arms(self, method) -> Tensor:
        """log pi(arm | context), (contexts, arms), in float64."""
        prompt, prompt_mask = method.encode([f"{x:02d}" for x in range(self.config.contexts)])
        response, mask = method.encode_responses(ARMS)
        rows = {"prompt": prompt.repeat_interleave(len(ARMS), 0), "prompt_mask": prompt_mask.repeat_interleave(len(ARMS), 0),
                "response": response.repeat(len(prompt), 1), "mask": mask.repeat(len(prompt), 1)}
        return method.score(rows)["log_prob"].double().sum(1).view(len(prompt), len(ARMS)).cpu()

    def evaluate(self, method, seed):
        return figures(self.arms(method).exp(), self.true)

    def references(self, seed):
        best = torch.nn.functional.one_hot(self.true.argmax(1), len(ARMS)).double()
        count = torch.full_like(self.true, 1e-9).double()
        for prompt, response, _ in self.log:
            count[int(prompt), ARMS.index(response)] += 1
        return {"the log's policies": figures(count / count.sum(1, keepdim=True), self.true),
                "best arms": figures(best, self.true), "random arms": figures(torch.full_like(best, 1 / len(ARMS)), self.true)}
