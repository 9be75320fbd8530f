"""A simulator of which only logged episodes are learned from: the published Minari set, or the project's own.

    source=published   the sets named by `dataset`, as `minari download` left them on disk (several are joined)
    source=own         what `python -m runner data build NAME` made: a policy trained through the runner, its episodes
                       stored in the same format. At the sizes smoke and claim a run makes what it misses by itself
    source=auto        published if it is on disk, else own; a run's config holds what that came to

The mixtures are those of D4RL (Fu et al. 2020, arXiv 2004.07219): `medium` is a half-trained policy with its exploration
noise, `replay` everything that policy's training played, `medium_expert` medium and expert half and half.

`score` is 100 (J - J_min) / (J_max - J_min) with D4RL's reference returns. They were measured on the v2 simulators: on v5 the
score is a label that allows orders of magnitude to be compared, no more; hence the returns of a random policy, of doing
nothing and of the data itself beside every result.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from envs.control import dataset
from envs.control.simulator import Simulator
from runner.errors import UserError
from runner.interface import Metric, data_root, knob, minari_root, own_id

REFERENCE = {  # D4RL's random and expert returns
    "HalfCheetah": (-280.178953, 12135.0),
    "Hopper": (-20.272305, 3234.3),
    "Walker2d": (1.629008, 4592.3),
    "Ant": (-325.6, 3879.7),
}
TRANSITIONS = {"smoke": 2_000, "claim": 20_000, "paper": 1_000_000}
COLLECTION_SEED = 20_000  # start states of the data: not the evaluation's


class Offline(Simulator):
    @dataclasses.dataclass(frozen=True)
    class Config(Simulator.Config):
        dataset: tuple[str, ...] = knob((), "Minari's names of the published sets, which are joined; empty: none is published")
        own: str = knob("", "name of the project's own set, without size and version")
        mixture: str = knob("medium", "which policies its own set holds", choices=["medium", "replay", "medium_expert"])
        source: str = knob("auto", "where the data come from", choices=["auto", "published", "own"])
        data_size: str = knob("claim", "size of the own set: smoke 2,000 transitions, claim 20,000, paper 1,000,000",
                              choices=["smoke", "claim", "paper"])
        collection_noise: float = knob(0.1, "standard deviation of the noise on a shipped teacher's actions", low=0.0,
                                       source="project's choice")

    metrics = {
        **Simulator.metrics,
        "score": Metric("max", "", "return, 0 for D4RL's random policy and 100 for its expert (v2 simulators)"),
    }

    def folders(self) -> list[tuple[str, Path]]:
        """(Minari's name, folder) of every set that is read; UserError if one is not there."""
        c = self.config
        own = own_id(c.own, c.data_size)
        # `auto` is settled when a run is composed; a world built by hand takes its own set.
        names, root = (list(c.dataset), minari_root()) if c.source == "published" else ([own], data_root())
        if not names:
            raise UserError(f"no published data set is known for this env: Minari has none of this kind for {c.id}\n"
                            "use env.source=own, or name one: env.dataset=[NAMESPACE/NAME-v0]")
        for name in names:
            if not (root / name).is_dir():
                what = f"minari download {name}" if c.source == "published" else "python -m runner data build ENV size=SIZE"
                raise UserError(f"data set {name} is not on disk: looked in {root}\nget it: {what}"
                                + ("\nor use the project's own set: env.source=own" if c.source == "published" and c.own else ""))
        return [(name, root / name) for name in names]

    def data(self) -> dataset.Data:
        """The episodes, read and checked once."""
        if not hasattr(self, "_data"):
            copies, episodes, folders = self.copies(1), [], self.folders()
            for name, folder in folders:
                episodes += dataset.read(folder, name, copies)
            self._data = dataset.join(episodes, copies, {"source": "published" if self.config.source == "published" else "own",
                                                         "id": " + ".join(name for name, _ in folders)})
            copies.close()
        return self._data

    def columns(self):
        return dict(self.data().columns)

    def provenance(self):
        return self.data().provenance

    # -- the yardstick
    def _scored(self, row: dict[str, float]) -> dict[str, float]:
        name = self.config.id.split("-")[0]
        if name in REFERENCE:
            low, high = REFERENCE[name]
            row["score"] = 100 * (row["return"] - low) / (high - low)
        return row

    def evaluate(self, method, seed):
        return self._scored(super().evaluate(method, seed))

    def references(self, seed):
        rows = {name: self._scored(row) for name, row in super().references(seed).items()}
        data = self.data()
        best = int(data.returns.argmax())
        return {"data, mean episode": self._scored({"return": float(data.returns.mean()),
                                                    "return_std": float(data.returns.std()),
                                                    "episode_length": float(data.lengths.mean())}),
                "data, best episode": self._scored({"return": float(data.returns[best]), "return_std": 0.0,
                                                    "episode_length": float(data.lengths[best])}), **rows}

    # -- making the own set
    def collect(self, runs, folder):
        """runs: {"medium": …, "expert": …} of the recipe. Without an expert's run the teacher that ships is the expert."""
        c = self.config
        wanted = TRANSITIONS[c.data_size]
        copies = self.copies(min(10, wanted // 2000))
        generator = torch.Generator().manual_seed(COLLECTION_SEED)

        def play(name, transitions, seed):
            if name in runs:
                torch.manual_seed(seed)
                return dataset.record(copies, lambda o: runs[name].method.act(o, explore=True), transitions, seed)
            mean = self.teacher().mean
            return dataset.record(copies, lambda o: mean(o) + c.collection_noise * torch.randn(
                len(o), copies.action_size, generator=generator), transitions, seed)

        if c.mixture == "replay":
            episodes = dataset.thinned(dataset.replayed(runs["medium"].stream, copies), wanted)
        elif c.mixture == "medium":
            episodes = play("medium", wanted, COLLECTION_SEED)
        else:
            episodes = play("medium", wanted // 2, COLLECTION_SEED) + play("expert", wanted // 2, 2 * COLLECTION_SEED)
        copies.close()
        return dataset.write(folder, own_id(c.own, c.data_size), c.id, episodes,
                             f"{c.mixture} of {c.id}, made by the recipe in card.json")
