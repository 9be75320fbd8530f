"""Token policies: a rollout of the engine, and scores of its responses with the backward pass, beside reckoned floors.

    python scripts/bench/generation.py --shape tiny|half-billion [--rows N] [--device cuda|cpu] [--quick]

tiny: 4 layers of width 256, a vocabulary of 64, 256 rows, prompts of 32 tokens, 32 tokens made. half-billion: Qwen2-0.5B's
shape, 64 rows in groups of 8, prompts of 128, 256 tokens made. Random weights; no row ends early; bf16 on a GPU.

The floor of a token: the bytes that must move (weights, what the cache holds on average, logits once) at the rate at which
this device copies, or the multiply-adds at its rate in one large product, whichever takes longer. Of scoring: the
multiply-adds of the trunk (forward, twice that backward) and of the head (once more, since logits are made again). The rates
are measured here, first. Targets on one H100: 10 ms a tiny rollout, 0.6 s a half-billion one.
"""

from __future__ import annotations

import contextlib
import resource
import statistics
import sys
import time

import _common as common
import torch

from methods.tokens.engine import Sampler
from methods.tokens.scoring import buckets, score
from methods.tokens.transformer import Shape, Transformer

SHAPES = {
    "tiny": (Shape(64, 256, 4, 8, 8, 1024, context=128), {"rows": 256, "group": 8, "prompt": 32, "steps": 32}),
    "half-billion": (Shape(151_936, 896, 24, 14, 2, 4864, context=32_768, qkv_bias=True, rope_theta=1e6),
                     {"rows": 64, "group": 8, "prompt": 128, "steps": 256}),
}
QUICK = Shape(64, 64, 2, 4, 2, 128, context=128), {"rows": 16, "group": 4, "prompt": 8, "steps": 8}
TARGETS = {"tiny": 0.010, "half-billion": 0.6}  # seconds a rollout on one H100


