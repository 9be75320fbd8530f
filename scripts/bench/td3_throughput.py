"""TD3 on HalfCheetah-v5 on one core: environment steps a second, ours beside Stable-Baselines3, equal settings.

Ours: method td3, the simulator's own replay stream and the loop as a run makes them, writing metrics.jsonl. SB3: its TD3
as it comes. Both: one environment, one update a step, batch 256, Adam 3e-4, gamma 0.99, tau 0.005, actor delay 2, action
noise 0.1, target noise 0.2 clipped at 0.5, the same widths. Learning has begun before the clock does. The two sides take
turns; the ratio is of CPU seconds.

The floor: the multiply-adds of one step at the rate that this core reaches in one large product (torch.mm of
batch x H x H), and the time of all the step's products, each at its own shape. Neither holds any other arithmetic, nor
the simulator, whose time a step is printed beside them.

Targets: at least 1.2 times SB3's steps a second at 256 256, 1.5 times at 64 64.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from pathlib import Path

import _common as common
import numpy as np
import torch

ENV = "HalfCheetah-v5"
TARGETS = {(256, 256): 1.2, (64, 64): 1.5}
SHARED = {"batch_size": 256, "learning_rate": 3e-4, "gamma": 0.99, "tau": 0.005, "policy_delay": 2, "action_noise": 0.1,
          "target_noise": 0.2, "target_noise_clip": 0.5, "envs": 1, "train_freq": 1, "gradient_steps": 1}


class Ours:
    def __init__(self, hidden, capacity: int, start: int, log_every: int, folder: Path):
        from runner.catalogue import Catalogue
        from runner.checkpoint import Checkpoints
        from runner.compose import compose
        from runner.loop import Loop
        from runner.record import Record
        from runner.run import assemble, make_fabric
        from runner.settings import Loop as Settings

        s = SHARED
        job = compose(["method=td3", "env=halfcheetah", "hardware=cpu", "logger=none", f"method.hidden={list(hidden)}",
                       f"method.learning_rate={s['learning_rate']}", f"method.discount={s['gamma']}",
                       f"method.target_rate={s['tau']}", f"method.actor_delay={s['policy_delay']}",
                       f"method.exploration_noise={s['action_noise']}", f"method.target_noise={s['target_noise']}",
                       f"method.target_noise_clip={s['target_noise_clip']}", f"env.batch_size={s['batch_size']}",
                       f"env.copies={s['envs']}", "env.steps_per_update=1", f"env.capacity={capacity}",
                       f"env.start_steps={start}", f"loop.log_every={log_every}"], Catalogue())
        fabric = make_fabric(job.config["hardware"])
        self.method, self.world, self.stream = assemble(job, fabric)
        folder.mkdir(parents=True)
        self.record = Record(folder)
        self.loop = Loop(self.method, self.world, self.stream, Settings(**job.config["loop"]), seed=0, record=self.record,
                         checkpoints=Checkpoints(folder / "checkpoints", 2), fabric=fabric)
        # A checkpoint every 60 seconds is not part of a step's cost, and SB3 saves none.
        self.loop.settings = dataclasses.replace(self.loop.settings, save_seconds=0.0)
        self.loop.resume()

    def train(self, steps: int):
        self.loop.settings = dataclasses.replace(self.loop.settings, steps=self.loop.step + steps)
        self.loop.run()


class Theirs:
    def __init__(self, hidden, capacity: int, start: int):
        from stable_baselines3 import TD3
        from stable_baselines3.common.noise import NormalActionNoise

        s = SHARED
        self.model = TD3("MlpPolicy", ENV, learning_rate=s["learning_rate"], buffer_size=capacity, learning_starts=start,
                         batch_size=s["batch_size"], tau=s["tau"], gamma=s["gamma"], train_freq=s["train_freq"],
                         gradient_steps=s["gradient_steps"], policy_delay=s["policy_delay"],
                         action_noise=NormalActionNoise(np.zeros(6), np.full(6, s["action_noise"])),
                         target_policy_noise=s["target_noise"], target_noise_clip=s["target_noise_clip"],
                         policy_kwargs={"net_arch": list(hidden)}, device="cpu", seed=0)
        self.model.learn(start, log_interval=4)  # random actions, no update yet

    def train(self, steps: int):
        self.model.learn(steps, reset_num_timesteps=False, log_interval=4)


# ---- the floor --------------------------------------------------------------------------------------------------------

def products(inputs: int, actions: int, hidden, batch: int) -> list[tuple[float, int, int, int]]:
    """Every matrix product of one TD3 step, as (how often a step, m, k, n)."""
    actor = list(zip([inputs, *hidden], [*hidden, actions]))
    critic = list(zip([inputs + actions, *hidden], [*hidden, 1]))

    def forward(net, times):
        return [(times, batch, i, o) for i, o in net]

    def weights(net, times):
        return [(times, i, batch, o) for i, o in net]

    def inputs_(net, times):
        return [(times, batch, o, i) for i, o in net]

    out = forward(actor, 1) + forward(critic, 2)                                        # target
    out += forward(critic, 2) + weights(critic, 2) + inputs_(critic[1:], 2)             # critics
    half = 1 / SHARED["policy_delay"]
    out += forward(actor, half) + forward(critic, half)                                 # actor
    out += inputs_(critic[1:], half) + [(half, batch, hidden[0], actions)]              # through Q to the action alone
    return out + weights(actor, half) + inputs_(actor[1:], half)


def seconds_of(m: int, k: int, n: int, budget: float = 0.03) -> float:
    """CPU seconds of one torch.mm (m, k) (k, n): the least over a few rounds."""
    a, b, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
    torch.mm(a, b, out=out)
    began = time.process_time()
    torch.mm(a, b, out=out)
    number = max(3, int(budget / 5 / max(time.process_time() - began, 1e-6)))
    best = float("inf")
    for _ in range(5):
        began = time.process_time()
        for _ in range(number):
            torch.mm(a, b, out=out)
        best = min(best, (time.process_time() - began) / number)
    return best


def floor(hidden) -> dict:
    batch, shapes = SHARED["batch_size"], products(17, 6, hidden, SHARED["batch_size"])
    multiply_adds = sum(t * m * k * n for t, m, k, n in shapes)
    shape = (batch, hidden[0], hidden[-1])
    rate = shape[0] * shape[1] * shape[2] / seconds_of(*shape, budget=0.2)
    known = {s: seconds_of(*s) for s in {s[1:] for s in shapes}}
    return {"multiply_adds": multiply_adds, "rate_shape": shape, "gflops": 2 * rate / 1e9,
            "floor_ms": multiply_adds / rate * 1e3, "products_ms": sum(t * known[tuple(s)] for t, *s in shapes) * 1e3}


def simulator_ms(steps: int = 2000) -> float:
    """CPU milliseconds of one bare simulator step (no wrappers), random torques."""
    from envs.control.copies import make

    env = make(ENV).unwrapped
    env.reset(seed=0)
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, 6))
    began = time.process_time()
    for action in actions:
        env.step(action)
    return (time.process_time() - began) / steps * 1e3


def measure(hidden, a, folder: Path) -> dict:
    ours = Ours(hidden, a.capacity, a.start_steps, a.log_every, folder)
    sides = {"ours": ours}
    if not a.alone:
        sides["sb3"] = Theirs(hidden, a.capacity, a.start_steps)
    for side in sides.values():
        side.train(a.steps // 3)  # fill, begin to learn, warm
    before = ours.stream.env_steps
    clocks = common.interleave({n: (lambda s=s: s.train(a.steps)) for n, s in sides.items()}, a.repeats,
                               say=lambda c: f"{a.steps / c.cpu:.0f} steps/s")
    assert ours.stream.env_steps - before == a.steps * a.repeats
    ours.record.close()
    rates = {n: {f"{w}_{k}": a.steps / f(c, w) for w in ("cpu", "wall")
                 for k, f in (("best", common.least), ("median", common.middle))} for n, c in clocks.items()}
    out = {"hidden": list(hidden), "steps_per_second": rates, "floor": floor(hidden)}
    out["ours_ms"] = 1e3 / rates["ours"]["cpu_best"]
    out["ours_over_floor"] = out["ours_ms"] / out["floor"]["floor_ms"]
    if "sb3" in clocks:
        out["ratio"] = common.ratios(clocks["sb3"], clocks["ours"])
    return out


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--hidden", type=int, nargs="+", action="append", metavar="WIDTH",
                        help="widths of the hidden layers; may be given again (default: 256 256 and 64 64)")
    parser.add_argument("--steps", type=int, default=1000, help="steps of one repeat")
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
    step_ms, results, good = simulator_ms(), [], True
    with tempfile.TemporaryDirectory() as folder:
        for number, hidden in enumerate(a.hidden or [[256, 256], [64, 64]]):
            results.append(measure(tuple(hidden), a, Path(folder) / str(number)))
    print(f"{a.repeats} x {a.steps} steps a side and width, interleaved")
    rows = [["x".join(map(str, r["hidden"])), n, *v.values()] for r in results for n, v in r["steps_per_second"].items()]
    common.table(["hidden", "side", "CPU best", "CPU median", "wall best", "wall median"], rows)
    if not a.alone:
        print("\nours / sb3, steps a second")
        common.table(["hidden", "CPU best", "CPU median", "CPU paired", "wall best", "wall median", "wall paired"],
                     [["x".join(map(str, r["hidden"])), *r["ratio"].values()] for r in results])
    print("\nCPU ms a step")
    common.table(["hidden", "ours", "simulator", "Mmul-add", "GFLOP/s", "FLOP floor", "products", "ours/floor",
                  "(ours-sim)/products"],
                 [["x".join(map(str, r["hidden"])), r["ours_ms"], step_ms, r["floor"]["multiply_adds"] / 1e6,
                   r["floor"]["gflops"], r["floor"]["floor_ms"], r["floor"]["products_ms"], r["ours_over_floor"],
                   (r["ours_ms"] - step_ms) / r["floor"]["products_ms"]] for r in results])
    if not a.alone:
        for r in results:
            target = TARGETS.get(tuple(r["hidden"]))
            if target:
                good &= common.verdict(f"ours / sb3 at {r['hidden']} (CPU, paired median)", r["ratio"]["cpu_paired"],
                                       target, most=False)
    common.write_json(a.json, {"settings": {**SHARED, **vars(a)}, "simulator_ms": step_ms, "figures": results, "ok": good})
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
