"""What every method that trains a token policy shares: building it, sampling from it, scoring with it, its optimiser.

The policy is chosen apart from the method (`policy=small`, `policy=hf policy.path=DIR`): Method.blueprint builds it and its
tokeniser from the world's Spec. Worlds speak in texts; between them and the policy stand

    encode       texts -> prompt (P, Tp) int64, prompt_mask (P, Tp) bool, padded on the left
    generate     prompts, uniform numbers -> responses (B, T), padded on the right; B = P * samples, the samples of a prompt
                 next to each other (a group)
    score        log-probabilities, entropies and whatever else a method measures at every response token, (b, T)
"""

from __future__ import annotations

import copy
import dataclasses
import math

import torch
from torch import Tensor

from methods.tokens import checkpoint, lora, rewards
from methods.tokens.engine import Generated, Sampler
from methods.tokens.graphed import Graphed
from methods.tokens.scoring import buckets, log_prob_and_entropy, score
from runner.errors import UserError
from runner.interface import Completions, Method, Spec, knob

BETAS = (0.9, 0.95)  # AdamW's, as language models are trained
PAD_TO = 32  # prompts of a tokeniser are padded to multiples of this: few widths, few captured graphs


class TokenMethod(Method):
    @dataclasses.dataclass(frozen=True)
    class Config:
        learning_rate: float = knob(1e-4, "AdamW's", low=0.0)
        weight_decay: float = knob(0.0, "AdamW's", low=0.0)
        warmup: int = knob(0, "optimiser steps over which the learning rate rises from 0", low=0)
        decay: str = knob("constant", "course of the learning rate over the run after that; cosine ends at a twentieth",
                          choices=["constant", "cosine"])
        gradient_norm: float = knob(1.0, "bound of the gradient's norm; 0: none", low=0.0)
        micro_rows: int = knob(0, "rows that go through the policy at once, for memory; 0: all. The gradient is the same", low=0)

    def setup(self, spec: Spec):
        self.spec = spec
        self.policy, self.tokenizer = self.blueprint.build(spec)
        self.reference = copy.deepcopy(self.policy).requires_grad_(False) \
            if self.needs_reference() and not lora.adapted(self.policy) else None
        self._sampler, self._graphed = None, None

    def needs_reference(self) -> bool:
        """Whether the policy as it was at the start is asked for its log-probabilities."""
        return False

    def make_optimizers(self):
        c = self.config
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        on_gpu = {"capturable": True} if self.capturable and parameters[0].is_cuda else {}
        self.optimizers = {"policy": torch.optim.AdamW(parameters, lr=c.learning_rate, betas=BETAS,
                                                       weight_decay=c.weight_decay, fused=True, **on_gpu)}

    def compile_networks(self):
        """The blocks of the project's own transformer, one by one: elementwise work between its products is fused."""
        if not hasattr(self.policy, "model"):
            return super().compile_networks()
        for layer in self.policy.model.layers:
            layer.compile()

    def prepare(self, data: dict[str, Tensor]):
        """Start from the weights that the world offers (`start/NAME`), unless the policy brings its own."""
        self.load_start({k.removeprefix("start/"): v for k, v in data.items() if k.startswith("start/")})

    def load_start(self, start: dict[str, Tensor]):
        """The weights that training begins from, which are the reference's, too. {}: those that the policy has. Streams that
        have something to ask of that policy call it before `prepare` does."""
        if start and not self.blueprint.own_weights:
            wrong = [k for k, v in self.policy.state_dict().items() if k not in start or start[k].shape != v.shape]
            if wrong:
                raise UserError(f"the env's starting weights are of another shape than this policy ({wrong[0]})\n"
                                "leave the policy's sizes as they are; or train a start of this shape: python -m runner "
                                "method=sft env=… policy.…, and give its run's folder as policy.path; or env.start=none")
            self.policy.load_state_dict(start)
        if self.reference is not None:
            self.reference.load_state_dict(self.policy.state_dict())

    # -- from texts to tokens
    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """-> prompt (P, Tp) int64, prompt_mask (P, Tp) bool, on the policy's device, padded on the left."""
        rows = [self.tokenizer.encode(t) for t in texts]
        longest, device = max(map(len, rows)), self.device()
        limit = self.policy.shape.context - self.response_length()
        if longest > limit:
            worst = max(range(len(rows)), key=lambda i: len(rows[i]))
            raise UserError(f"a prompt has {longest} tokens; with responses of {self.response_length()} the policy's context of "
                            f"{self.policy.shape.context} leaves {limit}: {texts[worst][:80]!r}…\nallow shorter responses "
                            "(env.response_length), or take a policy with a longer context (policy.context)")
        width = longest if self.spec.alphabet and longest == self.spec.prompt_length else -(-longest // PAD_TO) * PAD_TO
        width = min(width, limit)
        ids = torch.full((len(rows), width), self.tokenizer.pad)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, width - len(row):] = torch.tensor(row)
            mask[i, width - len(row):] = True
        return ids.to(device), mask.to(device)

    def encode_responses(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """-> response (B, T) int64, mask (B, T) bool, padded on the right; what is too long is cut. The end is part of a text
        where the alphabet has one, else the tokeniser's end is added."""
        width = self.response_length()
        ids = torch.full((len(texts), width), self.tokenizer.pad)
        end = self.spec.end or ""
        if not hasattr(self.tokenizer, "characters") and not end.isprintable():
            texts = [t.removesuffix(end) for t in texts]  # it stands for the tokeniser's own end, which is added
        rows = [self.tokenizer.encode_response(t)[:width] for t in texts]
        for i, row in enumerate(rows):
            ids[i, :len(row)] = torch.tensor(row, dtype=torch.int64)
        length = torch.tensor([len(row) for row in rows])
        return ids.to(self.device()), (torch.arange(width) < length[:, None]).to(self.device())

    def response_length(self) -> int:
        return self.spec.response_length

    def device(self) -> torch.device:
        return next(self.policy.parameters()).device

    # -- sampling and scoring
    @torch.no_grad()
    def generate(self, texts: list[str], samples: int, uniforms: Tensor, temperature: float = 1.0, adjust=None,
                 steps: int | None = None, fresh: bool = True) -> Completions:
        """Sample `samples` responses to each text. uniforms (B, T) in [0, 1): one number a token; temperature 0: the most
        probable token. `fresh`: the weights may have changed since the last call."""
        prompt, prompt_mask = self.encode(texts)
        out = self.respond(prompt, prompt_mask, samples, uniforms, temperature, adjust, steps, fresh)
        lengths = out.mask.sum(1).tolist()
        decoded = [self.tokenizer.decode(row[:n]) for row, n in zip(out.response.tolist(), lengths)]
        return Completions(decoded, prompt.repeat_interleave(samples, 0), prompt_mask.repeat_interleave(samples, 0),
                           out.response, out.mask, out.log_prob)

    @torch.no_grad()
    def respond(self, prompt: Tensor, prompt_mask: Tensor, samples: int, uniforms: Tensor, temperature: float = 1.0, adjust=None,
                steps: int | None = None, fresh: bool = True) -> Generated:
        """`generate` from tokens to tokens: prompt, prompt_mask (P, Tp) -> response, mask, log_prob (P * samples, T)."""
        if self._sampler is None:
            self._sampler, fresh = Sampler(self.policy), True
        with self.autocast():
            if fresh:
                self._sampler.refresh()
            return self._sampler.generate(prompt, prompt_mask, group=samples, steps=steps or self.response_length(),
                                          eos=self.tokenizer.eos, pad=self.tokenizer.pad, uniforms=uniforms,
                                          temperature=temperature, adjust=adjust)

    def score(self, rows: dict[str, Tensor], measure=log_prob_and_entropy, temperature: float = 1.0, policy=None,
              trunk=None, beside=None) -> dict[str, Tensor]:
        """rows: prompt, prompt_mask, response, mask -> what `measure` tells of every response token, each (b, T). beside: a
        policy whose logits it sees, too."""
        return score(policy or self.policy, rows["prompt"], rows["prompt_mask"], rows["response"], rows["mask"].bool(),
                     measure, temperature, trunk=trunk, beside=beside)

    def start_policy(self):
        """The policy as it was at the start, for `score`: the copy of it, or the policy itself without its adapters."""
        return self.reference if self.reference is not None else lora.Unadapted(self.policy)

    @torch.no_grad()
    def score_reference(self, rows: dict[str, Tensor], temperature: float = 1.0, policy=None) -> dict:
        """log_prob and entropy (b, T) of the policy as it was at the start, or of another, in parts of `micro_rows`."""
        policy, parts = policy or self.start_policy(), self._parts(rows)
        if not parts:
            return self.score(rows, temperature=temperature, policy=policy)
        told = [self.score(part, temperature=temperature, policy=policy) for _, part in parts]
        order = torch.cat([i for i, _ in parts]).argsort()
        return {k: torch.cat([t[k] for t in told])[order] for k in told[0]}

    def rater(self, weights: dict[str, Tensor]):
        """A function rows -> rewards (b,), from the weights of a finished run of a reward model on such a policy."""
        rater = rewards.rater_of(self.policy, weights)
        return torch.no_grad()(lambda rows: rewards.rate(rater, rows))

    # -- one step of the optimiser
    def schedule(self, step: int, total: int):
        """Set the learning rate for optimiser step `step` of `total`."""
        c = self.config
        rate = c.learning_rate * min(1.0, (step + 1) / c.warmup if c.warmup else 1.0)
        if c.decay == "cosine" and total > c.warmup and step >= c.warmup:
            rate *= 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - c.warmup) / (total - c.warmup))))
        for group in self.optimizers["policy"].param_groups:
            group["lr"] = rate

    def _parts(self, rows: dict[str, Tensor]) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """At most `micro_rows` rows at a time, of like length, so that there is little padding: (their numbers, their tokens).
        Empty where all rows go at once."""
        size = self.config.micro_rows
        if not size or size >= len(rows["response"]):
            return []
        columns = {k: rows[k] for k in ("prompt", "prompt_mask", "response", "mask")}
        parts = buckets(rows["prompt_mask"].sum(1) + rows["mask"].sum(1), rows=size)
        return [(i, {k: v[i] for k, v in columns.items()}) for i in parts]

    def _measured_parts(self, parts, measure, temperature: float, beside) -> dict[str, Tensor]:
        """What `measure` tells of all rows, by parts (their numbers, their tokens): leaves for a loss's gradient."""
        with torch.no_grad():
            seen = [self.score(part, measure, temperature, beside=beside) for _, part in parts]
        order = torch.cat([i for i, _ in parts]).argsort()
        return {k: torch.cat([s[k] for s in seen])[order].requires_grad_() for k in seen[0]}

    def fit(self, rows: dict[str, Tensor], measure, temperature: float, loss, beside=None) -> Tensor:
        """One optimiser step on loss(measured), where measured = score(rows, measure) with gradient; returns the loss. beside: a
        policy whose logits `measure` sees, too.

        With `micro_rows` the rows go through the policy in parts: once without gradient, so that the loss sees all of them
        and gives the gradient of each measured number; and once more with it, a part at a time. Losses that look at the whole
        minibatch (its quantiles, its mean entropy) therefore stay what they are."""
        parts, number = self._parts(rows), len(rows["response"])
        parameters = self.optimizers["policy"].param_groups[0]["params"]
        for p in parameters:
            p.grad = None
        if not parts:
            if self._graphed is None:
                self._graphed = Graphed(self.policy)
            length = rows["prompt"].shape[1] + rows["response"].shape[1]
            trunk = None if self.capturable else self._graphed.trunk(number, length)  # then the whole update is captured
            value = loss(self.score(rows, measure, temperature, trunk=trunk, beside=beside))
            self.engine.backward(value)
        else:
            leaves = self._measured_parts(parts, measure, temperature, beside)
            value = loss(leaves)
            self.engine.backward(value)
            gradients = {k: v.grad for k, v in leaves.items() if v.grad is not None}
            for i, part in parts:
                again = self.score(part, measure, temperature, beside=beside)
                self.engine.backward(sum((again[k] * g[i]).sum() for k, g in gradients.items()))
        self._step("policy", parameters, self.config.gradient_norm, False)
        return value.detach()

    # -- what a world asks for
    @torch.no_grad()
    def complete(self, texts: list[str], samples: int, uniforms: Tensor, temperature: float = 1.0, fresh: bool = True,
                 steps: int | None = None) -> Completions:
        """Responses to the texts, for evaluation; see generate."""
        return self.generate(texts, samples, uniforms, temperature, fresh=fresh, steps=steps)

    @torch.no_grad()
    def distributions(self, rows: Completions) -> Tensor:
        """log pi(. | prompt, response so far) at every response token: (b, T, V). For small vocabularies."""
        ids = torch.cat([rows.prompt, rows.response], 1)
        mask = torch.cat([rows.prompt_mask, rows.mask], 1)
        hidden = self.policy.hidden(ids, mask)[:, rows.prompt.shape[1] - 1:-1]
        return (hidden @ self.policy.head.T).float().log_softmax(-1)

    def with_weights(self, weights: dict[str, Tensor] | None = None) -> TokenMethod | None:
        """The same method with other weights in its policy, to evaluate beside it: what it samples and scores is theirs. None:
        the policy as it was at the start, where the method keeps that."""
        if weights is None and self.reference is None and not lora.adapted(self.policy):
            return None
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._modules = dict(self._modules)
        if weights is None:
            other.policy = self.reference if self.reference is not None else lora.without(self.policy)
        else:
            other.policy = copy.deepcopy(self.policy)
            other.policy.load_state_dict(weights)
        other._sampler, other._graphed = None, None
        return other

    def export(self):
        return dict(self.policy.state_dict()), {"kind": "transformer"}

    def export_folder(self, folder):
        """In Hugging Face's layout, adapters merged: transformers and policy=hf read it."""
        checkpoint.save(self.policy, folder)
