"""What a person sees while a run trains: a live line with rate, time left and the main figures, or plain lines."""

from __future__ import annotations

import sys
import time

REFRESH = 0.2    # seconds between redraws on a terminal
PLAIN = 10.0     # seconds between lines elsewhere


def make_progress(job, steps: int, quiet: bool):
    title = f"{job.config['method']['name']} on {job.config['env']['name']}"
    if quiet:
        return Quiet()
    return Live(title, steps) if sys.stderr.isatty() else Plain(title, steps)


def span(seconds: float) -> str:
    """1:02:03 or 2:03"""
    seconds = int(max(0, seconds))
    h, m, s = seconds // 3600, seconds // 60 % 60, seconds % 60
    return f"{h}:{m:02d}:{s:02d}" if h else f"{m}:{s:02d}"


def figures(line: dict, most: int = 4) -> str:
    shown = [(k, v) for k, v in line.items() if k != "step" and isinstance(v, (int, float))]
    return "  ".join(f"{k.removeprefix('eval/')} {v:,}" if isinstance(v, int) else f"{k.removeprefix('eval/')} {v:.4g}"
                     for k, v in shown[:most])


class Quiet:
    def start(self, step): pass
    def update(self, line): pass
    def say(self, text): pass
    def stop(self): pass


class Plain:
    """Lines for a log file: one at the start, one every ten seconds, one at the end."""

    def __init__(self, title: str, steps: int):
        self.title, self.steps, self.line = title, steps, {}

    def say(self, text):
        print(text, file=sys.stderr, flush=True)

    def start(self, step):
        self.began, self.first, self.told = time.monotonic(), step, time.monotonic()
        self.say(f"{self.title}: step {step:,} of {self.steps:,}")

    def rate(self, step) -> float:
        return (step - self.first) / max(time.monotonic() - self.began, 1e-9)

    def text(self) -> str:
        step = self.line.get("step", self.first)
        rate = self.rate(step)
        left = span((self.steps - step) / rate) if rate > 0 else "?"
        return f"{step:,}/{self.steps:,}  {rate:,.0f} steps/s  {left} left  {figures(self.line)}"

    def update(self, line):
        self.line = line
        if time.monotonic() - self.told >= PLAIN:
            self.told = time.monotonic()
            self.say(self.text())

    def stop(self):
        if self.line:
            self.say(self.text())


class Live(Plain):
    """A rich live display: bar, rate, time left, main figures."""

    def start(self, step):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        self.began, self.first, self.told = time.monotonic(), step, 0.0
        self.bar = Progress(TextColumn("[bold]{task.description}"), BarColumn(), TaskProgressColumn(),
                            TextColumn("{task.fields[rate]}"), TextColumn("{task.fields[figures]}"),
                            console=Console(stderr=True), auto_refresh=False)
        self.task = self.bar.add_task(self.title, total=self.steps, completed=step, rate="", figures="")
        self.bar.start()

    def _draw(self):
        step = self.line.get("step", self.first)
        rate = self.rate(step)
        left = span((self.steps - step) / rate) if rate > 0 else "?"
        self.bar.update(self.task, completed=step, rate=f"{rate:,.0f} steps/s  {left} left", figures=figures(self.line),
                        refresh=True)

    def update(self, line):
        self.line = line
        if time.monotonic() - self.told >= REFRESH:
            self.told = time.monotonic()
            self._draw()

    def stop(self):
        if self.line:
            self._draw()
        self.bar.stop()
