"""Stored episodes: real Minari files that the tests write through Minari, read with every check; sets built by a recipe."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import h5py
import numpy as np
import pytest
import torch

from envs.control import dataset
from envs.control.copies import Copies
from envs.control.offline import REFERENCE, Offline
from envs.control.replay import Replay
from runner import data, places
from runner.catalogue import Catalogue
from runner.compose import compose
from runner.errors import UserError
from runner.interface import make_config
from runner.run import assemble, build

ROOT = Path(__file__).resolve().parents[2]
BOOK = Catalogue()
LENGTHS = (5, 3, 4)
NAME = "test/pole-v0"


def pole_episodes(lengths=LENGTHS, size=4, actions=1):
    """Episodes of made-up numbers in InvertedPendulum's shapes; the second one truly terminates, the others run out."""
    random, out = np.random.default_rng(1), []
    for i, n in enumerate(lengths):
        end = np.arange(n) == n - 1
        out.append({"observations": random.normal(size=(n + 1, size)),
                    "actions": random.uniform(-3, 3, (n, actions)).astype(np.float32),
                    "rewards": random.normal(size=n), "terminations": end & (i == 1), "truncations": end & (i != 1)})
    return out


def minari_file(episodes, name=NAME, env="InvertedPendulum-v5", **spaces):
    """Written by Minari itself into $MINARI_DATASETS_PATH; returns the folder."""
    import minari
    from minari.data_collector.episode_buffer import EpisodeBuffer

    warnings.simplefilter("ignore")  # what Minari would like to be told besides
    made = gymnasium.make(env)
    spaces = {"observation_space": made.observation_space, "action_space": made.action_space, **spaces}
    minari.create_dataset_from_buffers(name, [EpisodeBuffer(**e) for e in episodes], **spaces)
    made.close()
    return places.minari_root() / name