class Bench:
    def __init__(self, shape: Shape, sizes: dict, device: torch.device, tokens: int):
        torch.manual_seed(0)
        self.shape, self.device, self.tokens, self.sizes = shape, device, tokens, sizes
        self.cuda = device.type == "cuda"
        self.policy = Transformer(shape).to(device)
        self.sampler = Sampler(self.policy)
        rows, group, prompt = sizes["rows"], sizes["group"], sizes["prompt"]
        self.prompt = torch.randint(1, shape.vocabulary, (rows // group, prompt), device=device)
        lengths = torch.randint(prompt // 2, prompt + 1, (rows // group, 1), device=device)
        self.mask = torch.arange(prompt, device=device) >= prompt - lengths
        self.uniforms = torch.rand(rows, sizes["steps"], device=device)

    def precision(self):
        return torch.autocast("cuda", dtype=torch.bfloat16) if self.cuda else contextlib.nullcontext()

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()

    def clock(self, call, repeats: int) -> tuple[float, float]:
        """Least and middle seconds of a call."""
        times = []
        for _ in range(repeats):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - start)
        return min(times), statistics.median(times)

    def rates(self, quick: bool) -> tuple[float, float]:
        """(bytes a second read and written by a copy, multiply-adds times two a second in a large product)."""
        n, dtype = (512 if quick else 1024, torch.float32) if not self.cuda else (8192, torch.bfloat16)
        a, b = (torch.randn(n, n, device=self.device, dtype=dtype) for _ in range(2))
        big = torch.empty(2 ** (30 if self.cuda else 26), dtype=torch.uint8, device=self.device)
        other = torch.empty_like(big)
        a @ b, other.copy_(big)
        return 2 * big.numel() / self.clock(lambda: other.copy_(big), 5)[0], 2 * n ** 3 / self.clock(lambda: a @ b, 5)[0]

    def generate(self):
        with self.precision():
            self.sampler.refresh()
            s = self.sizes
            self.out = self.sampler.generate(self.prompt, self.mask, group=s["group"], steps=s["steps"], eos=-1, pad=0,
                                             uniforms=self.uniforms)

    def score(self):
        """log-probabilities and entropies of the rollout and the gradient of their sum, in micro-batches."""
        prompt, mask = (t.repeat_interleave(self.sizes["group"], 0) for t in (self.prompt, self.mask))
        self.policy.zero_grad()
        for rows in buckets(mask.sum(-1) + self.out.mask.sum(-1), tokens=self.tokens):
            with self.precision():
                values = score(self.policy, prompt[rows], mask[rows], self.out.response[rows], self.out.mask[rows])
            (values["log_prob"] + values["entropy"]).sum().backward()

    def floors(self, copied: float, made: float) -> tuple[float, float]:
        """(seconds of one token of all rows, seconds of scoring) that no program goes below."""
        shape, s, width = self.shape, self.sizes, 2 if self.cuda else 4
        head = shape.vocabulary * shape.width
        trunk = sum(p.numel() for p in self.policy.model.layers.parameters())
        held = s["rows"] * (s["prompt"] + s["steps"] / 2)
        cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * held
        moved = width * (trunk + head + cache) + 4 * s["rows"] * shape.vocabulary
        token = max(moved / copied, 2 * s["rows"] * (trunk + head) / made)
        seen = s["group"] * int(self.mask.sum()) + s["rows"] * s["steps"]
        return token, (6 * trunk * seen + 8 * head * s["rows"] * s["steps"]) / made

    def peak(self) -> float:
        """GB, since the last call on a GPU, of the process on a CPU."""
        if not self.cuda:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
        out = torch.cuda.max_memory_allocated() / 2 ** 30
        torch.cuda.reset_peak_memory_stats()
        return out


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--rows", type=int, help="responses at once; a multiple of the group")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro-batch of scoring, padding included")
    parser.add_argument("--quick", action="store_true", help="a very small policy: does it work at all?")
    a = parser.parse_args()
    common.one_thread()
    shape, sizes = QUICK if a.quick else SHAPES[a.shape]
    sizes = {**sizes, **({"rows": a.rows} if a.rows else {})}
    if sizes["rows"] % sizes["group"]:
        sys.exit(f"--rows must be a multiple of {sizes['group']}")
    bench = Bench(shape, sizes, torch.device(a.device), a.tokens)
    copied, made = bench.rates(a.quick)
    first = bench.clock(bench.generate, 1)[0]
    bench.peak()
    rollout, usual = bench.clock(bench.generate, a.repeats)
    peak = bench.peak()
    bench.score()
    bench.peak()
    scoring, scoring_usual = bench.clock(bench.score, a.repeats)
    peaks = peak, bench.peak()
    token_floor, scoring_floor = bench.floors(copied, made)
    steps, made_tokens = sizes["steps"], sizes["rows"] * sizes["steps"]
    name = torch.cuda.get_device_name() if bench.cuda else common.cpu_model()
    print(f"{a.shape if not a.quick else 'quick'} on {name}: {sizes}; copies {copied / 1e9:.0f} GB/s, "
          f"multiplies {made / 1e12:.3g} TFLOP/s; first rollout {first:.2f} s")
    common.table(["", "tokens/s", "ms a token", "least ms", "middle ms", "floor ms", "times floor", "peak GB"], [
        ["rollout", made_tokens / rollout, 1e3 * rollout / steps, 1e3 * rollout, 1e3 * usual, 1e3 * token_floor * steps,
         rollout / (token_floor * steps), peaks[0]],
        ["scores and gradient", made_tokens / scoring, 1e3 * scoring / steps, 1e3 * scoring, 1e3 * scoring_usual,
         1e3 * scoring_floor, scoring / scoring_floor, peaks[1]]])
    ok = a.quick or not bench.cuda or common.verdict("seconds a rollout", rollout, TARGETS[a.shape], most=True)
    common.write_json(a.json, {
        "device": name, "shape": a.shape, "quick": a.quick, **sizes, "rollout": rollout, "scoring": scoring,
        "rollout_floor": token_floor * steps, "scoring_floor": scoring_floor, "peak_gb": peaks, "first": first,
        "copied": copied, "multiplied": made})
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
