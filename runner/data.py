"""Data sets that the project builds itself: `python -m runner data build|list|show`.

An env whose card has `data` is learned from stored episodes. Its recipe is there in plain words, for each size the command
lines of the runs that the episodes come from:

    data:
      cost: about two minutes of one core
      runs:
        medium: {claim: method=td3 env=halfcheetah …}

Building runs them as any run (they can be stopped and continued; sets that share a run train it once), hands the trained
methods to the world's `collect`, and puts the result beside a card.json in place, whole or not at all. The env's world has
the settings `own` (the set's name), `data_size`, `source` and `dataset` (names of published sets). What is built may also be
weights that learning starts from; then the setting `start` stands for `source`, and what `collect` tells has one line, `told`.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

from runner import catalogue, places
from runner import record as records
from runner.errors import UserError, unknown

SIZES = ("smoke", "claim", "paper")
ON_DEMAND = ("smoke", "claim")  # sizes that a run makes by itself where they are missing


def recipe(entry: catalogue.Entry, size: str) -> dict[str, list[str]]:
    """{role: words of the run}; UserError where the card does not tell."""
    runs = (entry.card.get("data") or {}).get("runs") or {}
    if not runs:
        raise UserError(f"env '{entry.name}' has no data set that could be built: its card has no `data: runs:`\n"
                        "`python -m runner data list` shows the envs that have one")
    missing = [role for role, words in runs.items() if size not in words]
    if missing:
        raise unknown(f"size of {entry.name}'s recipe", size, next(iter(runs.values())))
    return {role: shlex.split(words[size]) for role, words in runs.items()}


def folder_of(entry: catalogue.Entry, size: str) -> Path:
    return places.data_root() / places.own_id(entry.values["own"], size)


def card_of(folder: Path) -> dict | None:
    """What is told of a built set; None if there is none."""
    try:
        return json.loads((folder / "card.json").read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{folder / 'card.json'} cannot be read; build the set again with --force") from None


def ensure(job, quiet: bool):
    """Before a run: its env's own data set is there, or is made here and now if it is a small one."""
    env = job.config["env"]
    if not job.env.card.get("data") or "own" not in (env.get("source"), env.get("start")):
        return
    size = env["data_size"]
    entry = job.env._replace(values={**job.env.values, "own": env["own"]})
    folder = folder_of(entry, size)
    if folder.is_dir():
        _check_recipe(entry, size, folder)
        return
    if size not in ON_DEMAND:
        published = " ".join(env.get("dataset") or [])
        raise UserError(
            f"the data set of {entry.name} at size {size} is not on disk: looked for {folder}\n"
            f"build it: python -m runner data build {entry.name} size={size}\n"
            + (f"or take the published one: minari download {published}, then env.source=published" if published else
               "(Minari publishes none of this kind)"))
    build(entry, size, quiet=quiet)


def _check_recipe(entry, size, folder):
    card = card_of(folder)
    if card is None or card["recipe"] != {k: shlex.join(v) for k, v in recipe(entry, size).items()}:
        raise UserError(f"the data set in {folder} was made by another recipe than env {entry.name} names now\n"
                        f"build it again: python -m runner data build {entry.name} size={size} --force")


