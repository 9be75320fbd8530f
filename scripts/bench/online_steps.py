"""Environment steps a second of online training, one update a step in every copy, the whole loop.

td3 (or another online method) on a simulator, 256 x 256, batch 256, where hardware=auto puts it; a repeat ends with a
synchronisation. With n copies an update follows every step of all copies, so that n steps share one update, as vectorised
training does it.

Target on one H100, td3 on HalfCheetah, one copy: 571 steps/s, LeanRL's TD3 with compile and CUDA graphs there.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import _common as common
import torch


def measure(copies: int, a) -> dict:
    from _training import Training

    with tempfile.TemporaryDirectory() as folder:
        side = Training(Path(folder), f"method={a.method}", f"env={a.env}", "size=paper", "loop.log_every=1000",
                        "env.start_steps=2000", f"env.copies={copies}", *a.overrides)
        side.train(100)
        began = time.perf_counter()
        side.train(100)
        steps = max(100, int(a.seconds / (time.perf_counter() - began)) * 100)
        clocks = common.interleave({str(copies): lambda: side.train(steps)}, a.repeats)[str(copies)]
    rate = steps / common.middle(clocks, "wall")
    return {"copies": copies, "updates_per_second": rate, "steps_per_second": rate * copies,
            "graph": side.loop.graphs is not None}


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--method", default="td3")
    parser.add_argument("--env", default="halfcheetah")
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--seconds", type=float, default=3.0, help="about the length of one repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="further settings")
    a = parser.parse_args()
    common.one_thread()
    results = [measure(n, a) for n in a.copies]
    cuda = torch.cuda.is_available()
    print(f"{a.method} on {a.env}, {torch.cuda.get_device_name() if cuda else common.cpu_model()}")
    common.table(["copies", "updates/s", "env steps/s", "graph"], [list(r.values()) for r in results])
    good = True
    for r in results:
        if cuda and r["copies"] == 1 and (a.method, a.env) == ("td3", "halfcheetah"):
            good = common.verdict("env steps/s, one copy", r["steps_per_second"], 571, most=False)
    common.write_json(a.json, {"figures": results, "ok": good})
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
