"""The command line. Only the standard library and yaml are imported here until a command really needs more."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

from runner.errors import UserError, unknown

HELP = """\
Ballast trains a paper's method on an environment or data set and leaves a record that can be trusted.

  python -m runner method=NAME env=NAME [key=value …]     train, evaluate, record; the same command again continues
  python -m runner -m method=a,b seed=0,1,2 …             a sweep (Hydra's grammar); one process a run   [--jobs N]
  python -m runner list [methods|envs|hardware|sizes|loggers] [--json]
  python -m runner show NAME                              paper, formula, parts, hyper-parameters, fitting envs
  python -m runner diff A [B]                             settings and code in which A differs from B (its baseline)
  python -m runner check method=… env=… […]               compose and validate only
  python -m runner claim NAME… [--family F] [--all] [seeds=N] [hardware=…] [--jobs N]    run what is missing, judge
  python -m runner compare [RUN …] [--env E] [--claim C] [--by method] [--metric M] [--baseline B]
                           [--plot FILE.svg|png] [--csv FILE] [--latex FILE]
  python -m runner report [--open] [--to FILE] [--runs DIR]   one HTML page: methods, claims, runs
  python -m runner data build ENV [size=claim|paper] | data list | data show ENV    data sets of one's own
  python -m runner status  [FILTER …] [--json]            runs and how far they are
  python -m runner results [FILTER …] [--json]            finished runs and their figures
  python -m runner eval RUN [env=… env.key=…]             evaluate a finished run again, elsewhere if you like
  python -m runner export RUN --to FILE.safetensors       the trained policy, with its provenance beside it
  python -m runner video RUN [--to FILE] [--steps N] [--seed N]
  python -m runner completion bash|zsh                    eval "$(python -m runner completion bash)"

Options of a run:
  --force        start again from nothing, even if it is finished
  --fork         run a copy in a folder of its own
  --quiet        no progress display
  --include DIR  methods and envs of your own: one .py and one .yaml each

Groups: method, env, hardware (auto, cpu, gpu, ddp, fsdp), size (smoke, claim, paper), logger (none, csv, wandb).
Any setting: method.tau=0.5  env.episodes=20  loop.steps=1000  seed=1  runs=DIR  hardware.threads=4
Composition: method=a+b combines methods that change different parts.
"""

COMMANDS = ("list", "show", "diff", "check", "data", "claim", "compare", "report", "status", "results", "eval", "export", "video",
            "completion", "worker")


def main(words: list[str]) -> int:
    """Run a command line; returns the exit code: 0 done, 1 a run failed, 2 a wrong call, 130/143 stopped."""
    try:
        return _main(list(words))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    command = words.pop(0) if words[0] in COMMANDS else "run"
    options = _options(words, command)
    if command in _VALUED["--runs"].split():  # the folder may be given as it was for the run
        for word in [w for w in words if w.startswith("runs=")]:
            words.remove(word)
            options["runs"] = word.removeprefix("runs=")
    if "help" in options:
        print(HELP, end="")
        return 0
    if words and command == "run" and "=" not in words[0]:
        raise unknown("command", words[0], COMMANDS, "a run is started with key=value words: method=adpo env=halfcheetah")
    return globals()[f"_{command}"](words, options)


# option: the commands that take it; "" means all
_FLAGS = {"--force": "run worker data", "--fork": "run worker", "--quiet": "run worker data", "--multirun": "run", "-m": "run",
          "--json": "", "--help": "", "-h": "", "--all": "claim", "--allow-mixed": "claim compare",
          "--open": "report"}
_VALUED = {"--include": "", "--jobs": "run claim", "--family": "claim", "--by": "compare", "--metric": "compare",
           "--baseline": "compare", "--claim": "compare", "--env": "compare", "--plot": "compare", "--csv": "compare",
           "--latex": "compare", "--to": "export video report", "--steps": "video", "--seed": "video",
           "--runs": "status results eval export video compare report", "--command": "worker"}
# what is easily written as an option of a run, but is a setting
_SETTINGS = {"--steps": "loop.steps",
             **{f"--{k}": k for k in ("method", "env", "policy", "hardware", "size", "logger", "seed", "runs")}}


def _options(words: list[str], command: str) -> dict:
    """Take the options out of `words` (in place)."""
    options: dict = {"include": []}
    kept, rest = [], iter(words)
    for word in rest:
        name, eq, value = word.partition("=")
        if name in _SETTINGS and command in ("run", "check"):
            value = value if eq else next(rest, "VALUE")
            raise UserError(f"{name}: settings are written without dashes: {_SETTINGS[name]}={value}")
        owners = _FLAGS.get(name) or _VALUED.get(name)
        if owners and command not in owners.split():
            raise UserError(f"'{command}' does not take {name}; it belongs to: {owners.removesuffix(' worker')}")
        if name in _FLAGS and not eq:
            key = {"-m": "multirun", "-h": "help"}.get(name, name.lstrip("-"))
            options[key] = True
        elif name in _VALUED:
            value = value if eq else next(rest, None)
            if value is None:
                raise UserError(f"{name} needs a value")
            if name == "--include":
                options["include"].append(value)
            else:
                options[name.lstrip("-")] = value
        elif word.startswith("-") and not word.startswith("--=") and word != "-":
            raise unknown("option", word, [*_FLAGS, *_VALUED])
        else:
            kept.append(word)
    words[:] = kept
    return options


def _number(options, key, default: int) -> int:
    try:
        value = int(options.get(key, default))
    except ValueError:
        raise UserError(f"--{key} needs a whole number, not '{options[key]}'") from None
    if value < 0:
        raise UserError(f"--{key} must not be negative")
    return value


def _book(options):
    from runner.catalogue import Catalogue

    return Catalogue(options["include"])


# ---- looking ----------------------------------------------------------------------------------------------------------

def _columns(rows: list[list[str]], head: list[str]) -> str:
    rows = [head, *rows]
    widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
    width = _width()
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip()[:width] for r in rows)


def _width() -> int:
    if sys.stdout.isatty():
        import shutil
        return shutil.get_terminal_size().columns
    return 10_000


def _list(words, options) -> int:
    from runner.catalogue import CONF, KINDS

    book, kinds = _book(options), ("methods", "envs", "policies", "hardware", "sizes", "loggers")
    what = words or ["methods", "envs"]
    for word in what:
        if word not in kinds:
            raise unknown("thing to list", word, kinds)
    out = {}
    for word in what:
        kind = {"hardware": "hardware", "policies": "policy"}.get(word, word[:-1])
        if kind in KINDS:
            out[word] = [{"name": e.name, "family": e.family, "baseline": e.card.get("baseline"),
                          "title": e.card.get("title", ""), "summary": e.card.get("summary", ""),
                          "needs": e.needs, "provides": e.provides} for e in book.all(kind)]
        else:
            out[word] = [{"name": n, "summary": _comment(CONF / kind / f"{n}.yaml")} for n in book.names(kind)]
    if options.get("json"):
        print(json.dumps(out if len(what) > 1 else out[what[0]], indent=1, ensure_ascii=False))
        return 0
    for i, word in enumerate(what):
        print(("\n" if i else "") + word)
        if word == "policies":
            print(_columns([[e["name"], e["family"], e["summary"]] for e in out[word]], ["name", "family", "what it is"]))
        elif word in ("methods", "envs"):
            key = "needs" if word == "methods" else "provides"
            print(_columns([[e["name"], e["family"], ", ".join(e[key]), e["summary"]] for e in out[word]],
                           ["name", "family", key, "what it is"]))
        else:
            print(_columns([[e["name"], e["summary"]] for e in out[word]], ["name", "what it is"]))
    return 0


def _comment(path: Path) -> str:
    lines = [l[1:].strip() for l in path.read_text().splitlines() if l.startswith("#") and "@package" not in l]
    return " ".join(lines)


def _one(words, book, what="NAME"):
    from runner.catalogue import KINDS

    if len(words) != 1:
        raise UserError(f"give one {what}; for example: python -m runner show adpo")
    name = words[0]
    for kind in KINDS:
        if name.rpartition("/")[2] in book.paths[kind]:
            return book.get(kind, name)
    raise unknown("method, env or policy", name, [n for kind in KINDS for n in book.names(kind)],
                  "`python -m runner list` shows all")


def _show(words, options) -> int:
    from runner import catalogue

    book = _book(options)
    entry = _one(words, book)
    card, knobs = entry.card, catalogue.knobs(entry)
    values = {k.name: k.check(entry.values[k.name], entry.kind) if k.name in entry.values else k.default for k in knobs}
    if entry.kind == "method":
        fits = book.fitting([entry])
    elif entry.kind == "env":
        fits = [m.name for m in book.all("method") if catalogue.stream_kind([m], entry)]
    else:
        fits = [m.name for m in book.all("method") if entry.name in book.policies([m])]
    if options.get("json"):
        print(json.dumps({"name": entry.name, "kind": entry.kind, "family": entry.family, **card,
                          "parts_changed": catalogue.changed_parts(entry) if entry.kind == "method" else [],
                          "settings": [{**k._asdict(), "value": values[k.name]} for k in knobs],
                          "fits": fits, "file": str(entry.source.relative_to(catalogue.ROOT))
                          if entry.source.is_relative_to(catalogue.ROOT) else str(entry.source)},
                         indent=1, ensure_ascii=False))
        return 0
    print(card.get("title", entry.name))
    print(f"  {entry.kind} {entry.name} ({entry.family}): {card.get('summary', '')}")
    for key in ("paper", "formula", "baseline"):
        if card.get(key):
            print(f"  {key:9} {card[key]}")
    if entry.kind == "method":
        print(f"  changes   {', '.join(catalogue.changed_parts(entry)) or 'nothing: this is the base algorithm'}")
        print(f"  parts     {', '.join(catalogue.parts(entry)[0])}")
        if card.get("neutral"):
            print(f"  neutral   {', '.join(f'{k}={v}' for k, v in card['neutral'].items())}  (then it is {card['baseline']}, "
                  "bit for bit)")
        print(f"  needs     {' or '.join(entry.needs)}")
        print(f"  envs      {', '.join(fits) or 'none fits yet'}")
        if card.get("policy"):
            print(f"  policies  {', '.join(book.policies([entry]))}  (policy=NAME; {card['policy']} unless said)")
    else:
        if entry.kind == "env":
            print(f"  provides  {', '.join(entry.provides)}")
            if card.get("argument"):
                print(f"  argument  env={entry.name}:{card['argument'].upper()} sets env.{card['argument']}")
        print(f"  methods   {', '.join(fits)}")
    source = entry.source
    print(f"  file      {source.relative_to(catalogue.ROOT) if source.is_relative_to(catalogue.ROOT) else source}")
    print(f"\n  settings ({entry.kind}.NAME=VALUE)")
    rows = []
    for k in knobs:
        limits = "" if k.choices else _range(k)
        text = k.help + (f" ({', '.join(map(str, k.choices))})" if k.choices else "") + limits
        if k.when:
            text += "; only with " + ", ".join(  # a list holds all such values, a single one is an example
                f"{n}={' or '.join(map(_plain, v))}" if isinstance(v, list) else f"a setting such as {n}={_plain(v)}"
                for n, v in k.when.items())
        rows.append(["  " + k.name, k.type, _plain(values[k.name]), text + (f" [{k.source}]" if k.source else "")])
    print(_columns(rows, ["  name", "type", "default", "meaning"]))
    return 0


def _range(k) -> str:
    if k.low is None and k.high is None:
        return ""
    return f" ({'-inf' if k.low is None else k.low} … {'inf' if k.high is None else k.high})"


def _plain(value) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(map(str, value)) + "]"
    return "null" if value is None else ("true" if value is True else "false" if value is False else str(value) or "''")


def _diff(words, options) -> int:
    """Settings and code in which method A differs from B; B defaults to A's baseline."""
    import difflib

    from runner import catalogue

    book = _book(options)
    if not 1 <= len(words) <= 2:
        raise UserError("give one or two methods; for example: python -m runner diff adpo kd")
    a = book.get("method", words[0])
    other = words[1] if len(words) == 2 else a.card.get("baseline")
    if other is None:
        raise UserError(f"{a.name} has no baseline: it is its family's base algorithm; name a second method")
    b = book.get("method", other)
    tables = []
    for e in (a, b):
        values = {k.name: k.check(e.values[k.name], "method") if k.name in e.values else k.default
                  for k in catalogue.knobs(e)}
        tables.append(values)
    missing = "(not a setting)"
    rows = [[n, _plain(tables[0][n]) if n in tables[0] else missing, _plain(tables[1][n]) if n in tables[1] else missing]
            for n in [*tables[0], *(n for n in tables[1] if n not in tables[0])]
            if n not in tables[0] or n not in tables[1] or tables[0][n] != tables[1][n]]
    print("settings")
    print(_columns([["  " + r[0], *r[1:]] for r in rows], ["  name", a.name, b.name]) if rows else "  (the same)")

    def code(entry):
        out = {}
        for cls in reversed(catalogue.lineage(catalogue.main_class(entry.source))):
            for name in cls.methods():
                out[name] = (cls, cls.source(name))
        return out

    print("\ncode")
    ours, theirs, any_ = code(a), code(b), False
    for name in [*ours, *(n for n in theirs if n not in ours)]:
        new, old = ours.get(name, (None, ""))[1], theirs.get(name, (None, ""))[1]
        if new == old:
            continue
        any_ = True
        for line in difflib.unified_diff(old.splitlines(), new.splitlines(), f"{b.name}: {name}", f"{a.name}: {name}",
                                         lineterm="", n=2):
            print("  " + line)
    if not any_:
        print("  (the same)")
    return 0


def _check(words, options) -> int:
    from runner.compose import compose
    from runner.record import Record
    from runner.run import check_hardware, folder_of

    job = compose(words, _book(options))
    check_hardware(job.config)
    run = Record(folder_of(job)).read()
    if options.get("json"):
        print(json.dumps({"id": job.id, "config": job.config, "status": run["status"] if run else None}, indent=1))
        return 0
    print(f"ok: {job.config['method']['name']} on {job.config['env']['name']}, size {job.config['size']}, "
          f"{job.config['loop']['steps']:,} steps, seed {job.config['seed']}")
    print(f"run id {job.id}: {run['status'] if run else 'not run yet'}; folder {folder_of(job)}")
    return 0


# ---- running ----------------------------------------------------------------------------------------------------------

def _run(words, options) -> int:
    from runner.compose import compose

    if options.get("multirun"):
        from runner.plan import sweep
        return sweep(words, options)
    if "jobs" in options:
        raise UserError("--jobs is for a sweep: python -m runner -m …")
    job = compose(words, _book(options))
    if options.get("force") and options.get("fork"):
        raise UserError("--force starts this run again, --fork makes a copy: choose one")
    os.environ["OMP_NUM_THREADS"] = str(job.config["hardware"]["threads"])  # before torch is imported
    from runner import run

    run.check_hardware(job.config)
    # refuses a locked run before torch is imported
    run.locate(job, bool(options.get("force")), bool(options.get("fork")))
    command = "python -m runner " + shlex.join([*words, *(f"--include={d}" for d in options["include"]),
                                                *(["--fork"] if options.get("fork") else [])])
    if job.config["hardware"]["devices"] != 1:
        from runner.parallel import device_count, launch

        number = device_count(job.config["hardware"])
        if number > 1:
            from runner import data
            data.ensure(job, bool(options.get("quiet")))
            flags = [f"--{k}" for k in ("force", "fork", "quiet") if options.get(k)]
            return launch(job.config, number, options["include"], [*flags, f"--command={command}"])
    return _execute(job, options, command)


def _execute(job, options, command, fabric=None) -> int:
    from runner import run
    from runner.report import print_result

    try:
        result = run.execute(job, force=bool(options.get("force")), fork=bool(options.get("fork")),
                             quiet=bool(options.get("quiet")), command=command, fabric=fabric)
    except run.Failed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if type(error).__name__ != "Preempted":
            raise
        if fabric is None or fabric.global_rank == 0:
            print(f"stopped, state saved; the same command continues: {command}", file=sys.stderr)
        return 143
    if result:
        print(json.dumps(result, indent=1)) if options.get("json") else print_result(result)
    return 0


def _worker(words, options) -> int:
    """One rank of a run that torchrun started (see runner/parallel.py)."""
    from runner.catalogue import Catalogue
    from runner.compose import rebuild
    from runner.run import make_fabric

    if len(words) != 1 or not Path(words[0]).is_file():
        raise UserError("worker is how the processes of one run are started; write method=NAME env=NAME instead")
    frozen = json.loads(Path(words[0]).read_text())
    job = rebuild(frozen["config"], Catalogue(frozen["include"]))
    fabric = make_fabric(job.config["hardware"])
    return _execute(job, options, options.get("command", ""), fabric)


# ---- looking back -----------------------------------------------------------------------------------------------------

def _runs(options) -> Path:
    return Path(options.get("runs", "runs"))


def _status(words, options) -> int:
    from runner.report import print_status
    return print_status(_runs(options), words, bool(options.get("json")))


def _results(words, options) -> int:
    from runner.report import print_results
    return print_results(_runs(options), words, bool(options.get("json")))


def _eval(words, options) -> int:
    from runner import record, run
    from runner.report import print_evaluation

    names = [w for w in words if "=" not in w]
    if len(names) != 1:
        raise UserError("give one run; for example: python -m runner eval adpo-halfcheetah-s0-1a2b3c4d5e6f")
    folder = record.find(names[0], _runs(options))
    job, method, world = run.load_run(folder, _book(options), [w for w in words if "=" in w])
    metrics = world.evaluate(method, job.config["seed"])
    references = world.references(job.config["seed"])
    with open(folder / "evaluations.jsonl", "a") as f:
        f.write(json.dumps({"time": record.now(), "env": job.config["env"], "metrics": metrics,
                            "references": references}) + "\n")
    if options.get("json"):
        print(json.dumps({"run": folder.name, "env": job.config["env"]["name"], "metrics": metrics,
                          "references": references}, indent=1))
    else:
        print_evaluation(folder, job, metrics, references, {k: list(m) for k, m in world.metrics.items()})
    return 0


def _export(words, options) -> int:
    from runner import record, run

    if len(words) != 1 or "to" not in options:
        raise UserError("write: python -m runner export RUN --to FILE.safetensors, or --to FOLDER for a language model in "
                        "Hugging Face's layout")
    target = Path(options["to"])
    if target.suffix not in (".safetensors", ""):
        raise UserError(f"--to {target}: the file must end in .safetensors (or name a folder)")
    if not target.suffix and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--to {target}: there is something already; name a new folder")
    folder = record.find(words[0], _runs(options))
    _, method, _ = run.load_run(folder, _book(options))
    tensors, description = method.export()
    info = record.Record(folder).read()
    command = shlex.join(w for w in shlex.split(info["command"]) if not w.startswith("runs="))  # where it lay is nobody's
    config = {k: v for k, v in info["config"].items() if k not in ("runs", "logger")}
    provenance = {"run": info["id"], "method": config["method"]["name"], "env": config["env"]["name"], "command": command,
                  "steps": info["evaluated_step"],
                  **{k: info.get(k) for k in ("commit", "dirty", "seed", "metrics", "references", "versions", "device",
                                              "finished")},
                  "config": config, "description": description}
    if not target.suffix:
        method.export_folder(target)
        (target / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")
        files = list(target.iterdir())
        print(f"{target} ({sum(f.stat().st_size for f in files) / 1000:,.0f} kB in {len(files)} files)")
        return 0
    from safetensors.torch import save_file

    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, target, metadata=description)
    target.with_suffix(".json").write_text(json.dumps(provenance, indent=1) + "\n")
    print(f"{target} ({target.stat().st_size / 1000:.0f} kB) and {target.with_suffix('.json').name}")
    return 0


def _video(words, options) -> int:
    from runner import record, run
    from runner.video import write_video

    if len(words) != 1:
        raise UserError("give one run; for example: python -m runner video RUN --to cheetah.mp4")
    folder = record.find(words[0], _runs(options))
    steps, seed = _number(options, "steps", 200), _number(options, "seed", 0)
    target = Path(options.get("to", folder / "video.mp4"))
    _, method, world = run.load_run(folder, _book(options))
    write_video(method, world, target, steps, seed)
    return 0


def _data(words, options) -> int:
    from runner.data import command
    return command(words, options)


def _claim(words, options) -> int:
    from runner.claims import command
    return command(words, options)


def _compare(words, options) -> int:
    from runner.compare import command
    return command(words, _runs(options), options)


def _report(words, options) -> int:
    """One HTML file: the catalogue, the claims, the runs."""
    from runner.catalogue import ROOT
    from runner.html import write_report

    if words:
        raise UserError("report takes no names: python -m runner report [--open] [--to FILE.html] [--runs DIR]")
    runs = _runs(options)
    target = write_report(Path(options.get("to", runs / "report.html")), runs, ROOT / "claims", _book(options))
    print(f"{target} ({target.stat().st_size / 1000:.0f} kB)")
    if options.get("open"):
        import webbrowser
        webbrowser.open(target.absolute().as_uri())
    return 0


def _completion(words, options) -> int:
    from runner.completion import script
    if len(words) != 1:
        raise UserError("say which shell: bash or zsh")
    print(script(words[0]), end="")
    return 0


def entry():
    """The command `ballast`."""
    sys.exit(main(sys.argv[1:]))
