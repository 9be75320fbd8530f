"""Key and door: a task of many turns with one reward at the end. Fetch the key, then reach the door, on a 7 x 7 grid.

    prompt "a34k61d05h0>" (column and row of agent, key and door; key held)    response "Ke." (intended target, move)

Targets K, D or ?; moves n e s w, blocked at the border. Stepping on the key takes it; reaching the door with it ends the
episode with reward 1; after `limit` turns it ends with 0. A response of any other form moves nothing and costs 0.1. The
prompt tells all, so that no history is needed. `partial`: coordinates are "--" until the agent has been within `sight` steps.
`keys=2` asks for both keys before the door; h is then 0 to 3 (1 the first key, 2 the second): with size=9, limit=60 the
larger version.

Demonstrations are single turns in random states: with probability `expert_share` a random move of a shortest path with the
right letter (of what is not in sight: "?" and a uniform move), else move and letter uniform. Played to the end, that mixture
succeeds with probability 0.31 (mixture_success, exact); the expert always, in 9.3 turns.

For a card: provides prompts, demonstrations, turns. Testbed of the project's for EPO (2509.22576). Gold metrics: success,
return, turns, entropy per turn over the episodes that still run.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from typing import NamedTuple

from envs.prompts.task import WRONG, Drawn, Problem, Task, Verdict, kind
from envs.prompts.turns import TurnWorld
from runner.errors import UserError
from runner.interface import knob

MOVES = {"n": (0, -1), "e": (1, 0), "s": (0, 1), "w": (-1, 0)}
SLOTS, FORM = ("KD?", "nesw", "."), re.compile(r"[KD?][nesw]\.")
INVALID = -0.1  # reward of other text


class State(NamedTuple):
    """Plain data. held, seen: bits, of key number i 1 << i; seen has the door's after the keys'."""

    agent: tuple[int, int]
    keys: tuple[tuple[int, int], ...]
    door: tuple[int, int]
    held: int = 0
    seen: int = 0
    turn: int = 0


class KeyDoor(Task):
    eos, response_length = ".", 3

    def __init__(self, size: int = 7, limit: int = 24, keys: int = 1, partial: bool = False, sight: int = 2,
                 expert_share: float = 0.3, held_out: int = 256, seed: int = 0):
        if not 2 <= size <= 10 or keys not in (1, 2) or limit < 1 or not 0 <= expert_share <= 1 or held_out < 1:
            raise UserError("key_door: size 2 to 10, 1 or 2 keys, limit and held_out at least 1, expert_share between 0 and 1")
        self.size, self.limit, self.partial, self.sight = size, limit, partial, sight
        self.expert_share, self.number, self.seed, self.all = expert_share, held_out, seed, (1 << keys) - 1
        self.cells = [(x, y) for y in range(size) for x in range(size)]
        self.keys, self.prompt_length = keys, 3 * (keys + 2) + 3
        self.alphabet = "0123456789akdh>neswKD?." + "-" * partial

    # ---- episodes --------------------------------------------------------------------------------------------------------
    def place(self, rng: random.Random) -> State:
        """An episode's beginning: agent, keys and door on different cells."""
        agent, door, *keys = rng.sample(self.cells, self.keys + 2)
        return self.look(State(agent, tuple(keys), door))

    def episodes(self, held_out: bool = False) -> Drawn:
        """Beginnings of episodes; those held out are none of the others, nor among the states of train()."""
        if held_out:
            return Drawn(self.place, f"{self.seed}/held out", self.number, lambda s: self.kind(s) == 0)
        return Drawn(self.place, f"{self.seed}/train", accept=lambda s: self.kind(s) > 0)

    def kind(self, state: State) -> int:
        return kind(self.seed, f"{state.agent}{state.keys}{state.door}")

    def look(self, state: State) -> State:
        if not self.partial:
            return state
        seen = state.seen
        for i, cell in enumerate((*state.keys, state.door)):
            seen |= (distance(state.agent, cell) <= self.sight) << i
        return state._replace(seen=seen)

    def observe(self, state: State) -> str:
        shown = [f"{x}{y}" if not self.partial or state.seen >> i & 1 else "--"
                 for i, (x, y) in enumerate((*state.keys, state.door))]
        keys = "".join("k" + cell for cell in shown[:-1])
        return f"a{state.agent[0]}{state.agent[1]}{keys}d{shown[-1]}h{state.held}>"

    def step(self, state: State, text: str) -> tuple[State, float, bool]:
        """(the next state, reward, whether the episode is over)"""
        last = state.turn + 1 >= self.limit
        if not FORM.fullmatch(text):
            return state._replace(turn=state.turn + 1), INVALID, last
        agent = self.moved(state.agent, text[1])
        held = state.held
        for i, key in enumerate(state.keys):
            held |= (key == agent) << i
        done = held == self.all and agent == state.door
        state = self.look(State(agent, state.keys, state.door, held, state.seen, state.turn + 1))
        return state, float(done), done or last

    def moved(self, agent, move):
        x, y = agent[0] + MOVES[move][0], agent[1] + MOVES[move][1]
        return (x, y) if 0 <= x < self.size and 0 <= y < self.size else agent

    def targets(self, state: State) -> list[tuple[int, int]]:
        """What is to be reached next: the nearest keys that are missing, else the door."""
        missing = [key for i, key in enumerate(state.keys) if not state.held >> i & 1] or [state.door]
        least = min(distance(state.agent, cell) for cell in missing)
        return [cell for cell in missing if distance(state.agent, cell) == least]

    def good_moves(self, state: State) -> str:
        """The moves that come nearer to a target."""
        return "".join(m for m in MOVES if any(distance(self.moved(state.agent, m), cell) < distance(state.agent, cell)
                                               for cell in self.targets(state)))

    def in_sight(self, state: State) -> bool:
        cells = (*state.keys, state.door)
        return not self.partial or any(state.seen >> cells.index(cell) & 1 for cell in self.targets(state))

    # ---- single turns ----------------------------------------------------------------------------------------------------
    def make(self, rng) -> State:
        """A random state inside an episode: any keys held, the agent anywhere but on what it is to fetch."""
        door, *keys = rng.sample(self.cells, self.keys + 1)
        held = rng.randint(0, self.all)
        taken = {key for i, key in enumerate(keys) if not held >> i & 1} or {door}
        agent = rng.choice([cell for cell in self.cells if cell not in taken])
        seen = held | rng.randrange(1 << self.keys + 1) if self.partial else 0
        return self.look(State(agent, tuple(keys), door, held, seen))

    def train(self):
        return Drawn(lambda rng: self.turn(self.make(rng)), f"{self.seed}/turns", accept=lambda p: self.kind(p.answer) > 0)

    def held_out(self):
        """The first turns of the episodes held out."""
        return Drawn(lambda rng: self.turn(self.place(rng)), f"{self.seed}/held out", self.number,
                     lambda problem: self.kind(problem.answer) == 0)

    def turn(self, state: State) -> Problem:
        return Problem(self.observe(state), state)

    def verify(self, problem, response):
        """Correct: a move of a shortest path."""
        if not FORM.fullmatch(response):
            return WRONG
        return Verdict(float(response[1] in self.good_moves(problem.answer)), response[1])

    def demonstrate(self, problem, rng):
        state = problem.answer
        if rng.random() >= self.expert_share:
            return rng.choice(SLOTS[0]) + rng.choice(SLOTS[1]) + "."
        if not self.in_sight(state):
            return "?" + rng.choice(SLOTS[1]) + "."
        return ("D" if state.held == self.all else "K") + rng.choice(self.good_moves(state)) + "."

    def valid_next(self, problem, prefix):
        fits = len(prefix) < 3 and all(c in slot for c, slot in zip(prefix, SLOTS))
        return SLOTS[len(prefix)] if fits else ""

    def canonical(self, problem, response):
        return response[1] if self.verify(problem, response).correct else None

    def all_solutions(self, problem):
        return list(self.good_moves(problem.answer))