def build(entry: catalogue.Entry, size: str, *, quiet=False, force=False) -> Path:
    """Make the set unless it is there; where another process is at it, wait for that one's."""
    words = recipe(entry, size)
    target = folder_of(entry, size)
    records.require_space(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = _wait(target.parent, entry, size)
    try:
        if target.is_dir() and not force:
            return target
        data = entry.card["data"]
        _say(f"env {entry.name}: making its data set of size {size}, once ({data.get('cost', 'cost not told')})\n  into {target}")
        for old in target.parent.glob(f".{target.name}.*"):  # of a build that was killed
            shutil.rmtree(old, ignore_errors=True)
        temporary = target.parent / f".{target.name}.{os.getpid()}"
        temporary.mkdir()
        trained, made = {}, {}
        for role, given in words.items():
            trained[role], made[role] = _train(given, quiet)
        world = _world(entry, size)
        card = {"env": entry.name, "size": size, "recipe": {k: shlex.join(v) for k, v in words.items()},
                **world.collect(trained, temporary), "runs": made, **records.commit(catalogue.ROOT),
                "versions": records.versions(), "made": records.now()}
        records.write_atomic(temporary / "card.json", json.dumps(card, indent=1, default=float) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        _say(f"env {entry.name}: {_told(card)}")
        return target
    finally:
        lock.release()


def _told(card: dict) -> str:
    """What a card is about, in a line."""
    return card.get("told") or (f"{card['transitions']:,} transitions in {card['episodes']:,} episodes, mean return "
                                f"{card['return']['mean']:,.1f}")


def _say(text: str):
    print(text, file=sys.stderr, flush=True)


def _wait(folder: Path, entry, size) -> records.Lock:
    """The lock of all sets that lie together (they may share a run)."""
    told = False
    while True:
        lock = records.Lock(folder)
        if lock.holder() is None:
            try:
                return lock.acquire()
            except UserError:  # somebody was quicker
                pass
        if not told:
            holder = lock.holder() or {}
            _say(f"env {entry.name}: waiting for pid {holder.get('pid')} on {holder.get('host')}, which makes a data set in "
                 f"{folder}")
            told = True
        time.sleep(0.5)


def _train(words: list[str], quiet: bool):
    """Run the words of a recipe; (Trained, what the card tells of the run)."""
    from runner.catalogue import Catalogue
    from runner.checkpoint import Checkpoints
    from runner.compose import compose
    from runner.interface import Trained
    from runner.loop import Preempted
    from runner.run import Failed, assemble, execute

    whole = [*words, "logger=none", f"runs={places.data_root() / 'runs'}"]
    job = compose(whole, Catalogue())
    steps = job.config["loop"]["steps"]
    job.config["loop"]["save_steps"] = steps  # the state of the last step: it holds what was played (not part of the id)
    command = "python -m runner " + shlex.join(words)
    _say(f"  {command}")
    try:
        result = execute(job, quiet=quiet, command=command)
    except (Failed, Preempted) as error:
        told = UserError(f"the run that plays the data failed: {error}" if isinstance(error, Failed) else
                         "stopped while the data were made; what is trained is saved, the same command continues")
        told.exit_code = 1 if isinstance(error, Failed) else 143
        raise told from None
    folder = Path(result["folder"])
    method, _, stream = assemble(job)
    checkpoints = Checkpoints(folder / "checkpoints")
    if checkpoints.steps()[:1] != [steps]:
        raise UserError(f"run {folder} has no checkpoint of its last step; remove that folder and build again")
    state = checkpoints.load(steps, stream)
    method.load_state_dict(state["modules"])
    stream.load_state_dict(state["stream"])
    method.eval()
    return Trained(method, stream), {"id": result["id"], "command": command, "return": result["metrics"].get("return"),
                                     "seconds": result["seconds"]}


def _world(entry, size):
    from runner.interface import make_config
    from runner.knobs import fill

    cls = catalogue.load_class(entry)
    return cls(make_config([cls.Config], fill(catalogue.knobs(entry), {**entry.values, "data_size": size}, "env")), "cpu")


# ---- the command -------------------------------------------------------------------------------------------------------

def command(words: list[str], options: dict) -> int:
    book = catalogue.Catalogue(options["include"])
    actions = {"build": _build, "list": _list, "show": _show}
    if not words or words[0] not in actions:
        raise unknown("action of data", words[0] if words else "", actions,
                      "write: python -m runner data build ENV [size=claim|paper], data list, data show ENV")
    return actions[words[0]](words[1:], options, book)


def _named(words, book, default_size="") -> tuple[catalogue.Entry, str]:
    sizes = [w.removeprefix("size=") for w in words if w.startswith("size=")]
    names = [w for w in words if not w.startswith("size=")]
    known = [e.name for e in book.all("env") if e.card.get("data")]
    if len(names) != 1 or len(sizes) > 1:
        raise UserError(f"give one env, and a size if you like: python -m runner data build {known[0]} size=claim")
    if names[0] not in known:
        raise unknown("env with a data set of its own", names[0], known)
    if sizes and sizes[0] not in SIZES:
        raise unknown("size", sizes[0], SIZES)
    return book.get("env", names[0]), sizes[0] if sizes else default_size


def _build(words, options, book) -> int:
    entry, size = _named(words, book, "claim")
    target = folder_of(entry, size)
    there = target.is_dir() and not options.get("force")
    target = build(entry, size, quiet=bool(options.get("quiet")), force=bool(options.get("force")))
    if there:
        _check_recipe(entry, size, target)
        _say(f"env {entry.name}: its data set of size {size} is there already")
    print(target)
    return 0


def _rows(book) -> list[dict]:
    """Everything that is known: (env, where from, name, size, transitions or None, folder)."""
    rows = []
    for entry in book.all("env"):
        if not entry.card.get("data"):
            if "offline" not in entry.provides:
                continue
            rows.append({"env": entry.name, "source": "computed", "set": "made at every start, the same everywhere",
                         "on_disk": True})
            continue
        for name in entry.values.get("dataset") or []:
            there = places.holds(places.minari_root(), name)
            rows.append({"env": entry.name, "source": "published", "set": name, "on_disk": there,
                         "get": f"minari download {name}"})
        for size in SIZES:
            card = card_of(folder_of(entry, size))
            if size == "smoke" and card is None:
                continue
            rows.append({"env": entry.name, "source": "own", "set": places.own_id(entry.values["own"], size),
                         "on_disk": card is not None, "get": f"python -m runner data build {entry.name} size={size}",
                         **({"transitions": card["transitions"], "mean_return": card["return"]["mean"]}
                            if card and "transitions" in card else {})})
    return rows


def _list(words, options, book) -> int:
    from runner.cli import _columns

    if words:
        raise UserError("data list takes no names; `python -m runner data show ENV` tells of one")
    rows = _rows(book)
    if options.get("json"):
        print(json.dumps(rows, indent=1))
        return 0
    print(_columns([[r["env"], r["source"], r["set"], "yes" if r["on_disk"] else "no",
                     f"{r['transitions']:,}" if "transitions" in r else "", "" if r["on_disk"] else r["get"]] for r in rows],
                   ["env", "source", "set", "on disk", "transitions", "get it with"]))
    print(f"\nown sets: {places.data_root()} (BALLAST_DATA)\npublished sets: {places.minari_root()} (MINARI_DATASETS_PATH)")
    return 0


def _show(words, options, book) -> int:
    """The card of an env's own set: of the size that is named, else of the largest on disk."""
    entry, size = _named(words, book)
    found = [s for s in ([size] if size else reversed(SIZES)) if card_of(folder_of(entry, s))]
    if not found:
        raise UserError(f"no data set of {entry.name}{f' at size {size}' if size else ''} has been built here\n"
                        f"build it: python -m runner data build {entry.name} size={size or 'claim'}")
    folder = folder_of(entry, found[0])
    card = card_of(folder)
    if options.get("json"):
        print(json.dumps({**card, "folder": str(folder)}, indent=1))
        return 0
    if "told" in card:
        print(f"{places.own_id(entry.values['own'], found[0])}: {card['told']}")
        _show_runs(card, folder)
        return 0
    r, length = card["return"], card["length"]
    print(f"{places.own_id(entry.values['own'], found[0])}: {card['transitions']:,} transitions, {card['episodes']:,} episodes")
    print(f"  return     mean {r['mean']:,.1f}, standard deviation {r['std']:,.1f}, from {r['min']:,.1f} to {r['max']:,.1f}")
    print("  quantiles  " + ", ".join(f"{k} {v:,.1f}" for k, v in r["quantiles"].items()))
    print(f"  length     mean {length['mean']:,.1f}, from {length['min']} to {length['max']}; {card['terminated']:.0%} of the "
          "episodes terminated")
    _show_runs(card, folder)
    return 0


def _show_runs(card: dict, folder: Path):
    """What a set was made by and where it lies."""
    for role, run in card["runs"].items():
        reached = f"return {run['return']:,.1f}, " if run.get("return") is not None else ""
        print(f"  {role:10} {run['command']}  ({reached}{run['seconds']:,.0f} s, run {run['id']})")
    commit = card.get("commit", "unknown")[:12] + (" with changes" if card.get("dirty") else "")
    print(f"  made       {card['made']}, commit {commit}")
    print((f"  digest     {card['digest']}\n" if "digest" in card else "") + f"  folder     {folder}")