@pytest.fixture
def published(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("BALLAST_DATA", str(tmp_path / "own"))
    return minari_file


def world_of(*names, env="InvertedPendulum-v5", **values):
    return Offline(make_config([Offline.Config], {"id": env, "source": "published", "dataset": names or (NAME,), **values}))


def words(*names, env="InvertedPendulum-v5"):
    return ("method=td3", "env=halfcheetah_medium", f"env.id={env}", f"env.dataset=[{','.join(names or (NAME,))}]",
            "env.source=published", "size=smoke", "logger=none")


# ---- a good file -------------------------------------------------------------------------------------------------------
def test_columns_are_the_files_rows(published):
    episodes = pole_episodes()
    published(episodes)
    columns = world_of().columns()
    n = sum(LENGTHS)
    assert {k: tuple(v.shape) for k, v in columns.items()} == {
        "observation": (n, 4), "action": (n, 1), "reward": (n,), "terminated": (n,), "next_observation": (n, 4), "start": (n,)}
    row = 0
    for e, length in zip(episodes, LENGTHS):
        for t in range(length):
            expected = {"observation": e["observations"][t], "next_observation": e["observations"][t + 1],
                        "action": e["actions"][t] / 3, "reward": e["rewards"][t], "start": float(t == 0),
                        "terminated": float(e["terminations"][t])}
            for name, value in expected.items():
                np.testing.assert_allclose(columns[name][row].numpy(), value, rtol=1e-6, err_msg=f"{name} of row {row}")
            row += 1


def test_the_last_step_of_an_episode_that_ran_out_of_time_is_kept_without_termination(published):
    published(pole_episodes())
    columns = world_of().columns()
    assert torch.nonzero(columns["terminated"]).flatten().tolist() == [LENGTHS[0] + LENGTHS[1] - 1]
    assert torch.nonzero(columns["start"]).flatten().tolist() == [0, 5, 8]


def test_several_sets_are_joined_in_their_order(published):
    first, second = pole_episodes((3,)), pole_episodes((2, 2))
    published(first, "test/a-v0")
    published(second, "test/b-v0")
    world = world_of("test/a-v0", "test/b-v0")
    assert world.columns()["reward"].tolist() == pytest.approx(
        np.concatenate([e["rewards"] for e in first + second]).tolist())
    assert world.provenance()["id"] == "test/a-v0 + test/b-v0" and world.provenance()["transitions"] == 7
    swapped = world_of("test/b-v0", "test/a-v0").provenance()["digest"]
    assert swapped != world.provenance()["digest"]


def test_actions_beyond_the_bounds_are_clipped(published):
    episodes = pole_episodes()
    episodes[0]["actions"][0] = 3.5
    published(episodes)
    assert world_of().columns()["action"].abs().max() == 1


def test_a_run_tells_which_data_it_learned_from(published, cli, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(cli.cwd / "minari"))
    published(pole_episodes())
    told = cli(*words(), "--json")
    assert told.code == 0, told.err
    result = json.loads(told.out)
    assert result["data"] == {"source": "published", "id": NAME, "episodes": 3, "transitions": 12,
                              "digest": dataset.digest(pole_episodes())}
    rows = result["references"]
    returns = [e["rewards"].sum() for e in pole_episodes()]
    assert rows["data, mean episode"]["return"] == pytest.approx(np.mean(returns))
    assert rows["data, best episode"]["return"] == pytest.approx(max(returns))
    assert {"random policy", "all-zero action"} <= rows.keys()
    assert result["metrics"]["episode_length"] > 0


# ---- bad files ---------------------------------------------------------------------------------------------------------
def nan_in(name, *where):
    def change(episodes):
        for episode, step in where:
            episodes[episode][name][step] = np.nan
    return change


def in_file(change):
    def after(folder):
        with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
            change(file)
    return after


def truncate(folder):
    path = folder / "data" / "main_data.hdf5"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def shorten(file):
    values = file["episode_1/actions"][:-1]
    del file["episode_1/actions"]
    file["episode_1/actions"] = values


def empty_episode(file):
    for name in dataset.ARRAYS:
        values = file[f"episode_0/{name}"][:0]
        del file[f"episode_0/{name}"]
        file[f"episode_0/{name}"] = values


BAD = {
    "nan in observations": (nan_in("observations", (1, 2), (2, 0)), None, r"2 rows of observations.*row 8 \(episode 1, step 2\)"),
    "nan in rewards": (nan_in("rewards", (0, 4), (1, 0), (2, 3)), None, r"3 rows of rewards.*row 4 \(episode 0, step 4\)"),
    "infinite actions": (lambda e: e[2]["actions"].fill(np.inf), None, r"4 rows of actions.*row 8 \(episode 2, step 0\)"),
    "truncated file": (None, truncate, "damaged or truncated"),
    "no hdf5 at all": (None, lambda f: (f / "data" / "main_data.hdf5").write_text("hello"), "damaged or truncated"),
    "no file": (None, lambda f: (f / "data" / "main_data.hdf5").unlink(), "has no data/main_data.hdf5"),
    "no metadata": (None, lambda f: (f / "data" / "metadata.json").unlink(), "No data found"),
    "torn metadata": (None, lambda f: (f / "data" / "metadata.json").write_text("{"), "cannot be used"),
    "missing column": (None, in_file(lambda f: f.__delitem__("episode_2/rewards")), "episode_2 lacks rewards"),
    "unequal lengths": (None, in_file(shorten), "episode_1 has 3 rewards, but actions has 2 instead of 3"),
    "episode of no steps": (None, in_file(empty_episode), "episode_0 has no steps"),
    "no episodes": (None, in_file(lambda f: [f.__delitem__(k) for k in list(f)]), "holds no episodes"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_refused_in_words(published, cli, monkeypatch, what):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(cli.cwd / "minari"))
    before, after, says = BAD[what]
    episodes = pole_episodes()
    if before:
        before(episodes)
    folder = published(episodes)
    if after:
        after(folder)
    with pytest.raises(UserError, match=says):
        world_of().columns()
    told = cli(*words())
    assert told.code == 2 and NAME in told.err and not (cli.cwd / "runs").exists()


def box(*shape, low=-3.0, high=3.0):
    return gymnasium.spaces.Box(low, high, shape, np.float32)


@pytest.mark.parametrize(("episodes", "spaces", "says"), [
    (pole_episodes(size=5), {"observation_space": box(5)}, "observations of 5 and actions of 1, the simulator has 4 and 1"),
    (pole_episodes(actions=2), {"action_space": box(2)}, "observations of 4 and actions of 2"),
    (pole_episodes(), {"action_space": box(1, low=-np.inf, high=np.inf)}, "bounded real vectors"),
    (pole_episodes(), {"action_space": box(1, low=-1, high=1)}, "other bounds of actions"),
    (pole_episodes(), {"action_space": gymnasium.spaces.Discrete(3)}, "bounded real vectors"),
])
def test_spaces_that_do_not_match_the_env(published, episodes, spaces, says):
    published(episodes, **spaces)
    with pytest.raises(UserError, match=says):
        world_of().columns()


def test_a_set_that_is_not_on_disk_is_named_with_its_command(cli):
    told = cli(*words())
    assert told.code == 2 and f"minari download {NAME}" in told.err and "env.source=own" in told.err
    assert not (cli.cwd / "runs").exists()


def test_what_minari_does_not_publish(cli):
    told = cli("method=td3", "env=hopper_medium_replay", "env.source=published", "size=smoke", "logger=none")
    assert told.code == 2 and "Minari has none of this kind for Hopper-v5" in told.err


def test_the_paper_size_is_never_made_by_the_way(cli):
    told = cli("method=td3", "env=hopper_medium", "size=paper", "logger=none")
    assert told.code == 2 and "data build hopper_medium size=paper" in told.err
    assert "minari download mujoco/hopper/medium-v0" in told.err
    assert not (cli.cwd / "runs").exists()


def test_without_the_package_the_extra_is_named(published, monkeypatch):
    published(pole_episodes())
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[offline\]'"):
        world_of().columns()


def test_auto_takes_the_published_set_if_it_is_there_and_the_config_tells(published):
    chosen = lambda *more: compose(["env=halfcheetah_medium", "method=td3", *more], BOOK).config["env"]["source"]  # noqa: E731
    assert chosen() == "own"
    published(pole_episodes(), "mujoco/halfcheetah/medium-v0")
    assert chosen() == chosen("size=paper") == "published"
    assert chosen("size=smoke") == "own" and chosen("env.source=own") == "own"
    assert compose(["env=halfcheetah_medium_expert", "method=td3"], BOOK).config["env"]["source"] == "own"  # expert lacks
    a, b = (compose(["env=halfcheetah_medium", "method=td3", f"env.source={s}"], BOOK).id for s in ("own", "published"))
    assert a != b


# ---- score -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("env", "low", "high"), [("HalfCheetah-v5", -280.178953, 12135.0), ("Hopper-v5", -20.272305, 3234.3),
                                                  ("Walker2d-v5", 1.629008, 4592.3), ("Ant-v5", -325.6, 3879.7)])
