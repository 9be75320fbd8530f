"""One run, from a composed job to its result: builds method and world, trains, evaluates, leaves the record."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

from runner import catalogue
from runner import data as datasets
from runner import record as records
from runner.compose import Job
from runner.errors import UserError
from runner.record import Lock, Record


class Failed(Exception):
    """A bug in a method or a world; the traceback lies in the run's folder."""


def gpus_present() -> bool:
    """Whether this machine shows a GPU, told without torch (device files of NVIDIA and AMD; Apple's by platform)."""
    return bool(list(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists() or Path("/dev/dxg").exists()
                or sys.platform == "darwin")


def check_hardware(config: dict):
    """Refuse a GPU that is not there."""
    if config["hardware"]["accelerator"] == "gpu":
        present = gpus_present()
        if present and "torch" in sys.modules:
            import torch
            present = torch.cuda.is_available()
        if not present:
            raise UserError("hardware.accelerator=gpu, but no GPU is usable here (none present, or torch was built "
                            "without it)\nuse hardware=auto or hardware=cpu")


def folder_of(job: Job) -> Path:
    return Path(job.config["runs"]) / job.name


def locate(job: Job, force: bool, fork: bool) -> tuple[Path, dict | None]:
    """Where the run lives and what is recorded of it (nothing, under --force); refuses a locked run. Writes nothing."""
    folder = folder_of(job)
    if fork and job.config["hardware"]["seeds"] > 1:  # the other seeds' folders would not be copies
        raise UserError("--fork copies one run, not a batch of seeds\ngive another folder instead: runs=DIR")
    if fork:  # the first copy that is free or was left unfinished
        number = 2
        while True:
            copy = folder.parent / f"{folder.name}-fork{number}"
            run = Record(copy).read() if copy.exists() else None
            if not copy.exists() or run and run["status"] != "done" and Lock(copy).holder() is None:
                return copy, run
            number += 1
    run = Record(folder).read() if folder.exists() and not force else None
    holder = Lock(folder).holder() if folder.exists() else None
    if holder is not None and (force or run is None or run["status"] != "done"):
        raise UserError(f"another process works on this run: pid {holder['pid']} on {holder['host']}, since "
                        f"{holder['since']}\nfolder: {folder}\nwait for it, stop it, or start a copy of your own with --fork")
    return folder, run


def build(job: Job, device):
    """(method, world) on `device`, not yet set up; imports the code."""
    from runner.interface import make_config

    world_class = catalogue.load_class(job.env)
    world_values = {k: v for k, v in job.config["env"].items() if k != "name"}
    return _method(job), world_class(make_config([world_class.Config], world_values), device)


def _method(job: Job):
    from runner.interface import compose_class, make_config

    classes = [catalogue.load_class(e) for e in job.methods]
    values = {k: v for k, v in job.config["method"].items() if k != "name"}
    method = compose_class(classes)(make_config([c.Config for c in classes], values))
    if job.policy:
        cls = catalogue.load_class(job.policy)
        method.blueprint = cls(make_config([cls.Config], {k: v for k, v in job.config["policy"].items() if k != "name"}))
    return method


def seeds_of(job: Job) -> list[int]:
    """The seeds that this process trains at once."""
    return list(range(job.config["seed"], job.config["seed"] + job.config["hardware"]["seeds"]))


def member_jobs(job: Job) -> list[Job]:
    """One job for each of the seeds trained at once; the first is `job` itself."""
    from runner.compose import identity

    configs = [{**job.config, "seed": seed} for seed in seeds_of(job)]
    return [job, *(job._replace(config=c, id=identity(c)) for c in configs[1:])]


def assemble(job: Job, fabric=None):
    """(method, world, stream), set up and seeded: the state before step 0."""
    return _assemble(job, fabric)[:3]


def _assemble(job: Job, fabric=None):
    """… and the stack of seeds, or None (runner/seeds.py)."""
    import torch

    from runner.draws import Draws
    from runner.loop import seed_everything
    from runner.memory import Memory

    rank = fabric.global_rank if fabric else 0
    device = fabric.device if fabric else torch.device("cpu")
    seed, seeds, stack = job.config["seed"], seeds_of(job), None
    seed_everything(seed)
    method, world = build(job, device)
    if len(seeds) > 1:
        from runner.seeds import Stack

        if job.config["hardware"]["devices"] != 1 or job.config["loop"]["select"] != "last":
            raise UserError("hardware.seeds trains on one device and keeps the last weights: it does not go with "
                            "hardware.devices or loop.select=best")
        stack = Stack(lambda: _method(job), world.spec(), seeds)
        method = stack.method
        seed_everything(seed)
    else:
        method.setup(world.spec())
    method.planned, method.seed = job.config["loop"]["steps"], seed
    method.processes = (rank, fabric.world_size if fabric else 1)
    method.remembered = Memory(job.config["hardware"]["precision"], rank == 0)
    if fabric is not None and job.config["hardware"]["precision"] != "32-true":
        method.autocast = fabric.autocast  # for what a method computes before training, too
    method.to(device)
    if job.config["hardware"]["compile"]:
        method.compile_networks()
    if fabric is not None and fabric.world_size > 1:
        from runner.parallel import share
        share(method, fabric, job.config["hardware"]["strategy"])
    method.make_optimizers()
    # Anew, so that exploration does not depend on how many networks were built; every rank sees its own data and noise.
    seed_everything(seed + 7919 * rank)
    own = seeds if stack else seed + 7919 * rank
    method.draws = Draws(own, device)
    stream = world.stream(method, catalogue.stream_kind(job.methods, job.env), own)
    data = stream.data()
    if data is not None:
        replaced = method.prepare(data)
        if replaced is not None:
            stream.replace(replaced)
        if fabric is not None and fabric.world_size > 1:  # rank 0's statistics for all
            for buffer in method.buffers():
                buffer.copy_(fabric.broadcast(buffer, 0))
    return method, world, stream, stack


def execute(job: Job, *, force=False, fork=False, quiet=False, command="", fabric=None) -> dict:
    """Run a job here, in this process (one rank of it). Returns the run's record (run.json)."""
    rank, several = (fabric.global_rank, fabric.world_size > 1) if fabric else (0, False)
    check_hardware(job.config)
    if rank == 0:
        _check_members(job)
    found = locate(job, force, fork) if rank == 0 else None
    folder, run = fabric.broadcast(found, 0) if several else found  # one decision, rank 0's
    if run is not None and run.get("batch", {}).get("diverged"):
        raise _diverged(job, run)
    if run is not None and run["status"] == "done":
        return {**run, "folder": str(folder), "already": True} if rank == 0 else {}
    records.require_space(folder)
    if not several:  # the processes of one run find it made (cli._run)
        datasets.ensure(job, quiet)
    os.environ.setdefault("OMP_NUM_THREADS", str(job.config["hardware"]["threads"]))
    import torch

    torch.set_num_threads(job.config["hardware"]["threads"])
    check_hardware(job.config)
    began = time.monotonic()
    if fabric is None:
        fabric = make_fabric(job.config["hardware"])
    try:
        parts = _assemble(job, fabric)
    except UserError:
        raise
    except Exception as error:  # in the code of a method or a world
        if rank:
            raise Failed(f"rank {rank}: {type(error).__name__}: {error}") from error
        folder.mkdir(parents=True, exist_ok=True)
        record = Record(folder)
        record.write(id=job.id, name=folder.name, config=job.config, seed=job.config["seed"], command=command)
        raise _failed(record, error) from error

    if rank == 0:
        if force and Lock(folder).holder() is None:  # only now: what was asked for can be built, and nobody has come
            for old in [folder, *(folder_of(member) for member in member_jobs(job)[1:])]:
                shutil.rmtree(old, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder).acquire()
    fabric.barrier()
    try:
        return _train(job, folder, fabric, *parts, quiet, command, began)
    finally:
        if rank == 0:
            lock.release()


def _check_members(job: Job):
    """Seeds trained together end together: refuse a batch of seeds that overlaps with another of the same length."""
    first = job.config["seed"]
    for member in member_jobs(job) if job.config["hardware"]["seeds"] > 1 else []:
        run = Record(folder_of(member)).read() or {}
        if run.get("batch", {}).get("first", first) != first:
            raise UserError(f"seed {member.config['seed']} has been trained in another batch of {len(seeds_of(job))} seeds, "
                            f"which began with seed {run.get('batch', {}).get('first')}: {folder_of(member)}\n"
                            "choose seeds that do not overlap, or another hardware.seeds")


def _diverged(job: Job, run: dict) -> Failed:
    """What is said of a batch of seeds that was trained to its end and of which some diverged. The same command does not
    train it again: the healthy seeds are done, and the others would only diverge once more."""
    folders = {str(member.config["seed"]): folder_of(member) for member in member_jobs(job)}
    lost = run["batch"]["diverged"]
    done = [seed for seed in folders if seed not in lost]
    lines = [f"NonFinite: seed {seed}: {told}\nfolder: {folders[seed]}" for seed, told in lost.items()]
    return Failed("\n".join(lines) + f"\n{'seeds ' + ', '.join(done) + ' are' if done else 'no seed is'} done; --force trains "
                  "all of them again from nothing")


def make_fabric(hardware: dict):
    """Lightning Fabric for one device, or for this rank of a launched group (torchrun's variables tell)."""
    import logging

    from runner.fabric import fabric_class

    for name in ("lightning.fabric", "lightning.pytorch", "lightning.fabric.utilities.rank_zero",
                 "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    devices = int(os.environ.get("WORLD_SIZE", 1))
    strategy = "ddp" if devices > 1 else "auto"
    fabric = fabric_class()(accelerator=hardware["accelerator"], devices=devices, strategy=strategy,
                            precision=hardware["precision"])
    fabric.launch()
    return fabric


def _train(job, folder, fabric, method, world, stream, stack, quiet, command, began) -> dict:
    from runner import capture, pictures
    from runner.checkpoint import Checkpoints
    from runner.loggers import make_loggers
    from runner.loop import Loop, NonFinite, Preempted, whole
    from runner.progress import make_progress
    from runner.settings import Hardware as HardwareSettings
    from runner.settings import Loop as LoopSettings

    rank, settings = fabric.global_rank, LoopSettings(**job.config["loop"])
    hardware = HardwareSettings(**job.config["hardware"])
    record = Record(folder) if rank == 0 else None
    jobs = member_jobs(job)
    every = [record, *(Record(folder_of(j)) for j in jobs[1:])] if record else []  # one record a seed
    graph = capture.possible(method, stream, fabric.device, hardware) and fabric.world_size == 1
    own = folder / "checkpoints" if rank == 0 else folder / "checkpoints" / f"rank{rank}"
    previous = (record.read() or {}) if record else {}
    stop = Stop()
    progress = make_progress(job, settings.steps, quiet) if record else None
    loop = Loop(method, world, stream, settings, seed=job.config["seed"], record=record,
                checkpoints=Checkpoints(own, settings.keep), fabric=fabric, progress=progress, stop=stop, stack=stack,
                records=every, graph=graph)

    def note(what, **more):
        for one in every:
            one.event(what, **more)

    if record:
        shared = {"status": "running", "error": None, "command": command or previous.get("command", ""),
                  "versions": records.versions(), **records.commit(catalogue.ROOT), "device": str(fabric.device),
                  "world_size": fabric.world_size, "graph": graph, "started": previous.get("started", records.now()),
                  "attempts": previous.get("attempts", 0) + 1}
        if world.provenance():
            shared["data"] = world.provenance()
        begun = next((m.begun_from for m in method.modules() if hasattr(m, "begun_from")), None)
        if begun:
            shared["begun_from"] = begun  # the path alone does not say which weights lay there
        if stack:
            shared["batch"] = {"first": job.config["seed"], "seeds": len(jobs), "state": folder.name}
        for one, member in zip(every, jobs):
            one.folder.mkdir(parents=True, exist_ok=True)
            (one.folder / "traceback.txt").unlink(missing_ok=True)  # of an earlier attempt
            one.write(id=member.id, name=one.folder.name, config=member.config, seed=member.config["seed"], **shared)
    spent = previous.get("seconds", 0.0)
    try:
        with stop:
            for told in loop.resume():
                (progress or _Silent).say(told)
                note("resumed", told=told)
            loop.loggers = make_loggers(job, folder) if record else []
            note("started", step=loop.step, pid=os.getpid())
            if progress:
                progress.start(loop.step)
            try:
                loop.run()
                chosen = loop.select()
                final = loop.evaluate()
                references = world.references(job.config["seed"])
                if record and not stack:
                    pictures.write(folder, loop.pictures())
            finally:
                if progress:
                    progress.stop()
                for logger in loop.loggers:
                    logger.close(sys.exc_info()[0] is None and 0 not in loop.diverged)
        weights = whole(dict(method.state_dict()))  # every rank takes part
        if record is None:
            return {}
        ended = {"seconds": spent + time.monotonic() - began}
        if loop.diverged:
            ended["batch"] = {**shared["batch"], "diverged": {str(jobs[i].config["seed"]): told
                                                              for i, (_, told) in sorted(loop.diverged.items())}}
        for i in reversed(range(len(every))):  # the first last: it is the one that says that all have ended
            if i in loop.diverged:
                step, told = loop.diverged[i]
                _failed(every[i], NonFinite(told), step=step, **ended)
                continue
            _save_weights(stack.slice(weights, i) if stack else weights, every[i].folder, jobs[i], chosen, method.kind)
            every[i].event("done", step=loop.step)
            every[i].write(status="done", step=loop.step, evaluated_step=chosen, metrics=final[i], references=references,
                           finished=records.now(), metric_meaning={k: list(m) for k, m in world.metrics.items()
                                                                   if k in final[i]}, **ended)
        out = record.read()
        if loop.diverged:
            raise _diverged(job, out)
        return {**out, "folder": str(folder)}
    except Failed:  # written down already
        raise
    except Preempted:
        note("preempted", step=loop.step, signal=stop.signal)
        for one in every:
            one.write(status="preempted", step=loop.step, seconds=spent + time.monotonic() - began)
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # no traceback could be written
            raise UserError(f"the disk is full at {folder} (step {loop.step:,}); what is saved stands\n"
                            "make room, and the same command continues from the last checkpoint") from None
        if record is None:  # rank 0 tells; the others' tracebacks say the same
            raise Failed(f"rank {rank}: {type(error).__name__}: {error}") from error
        failed = [_failed(one, error, step=loop.step, seconds=spent + time.monotonic() - began) for one in every][0]
        if isinstance(error, UserError):
            raise
        raise failed from error
    finally:
        for one in every:
            one.close()


def _failed(record: Record, error: Exception, **more) -> Failed:
    """Write down that the run failed and why."""
    path = record.folder / "traceback.txt"
    path.write_text("".join(traceback.format_exception(error)))
    record.event("failed", error=repr(error), step=more.get("step", 0))
    record.write(status="failed", error=repr(error), **more)
    return Failed(f"{type(error).__name__}: {error}\nthe full traceback: {path}")


class _Silent:
    @staticmethod
    def say(text):
        pass


def _save_weights(weights: dict, folder: Path, job: Job, step: int, kind: str):
    """weights.safetensors: the evaluated weights, whole; what `eval`, `export` and `video` read."""
    from safetensors.torch import save_file

    tensors = {k: v.detach().to("cpu").contiguous().clone() for k, v in weights.items()}
    temporary = folder / ".weights.tmp"
    # One key: safetensors writes several in no fixed order, and the file should be the same to the bit.
    save_file(tensors, temporary, metadata={"run": json.dumps({"id": job.id, "method": job.config["method"]["name"],
                                                               "step": step, **({"kind": kind} if kind else {})})})
    os.replace(temporary, folder / "weights.safetensors")


class Stop:
    """While active, SIGTERM and SIGINT ask the loop to save and stop; a second SIGINT breaks off at once."""

    def __init__(self):
        self.signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    def __enter__(self):
        self._old = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._old[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread (a test runner)
                pass
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number, _frame):
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


# ---- after training ---------------------------------------------------------------------------------------------------

def load_run(folder: Path, book, overrides: list[str] = ()):
    """(job, method, world) of a finished run with its weights in place; `overrides` may name another env."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from runner.compose import compose, rebuild

    run = Record(folder).read()
    weights = folder / "weights.safetensors"
    if run["status"] != "done" or not weights.is_file():
        raise UserError(f"run {folder.name} is {run['status']}: it has no final weights yet\n"
                        f"finish it with the same command: {run.get('command') or '(not recorded)'}")
    try:
        job = rebuild(run["config"], book)
    except UserError as error:
        raise UserError(f"{error}\nthe run was made by: {run.get('command') or '(not recorded)'}\n"
                        "methods and envs of your own need --include DIR here, too") from None
    if overrides:
        unchanged = [w for w in overrides if w.startswith("env=") or w.startswith("env.")]
        if len(unchanged) != len(overrides):
            raise UserError("only env=NAME and env.KEY=VALUE can be given here; the method is the run's own")
        name = next((w for w in overrides if w.startswith("env=")), f"env={job.config['env']['name']}")
        words = [f"method={job.config['method']['name']}", name, f"size={job.config['size']}"]
        if name == f"env={job.config['env']['name']}":
            words += [f"env.{k}={json.dumps(v)}" for k, v in job.config["env"].items() if k != "name"]
        job = compose([*words, *(w for w in overrides if w.startswith("env."))], book)
        job.config["method"], job.config["seed"] = run["config"]["method"], run["config"]["seed"]
    job.config["hardware"] = {**job.config["hardware"], "seeds": 1}
    torch.set_num_threads(job.config["hardware"]["threads"])
    datasets.ensure(job, quiet=True)
    method, world, _ = assemble(job)
    try:
        tensors = load_file(weights)
        method.load_state_dict(tensors)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights} cannot be read: {error}") from None
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise UserError(f"the weights of {folder.name} do not fit env '{job.config['env']['name']}':\n"
                        + "\n".join(lines[1:3])) from None
    method.eval()
    return job, method, world
