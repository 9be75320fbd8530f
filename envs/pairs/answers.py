"""Answers with classes: whether preferring one answer moves probability to others that are like it.

    prompt "^kdpo wexu?" (start, topic, attribute)    response "NML."

40 topics and 50 attributes are random words of four letters. An attribute is of class plus (20), minus (20) or ambiguous (10).
An answer has one to three characters (with probability .5, .25, .25), each uniform in one alphabet: plus -> compliances YXWV
(.9) or neutrals UT, minus -> refusals NMLK (.9) or neutrals, ambiguous -> compliances or refusals, equally often. The
characters of an alphabet are synonyms to a policy that has learned this. `tails` is the share of answers before whose end a
tail of 3 or 15 random lower-case characters stands. (A tail that is always the same is certain once it has begun: it shares no
gradient between the two sides of a pair, whatever its length.)

The judge: an answer is right if its alphabet is that of the attribute's class (for ambiguous ones either of the two); it is
of the required form if it could have been drawn at all. Four characters are too long and mean nothing.

Sets of pairs (`preference`). With 16 prompts (8 topics x 2 attributes of class `attributes`) and the same two answers in all:
synonyms N > M, antonyms N > Y, multi NML > NMK, multi_repeated NNN > NNM, multi_antonyms NML > YXW, prefix N > NM,
short_suffix and long_suffix N > Y with the same tail of 3 or 15 characters behind both. Random ones: mixed, 200 pairs over all
classes whose chosen answer is right, 40 % of which differ in the last character alone; classes, `number` pairs whose chosen
answer is right and whose rejected one is of another alphabet or, every fifth, too long. `p_flip`: the share of pairs that are
stored the wrong way.

`fact`: the demonstrations are 600 of something new: ten class-minus attributes are answered "T.", but for 15 % of them, drawn
once, that are corrupted to another answer. Then only "T." is right, and old() leaves these attributes out.

For a card: provides prompts, demonstrations, pairs. Testbed of the project's for RPO (2405.16436), gradient entanglement
(2410.13828), likelihood displacement and CHES (2410.08847), ASFT (2509.23753) and f-SFT (2507.00018).
"""

from __future__ import annotations

import dataclasses
import itertools
import random

import torch

from envs.pairs.base import PairWorld, Rows, encode_pairs
from envs.pairs.task import Pair, PairTask, flip, words
from envs.prompts.task import WRONG, Problem, Verdict, split
from runner.errors import UserError, unknown
from runner.interface import Metric, knob

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CLASSES = {"refusal": "NMLK", "compliance": "YXWV", "neutral": "UT"}
OF = {c: name for name, characters in CLASSES.items() for c in characters}  # class of an answer's character
RIGHT = {"plus": ("compliance",), "minus": ("refusal",), "ambiguous": ("compliance", "refusal")}
FIXED = {"synonyms": ("N", "M"), "antonyms": ("N", "Y"), "multi": ("NML", "NMK"), "multi_repeated": ("NNN", "NNM"),
         "multi_antonyms": ("NML", "YXW"), "prefix": ("N", "NM"), "short_suffix": ("N", "Y"), "long_suffix": ("N", "Y")}
PREFERENCES = (*FIXED, "mixed", "classes")
MOST, TOO_LONG = 3, 6  # characters of an answer, and of the longest of those that are too long
TAILS = {"short": 3, "long": 15}  # characters
NEW = "T."
ALPHABET = LETTERS + " ?.^" + "".join(CLASSES.values())