def test_score_is_linear_between_d4rls_references(env, low, high):
    world = world_of(env=env)
    assert REFERENCE[env.split("-")[0]] == (low, high)
    for value, score in ((low, 0.0), (high, 100.0), ((low + high) / 2, 50.0)):
        assert world._scored({"return": value})["score"] == pytest.approx(score)


# ---- making sets -------------------------------------------------------------------------------------------------------
def test_recorded_episodes_are_whole_and_what_the_simulator_did():
    copies = Copies("InvertedPendulum-v5", 3)
    episodes = dataset.record(copies, lambda o: torch.ones(len(o), 1) * 0.5, 20, seed=4)
    assert len(episodes) % 3 == 0 and sum(len(e["rewards"]) for e in episodes) >= 20
    for i, e in enumerate(episodes):
        n = len(e["rewards"])
        assert e["observations"].shape == (n + 1, 4) and (e["actions"] == 1.5).all()  # in the simulator's units
        assert e["terminations"].tolist() == [False] * (n - 1) + [True] and not e["truncations"].any()
        assert np.array_equal(e["observations"][0], copies.reset(0, 4 + i))
        assert np.array_equal(e["observations"][1], copies.step(0, np.array([0.5]))[0])


def test_replayed_episodes_are_the_replay_buffers_rows():
    """Two copies, one a while after the other; boundaries, true ends, the running episode left out, rewards unscaled."""
    config = SimpleNamespace(capacity=500, start_steps=100, steps_per_update=1, batch_size=4, copies=2, reward_scale=0.5)
    copies = Copies("InvertedPendulum-v5", 2)
    method = SimpleNamespace(act=lambda o, explore: torch.zeros(len(o), 1), batches=1)
    replay = Replay(copies, method, config, 0, torch.device("cpu"))
    for _ in range(20):
        replay.next()
    episodes = dataset.replayed(replay, copies)
    assert len(episodes) > 4
    stored = replay.rows[:replay.total].double().numpy()
    rows = {tuple(r.tolist()) for r in stored}
    for e in episodes:
        n = len(e["rewards"])
        assert e["terminations"][-1] and not e["terminations"][:-1].any()  # the pole falls
        assert (e["rewards"] == np.append(np.ones(n - 1), 0)).all()
        for t in range(n):
            assert (*e["observations"][t], *np.float32(e["actions"][t] / 3), 0.5 * e["rewards"][t], float(e["terminations"][t]),
                    *e["observations"][t + 1]) in rows
    ended = int(stored[:, 6].sum())
    assert len(episodes) == ended and sum(len(e["rewards"]) for e in episodes) <= replay.total