def distance(a, b) -> int:
    return abs(a[0] - b[0]) + abs(a[1] - b[1])


def arrivals(task: KeyDoor, goal, expert_share: float) -> dict[tuple[int, int], list[float]]:
    """For each cell the probability that the mixture of expert and uniform moves first reaches `goal` in turn 0 .. limit."""
    found = {cell: [float(cell == goal)] for cell in task.cells}
    moves = {}
    for cell in task.cells:
        to = [task.moved(cell, m) for m in MOVES]
        good = [distance(c, goal) < distance(cell, goal) for c in to]
        moves[cell] = [(c, (1 - expert_share) / 4 + expert_share * g / max(sum(good), 1)) for c, g in zip(to, good)]
    for n in range(task.limit):
        for cell in task.cells:
            found[cell].append(0.0 if cell == goal else sum(p * found[to][n] for to, p in moves[cell]))
    return found


def mixture_success(task: KeyDoor, expert_share: float | None = None) -> tuple[float, float]:
    """(probability that an episode of one key, fully observed, succeeds, mean turns of those that do), for the demonstrations'
    mixture: exact, as the first arrivals at key and door are independent given their places."""
    share = task.expert_share if expert_share is None else expert_share
    found = {goal: arrivals(task, goal, share) for goal in task.cells}
    total = turns = 0.0
    for key, door in itertools.permutations(task.cells, 2):
        at_key = [sum(found[key][start][n] for start in task.cells if start not in (key, door)) for n in range(task.limit + 1)]
        for n, p in enumerate(at_key):
            for m in range(task.limit + 1 - n):
                both = p * found[door][key][m]
                total, turns = total + both, turns + both * (n + m)
    episodes = len(task.cells) * (len(task.cells) - 1) * (len(task.cells) - 2)
    return total / episodes, turns / max(total, 1e-300)


class KeyDoorWorld(TurnWorld):
    @dataclasses.dataclass(frozen=True)
    class Config(TurnWorld.Config):
        size: int = knob(7, "columns and rows of the grid", low=2, high=10)
        limit: int = knob(24, "turns of an episode at most", low=1)
        keys: int = knob(1, "keys to fetch", low=1, high=2)
        partial: bool = knob(False, "coordinates are hidden until the agent has come near")
        expert_share: float = knob(0.3, "share of demonstrations that move along a shortest path; the others at random", low=0.0,
                                   high=1.0)

    def make_task(self):
        c = self.config
        return KeyDoor(c.size, c.limit, c.keys, c.partial, expert_share=c.expert_share)
