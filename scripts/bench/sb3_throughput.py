"""TD3 or SAC on HalfCheetah-v5 on one core: environment steps a second, ours beside Stable-Baselines3, equal settings.

Ours: the method as a run makes it (loop, stream, records). SB3: its own as it comes. Both: one environment, one update a step
(of critics, targets and, for SAC, actor and temperature; TD3's actor every second), batch 256, Adam 3e-4 throughout, gamma
0.99, tau 0.005, two critics, the same widths. TD3: action noise 0.1, target noise 0.2 clipped at 0.5. SAC: target entropy -A.
Learning has begun before the clock does. The two sides take turns; the ratio is of CPU seconds.

The floor, of TD3: the multiply-adds of one step at the rate that this core reaches in one large product (torch.mm of
batch x H x H), and the time of all the step's products, each at its own shape. Neither holds any other arithmetic, nor
the simulator, whose time a step is printed beside them.

Targets: at least 1.2 times SB3's steps a second at 256 256, 1.5 times at 64 64.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import _common as common
import numpy as np
import torch

ENV = "HalfCheetah-v5"
TARGETS = {(256, 256): 1.2, (64, 64): 1.5}
BATCH, ACTOR_DELAY = 256, 2
OURS = {"td3": [f"method.actor_delay={ACTOR_DELAY}", "method.exploration_noise=0.1", "method.target_noise=0.2",
                "method.target_noise_clip=0.5"],
        "sac": []}


def ours(hidden, a, folder: Path):
    from _training import Training

    return Training(folder, f"method={a.method}", "env=halfcheetah", "hardware=cpu", f"method.hidden={list(hidden)}",
                    "method.learning_rate=3e-4", "method.discount=0.99", "method.target_rate=0.005", *OURS[a.method],
                    f"env.batch_size={BATCH}", "env.copies=1", "env.steps_per_update=1", f"env.capacity={a.capacity}",
                    f"env.start_steps={a.start_steps}", f"loop.log_every={a.log_every}")


class Theirs:
    def __init__(self, hidden, a):
        import stable_baselines3 as sb3
        from stable_baselines3.common.noise import NormalActionNoise

        own = {"sac": {"ent_coef": "auto", "target_entropy": "auto"},
               "td3": {"policy_delay": ACTOR_DELAY, "action_noise": NormalActionNoise(np.zeros(6), np.full(6, 0.1)),
                       "target_policy_noise": 0.2, "target_noise_clip": 0.5}}
        self.model = getattr(sb3, a.method.upper())(
            "MlpPolicy", ENV, learning_rate=3e-4, buffer_size=a.capacity, learning_starts=a.start_steps, batch_size=BATCH,
            tau=0.005, gamma=0.99, train_freq=1, gradient_steps=1, policy_kwargs={"net_arch": list(hidden)}, device="cpu",
            seed=0, **own[a.method])
        self.model.learn(a.start_steps, log_interval=4)  # random actions, no update yet

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
    half = 1 / ACTOR_DELAY
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
    batch, shapes = BATCH, products(17, 6, hidden, BATCH)
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
    training = ours(hidden, a, folder)
    sides = {"ours": training} if a.alone else {"ours": training, "sb3": Theirs(hidden, a)}
    for side in sides.values():
        side.train(a.steps // 3)  # fill, begin to learn, warm
    before = training.stream.env_steps
    clocks = common.interleave({n: (lambda s=s: s.train(a.steps)) for n, s in sides.items()}, a.repeats,
                               say=lambda c: f"{a.steps / c.cpu:.0f} steps/s")
    assert training.stream.env_steps - before == a.steps * a.repeats
    rates = {n: {f"{w}_{k}": a.steps / f(c, w) for w in ("cpu", "wall")
                 for k, f in (("best", common.least), ("median", common.middle))} for n, c in clocks.items()}
    out = {"hidden": list(hidden), "steps_per_second": rates, "ours_ms": 1e3 / rates["ours"]["cpu_best"]}
    if a.method == "td3":
        out["floor"] = floor(hidden)
        out["ours_over_floor"] = out["ours_ms"] / out["floor"]["floor_ms"]
    return out | ({} if a.alone else {"ratio": common.ratios(clocks["sb3"], clocks["ours"])})


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("method", choices=list(OURS))
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
    common.table(["hidden", "ours", "simulator"], [["x".join(map(str, r["hidden"])), r["ours_ms"], step_ms] for r in results])
    if a.method == "td3":
        common.table(["hidden", "Mmul-add", "GFLOP/s", "FLOP floor", "products", "ours/floor", "(ours-sim)/products"],
                     [["x".join(map(str, r["hidden"])), f["multiply_adds"] / 1e6, f["gflops"], f["floor_ms"], f["products_ms"],
                       r["ours_over_floor"], (r["ours_ms"] - step_ms) / f["products_ms"]]
                      for r in results for f in [r["floor"]]])
    if not a.alone:
        for r in results:
            target = TARGETS.get(tuple(r["hidden"]))
            if target:
                good &= common.verdict(f"ours / sb3 at {r['hidden']} (CPU, paired median)", r["ratio"]["cpu_paired"],
                                       target, most=False)
    common.write_json(a.json, {"settings": vars(a), "simulator_ms": step_ms, "figures": results, "ok": good})
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
