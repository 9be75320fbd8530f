"""Speed of generators on the GPU where there is one: Flow-GRPO's update captured and not, a DiT's training and sampling.

    python scripts/bench/diffusion.py [policy] [dit] [--steps N] [--shapes 12x768x64 12x768x256 7x1024x64] [--peer]

policy: flow_grpo on env=ring at size=claim through the loop (rollouts, 16 optimiser steps), recorded in CUDA graphs and update
by update; seconds of an update each, medians of repeats that take turns. Target: 20 times.

dit: diffusion transformers of about 130 million parameters at 32 x 32 x 4, patches of 2, bf16 autocast, captured, with
hardware.compile's fused kernels; a shape is depth x width x batch, and 12x768 is DiT-B/2. A training step of flow_matching with
its optimiser, and 50 ODE steps of generation; --peer: the same with torch.compile of the whole network. Model FLOPs are twice the
multiply-adds of matrices and attention (methods/diffusion/dit.py), times 3 in training; MFU is their share of the card's dense
bf16 peak (989 TFLOP/s on an H100 or H200), beside what one large bf16 product reaches there: the matmul floor. Target: 45 % in
training.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time

import _common as common  # noqa: F401  (puts the project on the path)
import torch

from methods.diffusion.dit import DiTPolicy
from methods.diffusion.flow_matching import FlowMatching
from runner.capture import Graphs
from runner.draws import Draws
from runner.interface import Spec, Stream

PEAK = 989e12


def now(device) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def clock(f, repeats: int, device) -> float:
    """Median seconds of a call, after three."""
    for _ in range(3):
        f()
    out = []
    for _ in range(repeats):
        began = now(device)
        f()
        out.append(now(device) - began)
    return statistics.median(out)


def policy(device: str, repeats: int = 5, updates: int = 10):
    from runner.catalogue import Catalogue
    from runner.compose import compose
    from runner.loop import Loop
    from runner.run import _assemble, make_fabric
    from runner.settings import Loop as Settings

    loops = {}
    kinds = (("captured and compiled", True, "true"), ("captured", True, "false"), ("eager", False, "false"))
    for name, graph, compiled in kinds:
        if device == "cpu" and graph:
            continue
        hardware = "gpu" if device == "cuda" else "cpu"
        job = compose(["method=flow_grpo", "env=ring", "logger=none", f"hardware={hardware}", f"hardware.compile={compiled}"],
                      Catalogue())
        fabric = make_fabric(job.config["hardware"])
        method, world, stream, _ = _assemble(job, fabric)
        settings = Settings(steps=10 ** 6, log_every=10 ** 6)
        loops[name] = Loop(method, world, stream, settings, seed=0, fabric=fabric, graph=graph)

    def advance(loop, number):
        loop.settings = Settings(steps=loop.step + number, log_every=10 ** 6)
        loop.run()

    for loop in loops.values():
        advance(loop, 40)
    times = {name: [] for name in loops}
    for _ in range(repeats):
        for name, loop in loops.items():
            began = now(device)
            advance(loop, updates)
            times[name].append((now(device) - began) / updates)
    eager = statistics.median(times["eager"])
    for name, taken in times.items():
        took = statistics.median(taken)
        print(f"flow_grpo on ring, {name}: {took * 1e3:.2f} ms an update, {eager / took:.1f} times eager", flush=True)


def dit(device: str, steps: int, depth: int, width: int, batch: int, peer: bool, sampling: int = 50):
    spec = Spec(sample_shape=(4, 32, 32), classes=1000)
    method = FlowMatching(FlowMatching.Config(learning_rate=1e-4, sampler_steps=sampling))
    method.blueprint = DiTPolicy(DiTPolicy.Config(width=width, depth=depth, heads=width // 64))
    torch.manual_seed(0)
    method.setup(spec)
    method.to(device)
    if device == "cuda" and peer:
        torch._dynamo.reset()
        method.network.compile()
    elif device == "cuda":
        method.compile_networks()
    method.make_optimizers()
    method.draws = Draws(0, device)
    half = (lambda: torch.autocast("cuda", torch.bfloat16)) if device == "cuda" else contextlib.nullcontext
    method.autocast = half
    x, condition = torch.randn(batch, 4, 32, 32, device=device), torch.arange(batch, device=device)

    class Same(Stream):
        """The same rows at every update, on the device."""

        lookahead, taken = 1, 0

        def ready(self, number):
            pass

        def take(self):
            return {"x": x, "condition": condition}

    def step(batch):
        with half():
            return method.update(batch)

    graphs = Graphs(method, Same(), step)

    def update():
        if device == "cuda":
            graphs.advance(method.updates, 10 ** 9)
        else:
            step({"x": x, "condition": condition})
        method.updates += 1

    flops = 2 * method.network.products(batch)
    parameters = sum(p.numel() for p in method.network.parameters())
    n = 8192 if device == "cuda" else 1024
    one = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    floor = 2 * n ** 3 / clock(lambda: torch.mm(one, one), 10, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(40 if device == "cuda" else 1):  # blocks are compiled, graphs recorded
        update()
    took = clock(update, steps, device)
    memory = torch.cuda.max_memory_allocated() / 2 ** 30 if device == "cuda" else 0
    print(f"DiT {depth} x {width}, {parameters / 1e6:.0f} M parameters, batch {batch}"
          f"{', torch.compile' if peer else ''}: training {took * 1e3:.1f} ms a step, "
          f"{batch / took:,.0f} samples/s, {3 * flops / took / 1e12:.0f} TFLOP/s, MFU {3 * flops / took / PEAK:.1%}; "
          f"a large product reaches {floor / 1e12:.0f} TFLOP/s ({floor / PEAK:.1%}), at which the step's would take "
          f"{3 * flops / floor * 1e3:.1f} ms; peak {memory:.1f} GiB", flush=True)
    took = clock(lambda: method.draw(x, condition), max(3, steps // 10), device)
    print(f"sampling in {sampling} steps: {took:.3f} s a batch, {batch / took:,.1f} samples/s, "
          f"{sampling * flops / took / 1e12:.0f} TFLOP/s, MFU {sampling * flops / took / PEAK:.1%}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["policy", "dit"], choices=["policy", "dit"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--shapes", nargs="*", default=["12x768x64", "12x768x256", "7x1024x64"])
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    if "policy" in a.what:
        policy(a.device)
    if "dit" in a.what:
        for shape in a.shapes:
            dit(a.device, a.steps, *map(int, shape.split("x")), peer=False)
        if a.peer:
            dit(a.device, a.steps, *map(int, a.shapes[0].split("x")), peer=True)


if __name__ == "__main__":
    main()