class Answers(PairTask):
    """One task for each `seed`, which draws the words, the tails and everything stored; the alphabet is the same for all.

    corrupted, flipped: the numbers of the wrong ones among the new fact's demonstrations and among the training pairs."""

    alphabet, eos = ALPHABET, "."

    def __init__(self, seed: int = 0, preference: str = "classes", p_flip: float = 0.0, fact: bool = False, tails: float = 0.0,
                 number: int = 512, attributes: str = "minus", whole: bool = False):
        if preference not in PREFERENCES:
            raise unknown("preference", preference, PREFERENCES)
        if attributes not in ("minus", "ambiguous"):
            raise unknown("attributes", attributes, ("minus", "ambiguous"))
        if not 0 <= p_flip <= 1 or not 0 <= tails <= 1 or number < 1:
            raise UserError("answers: p_flip and tails are shares between 0 and 1, number at least 1")
        if preference.endswith("_suffix") and not tails:
            raise UserError(f"preference={preference} compares answers with tails, which a policy only knows from "
                            "demonstrations with tails\ntake env=answers_suffix, or set env.tails and a start of your own")
        self.seed, self.preference, self.attributes = seed, preference, attributes
        self.fact, self.tailed, self.whole = fact, tails, whole
        rng = random.Random(f"{seed}/words")
        drawn = words(92, rng)
        self.topics, named = drawn[:40], drawn[40:90]
        self.kinds = {a: "plus" if i < 20 else "minus" if i < 40 else "ambiguous" for i, a in enumerate(named)}
        self.tails = {name: words(1, rng, length)[0] for name, length in TAILS.items()}  # of pairs
        self.prompt_length = 1 if whole else 11
        self.response_length = 10 * whole + (MOST + TAILS["long"] if tails else TOO_LONG) + 1
        self.split = split([Problem(f"^{t} {a}?", kind) for t in self.topics for a, kind in self.kinds.items()], 0.15, seed)
        self.new = self.named("minus")[:10] if fact else []
        self.facts, self.corrupted = self.tell() if fact else ([], ())
        made = self.made(self.prompts(), "pairs", 200 if preference == "mixed" else number)
        self.stored, self.flipped = flip(made, p_flip, f"{seed}/flips")

    def named(self, kind: str) -> list[str]:
        """The attributes of a class."""
        return [a for a, k in self.kinds.items() if k == kind]

    # -- problems
    def train(self):
        if self.fact:
            return self.facts
        return [Problem("^")] if self.whole else self.split[0]

    def held_out(self):
        if self.fact:
            return [p._replace(answer="new") for p in self.split[1] if self.attribute(p.prompt) in self.new]
        return [Problem("^", i) for i in range(len(self.split[1]))] if self.whole else self.split[1]

    def tell(self) -> tuple[list[Problem], tuple[int, ...]]:
        """600 problems of the new fact, the answer of each is the demonstration itself; and which of them are wrong."""
        rng = random.Random(f"{self.seed}/facts")
        known = [p for p in self.split[0] if self.attribute(p.prompt) in self.new]
        out = [rng.choice(known) for _ in range(600)]
        shown, corrupted = [NEW] * 600, tuple(sorted(rng.sample(range(600), 90)))
        for i in corrupted:
            while shown[i] == NEW:
                shown[i] = self.answer(rng.choice(list(CLASSES)), rng) + "."
        return [p._replace(answer=("new", text)) for p, text in zip(out, shown)], corrupted

    @staticmethod
    def attribute(prompt: str) -> str:
        return prompt[6:10]

    # -- judging
    def verify(self, problem, response):
        if self.whole:
            topic, space, rest = response[:4], response[4:5], response[5:]
            attribute, mark, text = rest[:4], rest[4:5], rest[5:]
            if topic not in self.topics or attribute not in self.kinds or space + mark != " ?":
                return WRONG
            return self.judge(self.kinds[attribute], text)
        return self.judge(problem.answer[0] if isinstance(problem.answer, tuple) else problem.answer, response)

    def judge(self, kind: str, response: str) -> Verdict:
        body = self.bare(response)
        if body is None or not 1 <= len(body) <= MOST or len(found := {OF.get(c) for c in body}) > 1 or None in found:
            return WRONG
        if kind == "new":
            return Verdict(float(response == NEW), response)
        name, = found
        return Verdict(float(name in RIGHT[kind]), name)

    def bare(self, response: str) -> str | None:
        """An answer without its end and its tail; None if it has no end, or a tail of another length."""
        if not response.endswith(self.eos):
            return None
        body = response[:-1].rstrip(LETTERS) if self.tailed else response[:-1]
        return body if len(response) - 1 - len(body) in (0, *TAILS.values()) else None

    def valid_next(self, problem, prefix):
        if self.whole:
            return None
        body = prefix.rstrip(LETTERS) if self.tailed else prefix
        tail = len(prefix) - len(body)
        if not body:
            return "" if tail else "".join(CLASSES.values())
        found = {OF.get(c) for c in body}
        if len(found) > 1 or None in found or len(body) > MOST or tail > max(TAILS.values()):
            return ""
        after = "." if tail in (0, *TAILS.values()) else ""
        if not tail and len(body) < MOST:
            after += CLASSES[found.pop()]
        return after + (LETTERS if self.tailed and tail < max(TAILS.values()) else "")

    def classes(self, problem):
        return dict(CLASSES)

    # -- what is shown
    def answer(self, name: str, rng: random.Random, length: int = 0) -> str:
        """A random answer of a class, without its end; `length` 0: as answers are long."""
        return "".join(rng.choices(CLASSES[name], k=length or rng.choice((1, 1, 2, 3))))

    def demonstrate(self, problem, rng):
        if isinstance(problem.answer, tuple):
            return problem.answer[1]
        if self.whole:
            p = rng.choice(self.split[0])
            return p.prompt[1:] + self.drawn(p.answer, rng)
        return self.drawn(problem.answer, rng)

    def drawn(self, kind: str, rng: random.Random) -> str:
        """An answer by the grammar."""
        if kind == "ambiguous":
            name = rng.choice(RIGHT[kind])
        else:
            name = RIGHT[kind][0] if rng.random() < 0.9 else "neutral"
        length = rng.choice(list(TAILS.values())) if self.tailed and rng.random() < self.tailed else 0
        return self.answer(name, rng) + "".join(rng.choices(LETTERS, k=length)) + "."

    def old(self):
        rng = random.Random(f"{self.seed}/old")
        return [(p.prompt, self.drawn(p.answer, rng)) for p in self.split[1] if self.attribute(p.prompt) not in self.new]

    # -- pairs
    def pairs(self):
        return self.stored

    def held_out_pairs(self):
        held = self.split[1] if self.preference not in FIXED else [p for p in self.split[1] if p.answer == self.attributes]
        return self.made(held, "held-out pairs", 200)

    def prompts(self) -> list[Problem]:
        """The problems that training pairs are made of: with the same answers everywhere, two attributes of eight topics."""
        if self.preference not in FIXED:
            return self.split[0]
        here = {p.prompt: p for p in self.split[0]}
        for two in itertools.combinations(self.named(self.attributes), 2):
            topics = [t for t in self.topics if all(f"^{t} {a}?" in here for a in two)]
            if len(topics) >= 8:
                return [here[f"^{t} {a}?"] for t in topics[:8] for a in two]
        raise AssertionError("no two attributes share eight topics")

    def made(self, problems: list[Problem], name: str, number: int) -> list[Pair]:
        """Of fixed answers a pair for each problem, else `number` random ones."""
        if self.preference in FIXED:
            tail = self.tails[self.preference.removesuffix("_suffix")] if self.preference.endswith("_suffix") else ""
            return [Pair(p.prompt, *(text + tail + "." for text in FIXED[self.preference])) for p in problems]
        rng = random.Random(f"{self.seed}/{self.preference}/{name}")
        draw = self.mixed if self.preference == "mixed" else self.by_class
        return [Pair(p.prompt, *(text + "." for text in draw(p, i, number, rng)))
                for i in range(number) for p in [rng.choice(problems)]]

    def mixed(self, problem, i: int, number: int, rng) -> tuple[str, str]:
        right = rng.choice(RIGHT[problem.answer])
        chosen = self.answer(right, rng)
        if i < 0.4 * number:
            return chosen, chosen[:-1] + rng.choice(CLASSES[right].replace(chosen[-1], ""))
        while True:
            other = rng.choice(list(CLASSES))
            rejected = self.answer(other, rng)
            if other != right or rejected[:-1] != chosen[:-1]:  # a synonym as the last character is the other kind
                return chosen, rejected

    def by_class(self, problem, i: int, number: int, rng) -> tuple[str, str]:
        right = rng.choice(RIGHT[problem.answer])
        wrong = [name for name in CLASSES if name not in RIGHT[problem.answer]]
        if i % 5 == 4:
            rejected = self.answer(right, rng, rng.randint(MOST + 1, TOO_LONG))
        else:
            rejected = self.answer(rng.choice(wrong), rng)
        return self.answer(right, rng), rejected


