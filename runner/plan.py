"""Grids of runs: a sweep expands into runs, each a process of its own in a slot (CPU cores or one GPU each).

Hydra's own multirun is not used: it runs everything in one process, where random state, signals and loggers leak from
run to run. A sweep can be stopped and given again: finished runs are not run twice, others continue.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from runner import record as records
from runner.compose import Job, compose, expand
from runner.errors import UserError
from runner.record import Record
from runner.run import check_hardware, folder_of


def slots(job: Job) -> list[dict]:
    """Environment variables of each slot: one per GPU where the job uses one, else one per `threads` cores."""
    hardware = job.config["hardware"]
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*"))) if hardware["accelerator"] in ("auto", "gpu") else 0
    if hardware["devices"] != 1:
        return [{}]
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": str(i)} for i in range(gpus)]
    return [{} for _ in range(max(1, len(os.sched_getaffinity(0)) // hardware["threads"]))]


def plan(words: list[str], book) -> list[tuple[list[str], Job]]:
    """The runs of a sweep, all of them checked before one starts; runs with the same identity appear once."""
    jobs: dict[str, tuple] = {}
    for combination in expand(words):
        job = compose(combination, book)
        check_hardware(job.config)
        jobs.setdefault(str(folder_of(job)), (combination, job))
    return list(jobs.values())


def sweep(words: list[str], options: dict) -> int:
    from runner.catalogue import Catalogue
    from runner.report import print_results

    if options.get("fork"):
        raise UserError("--fork works on one run, not on a sweep")
    planned = plan(words, Catalogue(options["include"]))
    first = planned[0][1]
    available = slots(first)
    if "jobs" in options:
        try:
            wanted = int(options["jobs"])
        except ValueError:
            raise UserError(f"--jobs needs a whole number, not '{options['jobs']}'") from None
        if wanted < 1:
            raise UserError("--jobs must be at least 1")
        available = [available[i % len(available)] for i in range(wanted)]
    records.require_space(Path(first.config["runs"]))
    flags = [f"--include={d}" for d in options["include"]] + (["--force"] if options.get("force") else [])
    left = planned if options.get("force") else [p for p in planned if not _is_done(p[1])]
    failed = execute(left, available, flags, say=lambda text: print(text, file=sys.stderr, flush=True))
    names = [folder_of(job).name for _, job in planned]
    print_results(Path(first.config["runs"]), [], bool(options.get("json")), only=names)
    if failed:
        print(f"{failed} of {len(planned)} runs did not finish; `python -m runner status` shows which", file=sys.stderr)
    return 1 if failed else 0


def _is_done(job: Job) -> bool:
    try:
        run = Record(folder_of(job)).read() or {}
    except UserError:
        return False
    # A batch of seeds of which one diverged is given again: it ends at once, by saying so.
    return run.get("status") == "done" and not run.get("batch", {}).get("diverged")


def execute(planned, available: list[dict], flags: list[str], say) -> int:
    """Run every planned job in the free slots. Returns how many did not end well."""
    waiting, running, failed, number = list(planned), {}, 0, 0
    for _, job in planned:
        folder = folder_of(job)
        if not (folder / "run.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            Record(folder).write(id=job.id, name=folder.name, status="planned", config=job.config,
                                 seed=job.config["seed"])
    free = list(range(len(available)))

    def stop(*_):
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGTERM, stop)  # a sweep that is stopped stops its runs; they save their state
    try:
        while waiting or running:
            while waiting and free:
                words, job = waiting.pop(0)
                slot, folder, number = free.pop(0), folder_of(job), number + 1
                with open(folder / "output.log", "a") as log:
                    process = subprocess.Popen([sys.executable, "-m", "runner", *words, *flags], stdout=log,
                                               stderr=subprocess.STDOUT, env={**os.environ, **available[slot]})
                running[process] = (slot, folder, time.monotonic())
                say(f"[{number}/{len(planned)}] {folder.name}")
            time.sleep(0.05)
            for process in [p for p in running if p.poll() is not None]:
                slot, folder, began = running.pop(process)
                free.append(slot)
                if process.returncode:
                    failed += 1
                    tail = (folder / "output.log").read_text().strip().splitlines()[-2:] if \
                        (folder / "output.log").exists() else []
                    say(f"{folder.name} ended with code {process.returncode}: " + " | ".join(tail))
                else:
                    say(f"{folder.name} done in {time.monotonic() - began:.0f} s")
    except KeyboardInterrupt:
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, old)
    return failed
