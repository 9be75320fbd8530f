"""Path tracing: find a way through a small directed graph that the prompt lists edge by edge.

    prompt "ab,bc,ad,dc,…|a>c="    response "abc." (every node of a path from a to c, none twice)

A graph has `nodes` nodes with random letters and `edges` distinct directed edges in random order, so that every prompt has
the same length; a path of `least` to `most` edges between the two nodes is planted among them. The verifier checks the ends
and every edge; any path of at most `most` edges counts, or, with `shortest`, only one of the fewest.

Demonstrations: with probability `correct_share` a random right path, else a walk along random edges from the start that
never goes to a node twice and stops at the goal, where it is stuck, or after `most` edges.

For a card: provides prompts, demonstrations. The project's own, after the path-star and shortest-path tasks of the planning
literature (2403.06963); several answers, coverage can be counted. Gold metrics: pass@k, coverage.
"""

from __future__ import annotations

import dataclasses
import string

from envs.prompts.base import PromptWorld
from envs.prompts.task import Generated, Problem, Verdict
from runner.errors import UserError
from runner.interface import knob

LETTERS = string.ascii_lowercase


class Path(Generated):
    alphabet, eos = LETTERS + ",|>=.", "."

    def __init__(self, nodes: int = 8, edges: int = 12, least: int = 2, most: int = 4, shortest: bool = False,
                 correct_share: float = 0.5, held_out: int = 256, seed: int = 0):
        if not 2 <= nodes <= len(LETTERS) or not 1 <= least <= most < nodes or not most <= edges <= nodes * (nodes - 1):
            raise UserError(f"path: {nodes} nodes, {edges} edges, paths of {least} to {most}\nthere may be 2 to 26 nodes; "
                            "1 <= least <= most < nodes; edges from `most` to nodes (nodes - 1)")
        if (edges / nodes) ** most > 10_000:
            raise UserError(f"path: {edges} edges between {nodes} nodes have too many paths of {most} edges to be listed\n"
                            "take fewer edges or a smaller `most`")
        if not 0 <= correct_share <= 1 or held_out < 1:
            raise UserError("path: correct_share lies between 0 and 1, held_out is at least 1")
        self.nodes, self.edges, self.least, self.most, self.shortest = nodes, edges, least, most, shortest
        self.correct_share, self.size, self.seed = correct_share, held_out, seed
        self.prompt_length, self.response_length = 3 * edges + 4, most + 2

    def make(self, rng):
        nodes = rng.sample(LETTERS, self.nodes)
        planted = nodes[:rng.randint(self.least, self.most) + 1]
        edges = {a + b for a, b in zip(planted, planted[1:])}
        others = [a + b for a in nodes for b in nodes if a != b and a + b not in edges]
        edges = sorted(edges) + rng.sample(others, self.edges - len(edges))
        rng.shuffle(edges)
        start, goal = planted[0], planted[-1]
        return Problem(f"{','.join(edges)}|{start}>{goal}=", (frozenset(edges), start, goal))

    def verify(self, problem, response):
        edges, start, goal = problem.answer
        path = response[:-1]
        if not response.endswith(".") or not 2 <= len(path) <= self.most + 1 or not all(c in LETTERS for c in path):
            return Verdict(0.0, None, 0.0)
        right = (path[0] == start and path[-1] == goal and len(set(path)) == len(path)
                 and all(a + b in edges for a, b in zip(path, path[1:])))
        if right and self.shortest:
            right = len(path) == len(self.all_solutions(problem)[0]) - 1
        return Verdict(float(right), path)

    def all_solutions(self, problem):
        """Every right path, the shorter ones first."""
        edges, start, goal = problem.answer
        after = following(edges)
        found, begun = [], [start]
        for _ in range(self.most):
            begun = [path + b for path in begun for b in after.get(path[-1], ()) if b not in path]
            found += [path + "." for path in begun if path[-1] == goal]
            begun = [path for path in begun if path[-1] != goal]
            if found and self.shortest:
                break
        return found

    def demonstrate(self, problem, rng):
        if rng.random() < self.correct_share:
            return rng.choice(self.all_solutions(problem))
        edges, path, goal = problem.answer
        after = following(edges)
        while path[-1] != goal and len(path) <= self.most:
            if not (on := [b for b in after.get(path[-1], ()) if b not in path]):
                break
            path += rng.choice(on)
        return path + "."

    def valid_next(self, problem, prefix):
        """Nodes of the graph, none twice, at most as many as a path has; the end after two of them."""
        nodes = sorted({c for edge in problem.answer[0] for c in edge})
        if len(set(prefix)) < len(prefix) or not all(c in nodes for c in prefix):
            return ""
        return "".join(c for c in nodes if c not in prefix and len(prefix) <= self.most) + "." * (len(prefix) >= 2)


def following(edges) -> dict[str, list[str]]:
    after: dict[str, list[str]] = {}
    for a, b in sorted(edges):
        after.setdefault(a, []).append(b)
    return after


class PathWorld(PromptWorld):
    @dataclasses.dataclass(frozen=True)
    class Config(PromptWorld.Config):
        nodes: int = knob(8, "nodes of a graph", low=2, high=26)
        edges: int = knob(12, "directed edges of a graph", low=1)
        least: int = knob(2, "edges of the planted path, at least", low=1)
        most: int = knob(4, "edges of the planted path, and of any answer, at most", low=1)
        shortest: bool = knob(False, "only a path of the fewest edges is correct")
        correct_share: float = knob(0.5, "share of demonstrations that reach the goal; the others are random walks", low=0.0,
                                    high=1.0)

    def make_task(self):
        c = self.config
        return Path(c.nodes, c.edges, c.least, c.most, c.shortest, c.correct_share)
