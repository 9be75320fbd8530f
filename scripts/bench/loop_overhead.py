"""What the training loop costs beside a bare PyTorch loop that does the same arithmetic.

Ours: runner.loop.Loop with a Record that writes metrics.jsonl (every 10th step by default), Lightning Fabric as a run
makes it, a Method and a Stream. Bare: the same batches, zero_grad, backward and fused Adam step, and no logging at all.
Both train a 17-64-64-6 MLP by mean squared error on batches of 64 and must end with the same weights, bit for bit.

Target: at most 1.20 times the bare loop's CPU seconds.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path

import _common as common
import torch
import torch.nn.functional as F

from runner.checkpoint import Checkpoints
from runner.interface import Method, Stream, World, knob
from runner.loop import Loop
from runner.record import Record, lines
from runner.run import make_fabric
from runner.settings import Hardware
from runner.settings import Loop as Settings

INPUTS, HIDDEN, OUTPUTS, BATCH, ROWS, RATE = 17, 64, 6, 64, 4096, 1e-3


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    nn = torch.nn
    return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUTPUTS))


def table() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, INPUTS, generator=generator)
    return x, torch.tanh(x @ torch.randn(INPUTS, OUTPUTS, generator=generator))


class Regression(Method):
    @dataclasses.dataclass(frozen=True)
    class Config:
        learning_rate: float = knob(RATE, "Adam's", low=0.0)

    def setup(self, spec):
        self.net = network()

    def make_optimizers(self):
        self.optimizers = {"net": torch.optim.Adam(self.net.parameters(), lr=self.config.learning_rate, fused=True)}

    def update(self, batch):
        loss = F.mse_loss(self.net(batch["x"]), batch["y"])
        self.minimise(loss, "net")
        return {"loss": loss.detach()}


class Batches(Stream):
    def __init__(self):
        self.x, self.y = table()
        self.generator = torch.Generator().manual_seed(2)

    def next(self):
        index = torch.randint(ROWS, (BATCH,), generator=self.generator)
        return {"x": self.x.index_select(0, index), "y": self.y.index_select(0, index)}


class Ours:
    def __init__(self, folder: Path, log_every: int):
        method = Regression(Regression.Config())
        method.setup(None)
        method.make_optimizers()
        folder.mkdir(parents=True, exist_ok=True)
        self.record = Record(folder)
        hardware = dataclasses.asdict(Hardware(accelerator="cpu"))
        self.loop = Loop(method, World(None), Batches(), Settings(steps=1, log_every=log_every), seed=0, record=self.record,
                         checkpoints=Checkpoints(folder / "checkpoints", 2), fabric=make_fabric(hardware))
        self.loop.resume()
        self.net = method.net

    def train(self, steps: int):
        self.loop.settings = dataclasses.replace(self.loop.settings, steps=self.loop.step + steps)
        self.loop.run()


class Bare:
    def __init__(self):
        self.net = network()
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=RATE, fused=True)
        self.x, self.y = table()
        self.generator = torch.Generator().manual_seed(2)

    def train(self, steps: int):
        net, optimizer, x, y, generator = self.net, self.optimizer, self.x, self.y, self.generator
        for _ in range(steps):
            index = torch.randint(ROWS, (BATCH,), generator=generator)
            loss = F.mse_loss(net(x.index_select(0, index)), y.index_select(0, index))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--steps", type=int, default=2000, help="steps of one repeat")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--target", type=float, default=1.20)
    a = parser.parse_args()
    common.one_thread()
    with tempfile.TemporaryDirectory() as folder:
        ours, bare = Ours(Path(folder), a.log_every), Bare()
        for side in (ours, bare):
            side.train(a.steps // 2)  # warm
        clocks = common.interleave({"ours": lambda: ours.train(a.steps), "bare": lambda: bare.train(a.steps)}, a.repeats)
        logged = len(lines(ours.record.metrics_path))
        ours.record.close()
    same = all(torch.equal(p, q) for p, q in zip(ours.net.parameters(), bare.net.parameters()))
    if not same:
        sys.exit("the two loops did not do the same arithmetic: their weights differ")
    micro = {n: {f"{w}_{k}": f(c, w) / a.steps * 1e6 for w in ("cpu", "wall") for k, f in
                 (("min", common.least), ("median", common.middle))} for n, c in clocks.items()}
    ratio = common.ratios(clocks["ours"], clocks["bare"])
    print(f"{a.repeats} x {a.steps} steps a side, interleaved; {logged} lines in metrics.jsonl; equal weights: {same}")
    head = ["us a step", "CPU min", "CPU median", "wall min", "wall median"]
    common.table(head, [[n, *m.values()] for n, m in micro.items()]
                 + [["ratio", *(ratio[k] for k in ("cpu_min", "cpu_median", "wall_min", "wall_median"))]])
    print(f"median of the ratios repeat by repeat: CPU {ratio['cpu_paired']:.3f}, wall {ratio['wall_paired']:.3f}")
    good = common.verdict("CPU of our loop / bare loop (paired median)", ratio["cpu_paired"], a.target, most=True)
    common.write_json(a.json, {"steps": a.steps, "repeats": a.repeats, "log_every": a.log_every, "lines_logged": logged,
                               "microseconds": micro, "ratio": ratio, "target": a.target, "ok": good})
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
