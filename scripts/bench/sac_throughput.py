"""SAC on HalfCheetah-v5 on one core: environment steps a second, ours beside Stable-Baselines3, equal settings.

Ours: method sac as a run makes it (loop, stream, records). SB3: its SAC as it comes. Both: one environment, one update of
critics, actor, temperature and targets a step, batch 256, Adam 3e-4 throughout, gamma 0.99, tau 0.005, two critics, target
entropy -A, the same widths. Learning has begun before the clock does. The two sides take turns; the ratio is of CPU seconds.

Targets: at least 1.2 times SB3's steps a second at 256 256, 1.5 times at 64 64.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import _common as common

ENV = "HalfCheetah-v5"
TARGETS = {(256, 256): 1.2, (64, 64): 1.5}


class Theirs:
    def __init__(self, hidden, capacity: int, start: int):
        from stable_baselines3 import SAC

        self.model = SAC("MlpPolicy", ENV, learning_rate=3e-4, buffer_size=capacity, learning_starts=start, batch_size=256,
                         tau=0.005, gamma=0.99, train_freq=1, gradient_steps=1, ent_coef="auto", target_entropy="auto",
                         policy_kwargs={"net_arch": list(hidden)}, device="cpu", seed=0)
        self.model.learn(start, log_interval=4)  # random actions, no update yet

    def train(self, steps: int):
        self.model.learn(steps, reset_num_timesteps=False, log_interval=4)


def measure(hidden, a, folder: Path) -> dict:
    from _training import Training

    widths = f"[{','.join(map(str, hidden))}]"
    ours = Training(folder, "method=sac", "env=halfcheetah", "hardware=cpu", f"method.hidden={widths}",
                    "method.learning_rate=3e-4", "env.batch_size=256", f"env.capacity={a.capacity}",
                    f"env.start_steps={a.start_steps}", f"loop.log_every={a.log_every}")
    sides = {"ours": ours} if a.alone else {"ours": ours, "sb3": Theirs(hidden, a.capacity, a.start_steps)}
    for side in sides.values():
        side.train(a.steps // 3)  # fill, begin to learn, warm
    before = ours.stream.env_steps
    clocks = common.interleave({n: (lambda s=s: s.train(a.steps)) for n, s in sides.items()}, a.repeats,
                               say=lambda c: f"{a.steps / c.cpu:.0f} steps/s")
    assert ours.stream.env_steps - before == a.steps * a.repeats
    out = {"hidden": list(hidden), "steps_per_second": {n: a.steps / common.middle(c, "cpu") for n, c in clocks.items()}}
    return out | ({} if a.alone else {"ratio": common.ratios(clocks["sb3"], clocks["ours"])})


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--hidden", type=int, nargs="+", action="append", metavar="WIDTH",
                        help="widths of the hidden layers; may be given again (default: 256 256 and 64 64)")
    parser.add_argument("--steps", type=int, default=600, help="steps of one repeat")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--start-steps", type=int, default=1000, help="random steps before learning")
    parser.add_argument("--capacity", type=int, default=1_000_000)
    parser.add_argument("--log-every", type=int, default=500)
    parser.add_argument("--alone", action="store_true", help="ours only, without stable-baselines3")
    a = parser.parse_args()
    common.one_thread()
    if not a.alone:
        try:
            import stable_baselines3  # noqa: F401
        except ImportError:
            sys.exit("stable-baselines3 is not installed, so there is nothing to compare with\n"
                     "install it: pip install stable-baselines3\nor measure ours only: --alone")
    results, good = [], True
    with tempfile.TemporaryDirectory() as folder:
        for number, hidden in enumerate(a.hidden or [[256, 256], [64, 64]]):
            results.append(measure(tuple(hidden), a, Path(folder) / str(number)))
    print(f"{a.repeats} x {a.steps} steps a side and width, interleaved")
    common.table(["hidden", "side", "CPU median steps/s"],
                 [["x".join(map(str, r["hidden"])), n, v] for r in results for n, v in r["steps_per_second"].items()])
    if not a.alone:
        print("\nours / sb3, steps a second")
        common.table(["hidden", *results[0]["ratio"]], [["x".join(map(str, r["hidden"])), *r["ratio"].values()] for r in results])
        for r in results:
            target = TARGETS.get(tuple(r["hidden"]))
            if target:
                good &= common.verdict(f"ours / sb3 at {r['hidden']} (CPU, paired median)", r["ratio"]["cpu_paired"],
                                       target, most=False)
    common.write_json(a.json, {"settings": vars(a), "figures": results, "ok": good})
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