def test_thinned_keeps_episodes_of_every_time():
    episodes = [{"rewards": np.zeros(10), "number": i} for i in range(100)]
    kept = [e["number"] for e in dataset.thinned(episodes, 200)]
    assert len(kept) == 20 and max(np.diff(kept)) <= 10 and kept[0] < 6 and kept[-1] > 90
    assert dataset.thinned(episodes, 1000) == episodes
    assert len(dataset.thinned(episodes, 3)) == 1


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A smoke set of each mixture of HalfCheetah, built by its recipe; they share one training run."""
    root = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BALLAST_DATA", str(root))
        for mixture in ("medium", "medium_replay", "medium_expert"):
            data.build(BOOK.get("env", f"halfcheetah_{mixture}"), "smoke", quiet=True)
    return root


def test_built_sets_are_minari_sets_with_a_card(made, monkeypatch):
    import minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(made))
    assert len(list((made / "runs").iterdir())) == 1
    for mixture in ("medium", "medium-replay", "medium-expert"):
        name = f"ballast/halfcheetah/{mixture}-smoke-v0"
        loaded, card = minari.load_dataset(name), json.loads((made / name / "card.json").read_text())
        assert loaded.total_episodes == card["episodes"] == 2 and loaded.total_steps == card["transitions"] == 2000
        assert loaded.env_spec.id == "HalfCheetah-v5"
        returns = [float(e.rewards.sum()) for e in loaded]
        assert card["return"]["mean"] == pytest.approx(np.mean(returns)) and card["return"]["max"] == pytest.approx(max(returns))
        assert card["recipe"]["medium"].startswith("method=td3 env=halfcheetah")
        assert card["runs"]["medium"]["id"] == next((made / "runs").iterdir()).name.rpartition("-")[2]
        assert not list((made / name).parent.glob(".*"))
    best = [max(float(e.rewards.sum()) for e in minari.load_dataset(f"ballast/halfcheetah/{m}-smoke-v0"))
            for m in ("medium", "medium-expert")]
    assert best[0] < 500 and best[1] > 5000  # the shipped teacher plays one half


def test_the_replay_set_is_what_the_run_played(made, monkeypatch):
    monkeypatch.setenv("BALLAST_DATA", str(made))
    entry = BOOK.get("env", "halfcheetah_medium_replay")
    trained, _ = data._train(data.recipe(entry, "smoke")["medium"], quiet=True)
    rows = trained.stream.rows[:2000]  # two episodes of 1000; the third was not finished
    columns = world_of(env="HalfCheetah-v5", source="own", own="ballast/halfcheetah/medium-replay",
                       data_size="smoke").columns()
    assert torch.equal(columns["observation"], rows[:, :17]) and torch.equal(columns["next_observation"], rows[:, -17:])
    assert torch.allclose(columns["action"], rows[:, 17:23]) and torch.allclose(columns["reward"], rows[:, 23])


def test_a_set_is_used_and_not_built_twice(made, cli, monkeypatch):
    monkeypatch.setenv("BALLAST_DATA", str(made))
    before = {p: p.stat().st_mtime_ns for p in made.rglob("*") if p.is_file()}
    told = cli("method=td3", "env=halfcheetah_medium", "size=smoke", "logger=none", "--json")
    assert told.code == 0 and "making its data set" not in told.err
    result = json.loads(told.out)
    assert result["data"]["id"] == "ballast/halfcheetah/medium-smoke-v0" and "score" in result["metrics"]
    assert result["references"]["data, mean episode"]["score"] == pytest.approx(
        100 * (result["references"]["data, mean episode"]["return"] + 280.178953) / (12135.0 + 280.178953))
    told = cli("data", "build", "halfcheetah_medium", "size=smoke")
    assert told.code == 0 and "there already" in told.err
    assert {p: p.stat().st_mtime_ns for p in made.rglob("*") if p.is_file()} == before


def test_list_and_show(made, cli, monkeypatch):
    monkeypatch.setenv("BALLAST_DATA", str(made))
    rows = json.loads(cli("data", "list", "--json").out)
    own = {r["set"]: r for r in rows if r["source"] == "own"}
    assert own["ballast/halfcheetah/medium-smoke-v0"]["on_disk"]
    assert not own["ballast/halfcheetah/medium-paper-v0"]["on_disk"]
    assert {"env": "pointmass_medium", "source": "computed"}.items() <= next(
        r for r in rows if r["env"] == "pointmass_medium").items()
    published = [r["set"] for r in rows if r["source"] == "published"]
    assert "mujoco/walker2d/expert-v0" in published and not any("replay" in p for p in published)
    assert "minari download mujoco/hopper/medium-v0" in cli("data", "list").out
    shown = cli("data", "show", "halfcheetah_medium_expert").out
    assert "2,000 transitions, 2 episodes" in shown and "method=td3 env=halfcheetah" in shown
    for wrong, says in ((("data",), "data build ENV"), (("data", "mend"), "build"),
                        (("data", "show", "hopper_medium"), "data build"),
                        (("data", "build", "halfcheeta_medium"), "halfcheetah_medium"),
                        (("data", "build", "halfcheetah_medium", "size=huge"), "claim"), (("data", "build"), "give one env")):
        told = cli(*wrong)
        assert told.code == 2 and says in told.err, wrong


def test_a_changed_recipe_is_not_passed_over(made, cli, monkeypatch, tmp_path):
    shutil.copytree(made / "ballast", tmp_path / "other" / "ballast")
    monkeypatch.setenv("BALLAST_DATA", str(tmp_path / "other"))
    path = tmp_path / "other/ballast/halfcheetah/medium-smoke-v0/card.json"
    path.write_text(path.read_text().replace("loop.steps=2500", "loop.steps=2400"))
    told = cli("method=td3", "env=halfcheetah_medium", "size=smoke", "logger=none")
    assert told.code == 2 and "another recipe" in told.err and "--force" in told.err


def test_processes_that_miss_the_same_set_make_it_once(tmp_path):
    """Two runs at once, on two sets that share a training run: one trains, the other waits, both end well."""
    import os

    env = {**os.environ, "BALLAST_DATA": str(tmp_path / "own"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    runs = [subprocess.Popen([sys.executable, "-m", "runner", "method=td3", f"env={name}", "size=smoke", "logger=none",
                              "--quiet"], cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for name in ("halfcheetah_medium", "halfcheetah_medium_replay")]
    told = [p.communicate(timeout=250)[1] for p in runs]
    assert [p.returncode for p in runs] == [0, 0], told
    trained = list((tmp_path / "own" / "runs").iterdir())
    assert len(trained) == 1 and json.loads((trained[0] / "run.json").read_text())["attempts"] == 1
    assert not list((tmp_path / "own").rglob("*/lock"))
    assert all("making its data set" in t for t in told)


@pytest.mark.parametrize(("error", "code", "says"), [("Failed", 1, "plays the data failed: it broke"),
                                                     ("Preempted", 143, "the same command continues")])
def test_a_build_whose_run_fails_or_is_stopped(cli, monkeypatch, error, code, says):
    """By hand and by the way of a run: no traceback, no set, no lock left behind."""
    from runner import loop, run

    usual, raised = run.execute, {"Failed": run.Failed, "Preempted": loop.Preempted}[error]

    def execute(job, **options):
        if job.env.name == "halfcheetah":
            raise raised("it broke")
        return usual(job, **options)

    monkeypatch.setattr(run, "execute", execute)
    monkeypatch.setenv("BALLAST_DATA", str(cli.cwd / "own"))
    for given in (("data", "build", "halfcheetah_medium", "size=smoke"),
                  ("method=td3", "env=halfcheetah_medium", "size=smoke", "logger=none")):
        told = cli(*given)
        assert told.code == code and says in told.err
    assert not list((cli.cwd / "own").rglob("*/lock")) and not list((cli.cwd / "own").rglob("card.json"))
    assert not (cli.cwd / "runs").exists()


def test_what_a_killed_build_left_is_swept_away(made, monkeypatch, tmp_path):
    shutil.copytree(made, tmp_path / "own")
    monkeypatch.setenv("BALLAST_DATA", str(tmp_path / "own"))
    folder = tmp_path / "own/ballast/halfcheetah"
    shutil.rmtree(folder / "medium-smoke-v0")
    (folder / ".medium-smoke-v0.123" / "data").mkdir(parents=True)
    data.ensure(compose(["env=halfcheetah_medium", "method=td3", "size=smoke"], BOOK), quiet=True)
    assert sorted(p.name for p in folder.iterdir()) == ["medium-expert-smoke-v0", "medium-replay-smoke-v0", "medium-smoke-v0"]
    digests = [json.loads((root / "ballast/halfcheetah/medium-smoke-v0/card.json").read_text())["digest"]
               for root in (made, tmp_path / "own")]
    assert digests[0] == digests[1]  # the same run, the same collection


@pytest.mark.parametrize("name", [n for n in BOOK.names("env") if BOOK.get("env", n).card.get("data")
                                  and "offline" in BOOK.get("env", n).provides])
def test_every_recipe_composes_at_every_size(name):
    entry = BOOK.get("env", name)
    for size in data.SIZES:
        for role, given in data.recipe(entry, size).items():
            job = compose(given, BOOK)
            assert job.env.name == name.split("_")[0] and "transitions" in job.env.provides, role
    _, world = build(compose([f"env={name}", "method=td3", "size=smoke"], BOOK), "cpu")
    trained = "expert" in name and "halfcheetah" not in name  # HalfCheetah's teacher ships
    assert set(data.recipe(entry, "claim")) == ({"medium", "expert"} if trained else {"medium"})
    assert world.config.own.startswith(f"ballast/{name.split('_')[0]}/")


def test_batches_scale_rewards_and_returns_do_not(published):
    episodes = pole_episodes()
    published(episodes)
    *_, stream = assemble(compose([*words(), "env.reward_scale=0.5"], BOOK))
    assert stream.data()["reward"].tolist() == pytest.approx((0.5 * np.concatenate([e["rewards"] for e in episodes])).tolist())
    assert world_of(reward_scale=0.5).data().returns == pytest.approx([e["rewards"].sum() for e in episodes])
