"""Stored episodes in Minari's format: read with every check, written with Minari's own package.

An episode of T steps holds observations (T + 1, S), which includes the true last one, and actions (T, A) in the
simulator's own units, rewards, terminations, truncations (T,). As columns of transitions:

    observation, next_observation (N, S); action (N, A), scaled to [-1, 1]; reward (N,); terminated (N,): 1 for true ends
    only; start (N,): 1 for first steps of episodes

Because the last observation is known, the last step of an episode that a time limit ended is kept, with terminated = 0.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from runner.errors import UserError

ARRAYS = ("observations", "actions", "rewards", "terminations", "truncations")


class Data(NamedTuple):
    columns: dict[str, Tensor]
    returns: np.ndarray      # (episodes,) undiscounted, not scaled
    lengths: np.ndarray      # (episodes,)
    provenance: dict         # id, digest, counts: what a record should name


def columns_of(episodes: list[dict[str, np.ndarray]], low: np.ndarray, high: np.ndarray) -> dict[str, Tensor]:
    """Episodes as columns; actions from [low, high] to [-1, 1], clipped (logs hold what was asked for, not what was done)."""
    lengths = [len(e["rewards"]) for e in episodes]
    joined = {name: np.concatenate([e[name] for e in episodes]) for name in ("actions", "rewards", "terminations")}
    action = joined["actions"].reshape(len(joined["rewards"]), -1).astype(np.float64)
    action = np.clip((action - low) / (high - low) * 2 - 1, -1, 1)
    start = np.zeros(len(action), dtype=bool)
    start[np.cumsum([0, *lengths[:-1]])] = True
    flat = [e["observations"].reshape(len(e["observations"]), -1) for e in episodes]
    out = {"observation": np.concatenate([o[:-1] for o in flat]), "action": action, "reward": joined["rewards"],
           "terminated": joined["terminations"], "next_observation": np.concatenate([o[1:] for o in flat]), "start": start}
    return {k: torch.from_numpy(np.ascontiguousarray(v, dtype=np.float32)) for k, v in out.items()}


def digest(episodes: list[dict[str, np.ndarray]]) -> str:
    """sha256 of the arrays: of what is stored, however the file is laid out."""
    out = hashlib.sha256()
    for episode in episodes:
        for name in ARRAYS:
            out.update(np.ascontiguousarray(episode[name]).tobytes())
    return out.hexdigest()


def _packages():
    """(h5py, minari), or a UserError that names the extra."""
    try:
        import h5py
        import minari
    except ImportError as error:
        raise UserError(f"stored episodes need a package that is missing: {error}\n"
                        "install the extra: pip install -e '.[offline]'") from None
    return h5py, minari


def read(folder: Path, name: str, copies) -> list[dict[str, np.ndarray]]:
    """The episodes of the Minari data set `name` in `folder`; `copies` is the simulator that they must fit. UserError for
    a file that is broken, holds other spaces, lacks arrays, has arrays of unequal lengths, NaNs, or nothing at all."""
    h5py, minari = _packages()

    def broken(why: str) -> UserError:
        return UserError(f"data set {name} cannot be used: {why}\nfolder: {folder}\nremove that folder, then "
                         "download or build the set again")

    if not (folder / "data" / "main_data.hdf5").is_file():
        raise broken("it has no data/main_data.hdf5")
    try:
        dataset = minari.MinariDataset(folder / "data")
        spaces = (dataset.observation_space, dataset.action_space)
    except (ValueError, KeyError, AssertionError, OSError, RuntimeError) as error:
        raise broken(f"{type(error).__name__}: {error}") from None
    _check_spaces(name, spaces, copies)
    try:
        with h5py.File(folder / "data" / "main_data.hdf5", "r") as file:
            episodes = [_episode(file, key, broken) for key in sorted(file, key=_number)]
    except (OSError, RuntimeError) as error:  # h5py's errors of a truncated or foreign file
        raise broken(f"its hdf5 file is damaged or truncated ({error})") from None
    if not episodes:
        raise broken("it holds no episodes")
    _check_numbers(episodes, broken)
    return episodes


def _number(key: str) -> int:
    last = key.rpartition("_")[2]
    return int(last) if last.isdigit() else -1


def _episode(file, key: str, broken) -> dict[str, np.ndarray]:
    group = file[key]
    missing = [a for a in ARRAYS if a not in group or not hasattr(group[a], "shape")]
    if missing:
        raise broken(f"{key} lacks {', '.join(missing)}")
    episode = {a: group[a][()] for a in ARRAYS}
    steps = len(episode["rewards"])
    if steps == 0:
        raise broken(f"{key} has no steps")
    wanted = {a: steps + (a == "observations") for a in ARRAYS}
    wrong = [f"{a} has {len(episode[a])} instead of {n}" for a, n in wanted.items() if len(episode[a]) != n]
    if wrong:
        raise broken(f"{key} has {steps} rewards, but {'; '.join(wrong)} entries")
    return episode


def _check_spaces(name: str, spaces, copies):
    have = [int(np.prod(s.shape)) if getattr(s, "shape", None) is not None else str(s) for s in spaces]
    want = [copies.observation_size, copies.action_size]
    if have != want:
        raise UserError(f"data set {name} does not fit this env: it holds observations of {have[0]} and actions of {have[1]}, "
                        f"the simulator has {want[0]} and {want[1]}\nchoose another env or env.dataset")
    box = spaces[1]
    if not hasattr(box, "low") or not (np.isfinite(box.low).all() and np.isfinite(box.high).all()):
        raise UserError(f"data set {name} has the action space {box}: bounded real vectors are needed")
    if not (np.allclose(box.low, copies.low) and np.allclose(box.high, copies.high)):
        raise UserError(f"data set {name} has other bounds of actions than the simulator: {box.low} to {box.high}, not "
                        f"{copies.low} to {copies.high}")


def _check_numbers(episodes, broken):
    for name in ("observations", "actions", "rewards"):
        count, first, row = 0, None, 0
        for i, episode in enumerate(episodes):
            bad = ~np.isfinite(episode[name].reshape(len(episode[name]), -1)).all(1)
            if bad.any() and first is None:
                first = f"row {row + int(bad.argmax()):,} (episode {i}, step {int(bad.argmax())})"
            count += int(bad.sum())
            row += len(bad)
        if count:
            raise broken(f"{count:,} rows of {name} are not finite, the first is {first}")


def join(episodes: list[dict[str, np.ndarray]], copies, provenance: dict) -> Data:
    returns = np.array([e["rewards"].sum(dtype=np.float64) for e in episodes])
    lengths = np.array([len(e["rewards"]) for e in episodes])
    return Data(columns_of(episodes, copies.low, copies.high), returns, lengths,
                {**provenance, "digest": digest(episodes), "episodes": len(episodes), "transitions": int(lengths.sum())})


def write(folder: Path, name: str, env_id: str, episodes: list[dict[str, np.ndarray]], description: str) -> dict:
    """Write `folder`/data as the Minari data set `name`. Returns its statistics, for a card."""
    import gymnasium

    _, minari = _packages()
    from minari.data_collector.episode_buffer import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    env = gymnasium.make(env_id)
    (folder / "data").mkdir(parents=True)
    storage = MinariStorage.new(folder / "data", observation_space=env.observation_space, action_space=env.action_space,
                                env_spec=env.spec)
    storage.update_metadata({"dataset_id": name, "minari_version": minari.__version__, "description": description,
                             "algorithm_name": "Ballast"})
    storage.update_episodes([EpisodeBuffer(observations=e["observations"], actions=e["actions"], rewards=e["rewards"],
                                           terminations=e["terminations"], truncations=e["truncations"]) for e in episodes])
    env.close()
    returns = np.array([e["rewards"].sum(dtype=np.float64) for e in episodes])
    lengths = np.array([len(e["rewards"]) for e in episodes])
    return {"transitions": int(lengths.sum()), "episodes": len(episodes), "digest": digest(episodes),
            "return": {"mean": returns.mean(), "std": returns.std(), "min": returns.min(), "max": returns.max(),
                       "quantiles": dict(zip(("10%", "25%", "50%", "75%", "90%"),
                                             np.quantile(returns, (0.1, 0.25, 0.5, 0.75, 0.9)).tolist()))},
            "length": {"mean": lengths.mean(), "min": int(lengths.min()), "max": int(lengths.max())},
            "terminated": float(np.mean([bool(e["terminations"][-1]) for e in episodes]))}


# ---- making episodes ---------------------------------------------------------------------------------------------------

def record(copies, policy, transitions: int, seed: int) -> list[dict[str, np.ndarray]]:
    """Whole episodes, played side by side in `copies` until they hold `transitions` steps at least. Every episode that
    is begun is finished, so that short ones are not favoured. policy: observation (n, S) float32 -> action (n, A)."""
    episodes: list[dict] = []
    while sum(len(e["rewards"]) for e in episodes) < transitions:
        number = len(copies.envs)
        running = []
        for i in range(number):
            first = copies.reset(i, seed + len(episodes) + i)
            running.append({"observations": [first], **{a: [] for a in ARRAYS[1:]}})
        alive = list(range(number))
        while alive:
            seen = torch.from_numpy(np.stack([running[i]["observations"][-1] for i in alive])).float()
            still = []
            for i, action in zip(alive, policy(seen).cpu().numpy()):
                after, reward, terminated, truncated = copies.step(i, action)
                for name, value in zip(ARRAYS, (after.copy(), copies.scale(action), reward, terminated, truncated)):
                    running[i][name].append(value)
                if not (terminated or truncated):
                    still.append(i)
            alive = still
        episodes += [{k: np.asarray(v) for k, v in e.items()} for e in running]
    return episodes


def replayed(replay, copies) -> list[dict[str, np.ndarray]]:
    """The whole episodes in a replay buffer, oldest first; an episode that was still running at the end is left out."""
    s, a, number = copies.observation_size, copies.action_size, len(replay.copies.envs)
    rows = replay.journal_rows(replay.journal_first(), replay.journal_size()).double().numpy()
    episodes = []
    for copy in range(number):
        own = rows[copy::number]
        observation, after, terminated = own[:, :s], own[:, -s:], own[:, -s - 1] > 0
        goes_on = (after[:-1] == observation[1:]).all(1) & ~terminated[:-1]
        ends = np.flatnonzero(~goes_on) + 1
        if terminated[-1]:
            ends = np.append(ends, len(own))
        for begin, end in zip([0, *ends[:-1]], ends):
            part = own[begin:end]
            episodes.append({
                "observations": np.concatenate([part[:, :s], part[-1:, -s:]]),
                "actions": np.stack([copies.scale(x) for x in part[:, s:s + a]]),
                "rewards": part[:, s + a] / replay.config.reward_scale, "terminations": terminated[begin:end],
                "truncations": np.append(np.zeros(end - begin - 1, bool), not terminated[end - 1])})
    return episodes


def thinned(episodes: list, transitions: int) -> list:
    """Episodes spread evenly over the list, together at most `transitions` steps (one at least)."""
    total = sum(len(e["rewards"]) for e in episodes)
    if total <= transitions:
        return episodes
    kept, held, passed = [], 0, 0
    for episode in episodes:
        length = len(episode["rewards"])
        passed += length
        if not kept or held + length <= transitions * passed / total:
            kept.append(episode)
            held += length
    return kept
