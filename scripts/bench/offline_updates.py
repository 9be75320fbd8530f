"""Updates a second of offline methods, on the GPU where there is one: one seed, and several at once.

The loop, the stream and the records as a run has them; S = 17, A = 6, a million transitions on the device, batch 256, the
methods' own networks (256 x 256). Learning has begun and graphs are recorded before the clock starts; a repeat ends with a
synchronisation. Seed-updates are updates times seeds.

The floor of td3_bc counts, per update and seed: multiply-adds of all matrix products against the rate of one large float32
product, and the bytes of parameters, gradients, Adam's moments and targets, each read and written once, against the rate
of a device copy. The larger of the two is stated.

Targets on one H100: td3_bc 3,000 updates/s with 1 seed, 15,000 seed-updates/s with 10, 30,000 with 64; prdc 800 updates/s.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import _common as common
import torch

TARGETS = {("td3_bc", 1): 3000, ("td3_bc", 10): 15_000, ("td3_bc", 64): 30_000, ("prdc", 1): 800}


def ceilings(device) -> tuple[float, float]:
    """(float32 multiply-adds a second of one large product, bytes a second of a copy, reads and writes counted)"""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    big = torch.empty((256 if device.type == "cuda" else 16) * 2**20, device=device)
    other = torch.empty_like(big)

    def clock(f, number):
        f()
        best = float("inf")
        for _ in range(5):
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(number):
                f()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, (time.perf_counter() - began) / number)
        return best

    return n ** 3 / clock(lambda: torch.mm(a, b), 3), 2 * big.numel() * 4 / clock(lambda: other.copy_(big), 3)


def work(s=17, a=6, h=256, batch=256) -> tuple[float, float]:
    """(multiply-adds, bytes) of one td3_bc update of one seed, actor updates counted half."""
    actor = [s * h, h * h, h * a]
    critic = [(s + a) * h, h * h, h]
    macs = batch * (sum(actor) + 2 * sum(critic)                          # target
                    + 2 * (2 * sum(critic) + sum(critic[1:]))             # critics: forward, weights, inputs
                    + 0.5 * (2 * sum(actor) + sum(actor[1:]) + 2 * sum(critic)))  # actor, through Q_1
    sizes = sum(actor) + 2 * h + a, 2 * (sum(critic) + 2 * h + 1)
    step = 4 * 9        # gradient written and read; parameter, two moments read and written; read once more by the forward
    average = 4 * 3     # target read and written, parameter read
    return macs, (0.5 * sizes[0] + sizes[1]) * step + 0.5 * (sizes[0] + sizes[1]) * average


def measure(case: str, eager: bool, a) -> dict:
    from _training import Training

    method, _, seeds = case.partition(":")
    with tempfile.TemporaryDirectory() as folder:
        side = Training(Path(folder), f"method={method}", "env=random_data", "size=paper", "loop.log_every=1000",
                        f"hardware.seeds={seeds}", f"hardware.graph={not eager}", *a.overrides)
        side.train(100)
        began = time.perf_counter()
        side.train(100)
        steps = max(100, int(a.seconds / (time.perf_counter() - began)) * 100)
        clocks = common.interleave({case: lambda: side.train(steps)}, a.repeats)[case]
    rate, cuda = steps / common.middle(clocks, "wall"), side.device.type == "cuda"
    memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    return {"method": method, "graph": not eager, "seeds": side.seeds, "updates_per_second": rate,
            "seed_updates_per_second": rate * side.seeds, "peak_GiB": memory}


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--cases", nargs="+", default=["td3_bc:1", "td3_bc:10", "td3_bc:64", "prdc:1"], metavar="METHOD:SEEDS")
    parser.add_argument("--seconds", type=float, default=3.0, help="about the length of one repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="also without graphs")
    parser.add_argument("overrides", nargs="*", help="further settings, such as env.rows=100000")
    a = parser.parse_args()
    common.one_thread()
    results, good, rows = [], True, []
    for case in a.cases:
        for eager in (False, True) if a.eager else (False,):
            result = measure(case, eager, a)
            rows.append([case + (" eager" if eager else ""), *list(result.values())[-3:]])
            results.append(result)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    macs, traffic = ceilings(device)
    need, moved = work()
    floor = max(need / macs, moved / traffic)
    print(f"device: {torch.cuda.get_device_name() if device.type == 'cuda' else common.cpu_model()}")
    common.table(["case", "updates/s", "seed-updates/s", "peak GiB"], rows)
    print(f"\ntd3_bc, one seed's update: {need / 1e6:.1f} M multiply-adds at {macs / 1e12:.1f} T/s = {need / macs * 1e6:.1f} us; "
          f"{moved / 1e6:.2f} MB at {traffic / 1e12:.2f} TB/s = {moved / traffic * 1e6:.1f} us; "
          f"floor {1 / floor:,.0f} seed-updates/s")
    for r in results:
        target = TARGETS.get((r["method"], r["seeds"]))
        if target and r["graph"] and device.type == "cuda":
            good &= common.verdict(f"{r['method']}, {r['seeds']} seeds: seed-updates/s", r["seed_updates_per_second"], target,
                                   most=False)
    common.write_json(a.json, {"figures": results, "floor_seed_updates_per_second": 1 / floor, "ok": good})
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