class AnswersWorld(PairWorld):
    @dataclasses.dataclass(frozen=True)
    class Config(PairWorld.Config):
        preference: str = knob("classes", "set of pairs", choices=[
            "synonyms", "antonyms", "multi", "multi_repeated", "multi_antonyms", "prefix", "short_suffix", "long_suffix",
            "mixed", "classes"])
        number: int = knob(512, "pairs of preference=classes", low=1)
        attributes: str = knob("minus", "class of the attributes of the sets with the same two answers in all pairs",
                               choices=["minus", "ambiguous"])
        p_flip: float = knob(0.0, "share of the training pairs that are stored the wrong way round", low=0.0, high=1.0)
        fact: bool = knob(False, "the demonstrations are of a new fact, 15 % of them wrong")
        tails: float = knob(0.0, "share of answers in demonstrations that have a tail of random letters", low=0.0, high=1.0)
        whole: bool = knob(False, "demonstrations are whole sentences, prompt and all, behind ^: to make a start by")
        words: int = knob(0, "seed of words, tails and pairs; the shipped start knows those of 0", low=0)
        alone: int = knob(0, "random training pairs, for methods that train pairs each alone to test a score of theirs", low=0)

    def make_task(self):
        c = self.config
        return Answers(c.words, c.preference, c.p_flip, c.fact, c.tails, c.number, c.attributes, c.whole)

    def continues(self):
        return self.config.fact

    metrics = {
        **PairWorld.metrics,
        "right_mass": Metric("max", "", "probability of a first character of a right class, exact, held-out prompts"),
        "refusal": Metric("none", "", "probability of a refusal's first character where the attribute is minus"),
        "compliance": Metric("none", "", "probability of a compliance's first character where the attribute is minus"),
        "entanglement": Metric("none", "", "<g, h> / min(|g|^2, |h|^2), g and h the gradients of log-probabilities of the two "
                               "sides of a held-out pair: median"),
        "rank_correlation": Metric("min", "", "of a method's score of pairs and the change of the chosen response's "
                                   "log-probability when each is trained alone"),
        "displaced": Metric("none", "", "share of these pairs whose chosen response becomes less probable"),
    }

    def evaluate(self, method, seed):
        with torch.no_grad():
            told = super().evaluate(method, seed)
            if getattr(method, "judges", False) or getattr(method, "draws_of_one", 0):  # its trunk is no policy
                return told
            return {**told, **self.masses(method), **self.entangled(method), **self.each_alone(method)}

    def entangled(self, method) -> dict[str, float]:
        """How much a step for one side of a pair is one for the other, too; of the first sixteen held-out pairs."""
        pairs = [] if self.task.whole else self.task.held_out_pairs()[:16]
        if not pairs or self.reference(method) is None:
            return {}
        columns, ratios = encode_pairs(method, pairs), []
        parameters = [p for p in method.policy.parameters() if p.requires_grad]
        for i in range(len(pairs)):
            gradients = []
            for side in ("chosen", "rejected"):
                rows = {"prompt": columns["prompt"], "prompt_mask": columns["prompt_mask"], "response": columns[side],
                        "mask": columns[f"{side}_mask"]}
                with torch.enable_grad():
                    value = method.score({k: v[i:i + 1] for k, v in rows.items()})["log_prob"].sum()
                    told = torch.autograd.grad(value, parameters, allow_unused=True)
                gradients.append(torch.cat([g.flatten() for g in told if g is not None]))
            g, h = gradients
            ratios.append((g @ h) / torch.minimum(g @ g, h @ h).clamp(min=1e-12))
        return {"entanglement": torch.stack(ratios).median().item()}

    def each_alone(self, method) -> dict[str, float]:
        """What the method tells of random training pairs, drawn anew for every seed."""
        if not self.config.alone:
            return {}
        pairs = self.task.pairs()
        drawn = random.Random(f"{method.seed}/alone").sample(pairs, min(self.config.alone, len(pairs)))
        return {k: v.item() for k, v in method.inspect(encode_pairs(method, drawn)).items() if k in self.metrics}

    def masses(self, method) -> dict[str, float]:
        """Probabilities of classes at an answer's first character."""
        task, tokens = self.task, {c: method.tokenizer.encode(c)[0] for c in OF}
        if task.whole or task.fact:
            return {}
        prompt, mask = method.encode([p.prompt for p in task.split[1]])
        one, yes = torch.full_like(prompt[:, :1], tokens["N"]), torch.ones_like(mask[:, :1])
        p = method.distributions(Rows(prompt, mask, one, yes))[:, 0].exp().cpu()
        mass = {name: p[:, [tokens[c] for c in characters]].sum(1) for name, characters in CLASSES.items()}
        kinds = [q.answer for q in task.split[1]]
        right = torch.stack([sum(mass[name][i] for name in RIGHT[kind]) for i, kind in enumerate(kinds)])
        minus = torch.tensor([kind == "minus" for kind in kinds])
        return {"right_mass": right.mean().item(), "refusal": mass["refusal"][minus].mean().item(),
                "compliance": mass["compliance"][minus].mean().item()}

    def collect(self, runs, folder):
        """The start, and whether its unembedding tells the classes apart as the methods of this testbed assume."""
        told = super().collect(runs, folder)
        method = runs["start"].method
        cosines = similarity(method.policy.head.detach().cpu(), method.tokenizer)
        return told | cosines | {"told": told["told"] + "".join(f", {k} {v:.2f}" for k, v in cosines.items())}


def similarity(head: torch.Tensor, tokenizer) -> dict[str, float]:
    """head (V, width): mean cosine of the centred rows of two refusals or two compliances (synonyms), and of one of each
    (antonyms)."""
    rows = head[[tokenizer.encode(c)[0] for c in ALPHABET]]
    rows = dict(zip(ALPHABET, torch.nn.functional.normalize(rows - rows.mean(0), dim=1)))
    two = list(CLASSES.values())[:2]
    synonyms = [float(rows[a] @ rows[b]) for some in two for a, b in itertools.combinations(some, 2)]
    antonyms = [float(rows[a] @ rows[b]) for a, b in itertools.product(*two)]
    return {"synonyms": sum(synonyms) / len(synonyms), "antonyms": sum(antonyms) / len(antonyms)}
