"""On a GPU: captured updates are the usual ones, kernels agree with the CPU. Without one this prints NOT EXERCISED."""

from __future__ import annotations

import pytest
import torch

from runner.catalogue import Catalogue
from runner.compose import compose
from runner.draws import BLOCK
from runner.loop import Loop
from runner.run import _assemble, make_fabric
from runner.settings import Loop as Settings

if not torch.cuda.is_available():
    print("\ntests/reliability/test_gpu.py: NOT EXERCISED, there is no GPU")
    pytest.skip("no GPU", allow_module_level=True)

BOOK = Catalogue()


def capturable() -> list[str]:
    from runner import catalogue

    return [n for n in BOOK.names("method") if catalogue.load_class(BOOK.get("method", n)).capturable]


def train(name, env, seeds, graph, steps, *words):
    job = compose([f"method={name}", f"env={env}", "size=smoke", "logger=none", "hardware=gpu", f"hardware.seeds={seeds}",
                   *words], BOOK)
    fabric = make_fabric(job.config["hardware"])
    method, world, stream, stack = _assemble(job, fabric)
    loop = Loop(method, world, stream, Settings(steps=steps, log_every=17), seed=0, fabric=fabric, stack=stack, graph=graph)
    loop.run()
    return loop


def logged(names) -> list[str]:
    """The methods that learn from stored rows or segments, with or without playing besides; those that generate."""
    kinds = {"offline", "mixed", "preferences", "samples", "rewarded", "preferred"}
    return [n for n in names if kinds & set(BOOK.get("method", n).needs)]


def stacks(name) -> bool:
    """Whether several seeds can be trained at once; one seed at a time plays."""
    from runner import catalogue

    return catalogue.load_class(BOOK.get("method", name)).batchable and "mixed" not in BOOK.get("method", name).needs


def place(name) -> str:
    """A small environment for it: PointMass data or the ring where they fit."""
    fits = BOOK.fitting(BOOK.methods(name))
    return next((e for e in ("pointmass_medium", "pointmass_mix", "ring") if e in fits), fits[0])


@pytest.mark.parametrize(("name", "seeds"), [(n, k) for n in logged(capturable()) for k in (1, 3)
                                            if k == 1 or stacks(n)])
def test_captured_updates_equal_usual_ones(name, seeds):
    """Sixty-three updates with and without graphs, events at awkward steps: equal to the bit, or to 1e-5 where a library
    picks another kernel inside a graph."""
    env = place(name)
    usual, graphs = train(name, env, seeds, False, 63), train(name, env, seeds, True, 63)
    assert graphs.graphs.graphs, "nothing was captured"
    for key, value in usual.method.state_dict().items():
        torch.testing.assert_close(graphs.method.state_dict()[key], value, rtol=1e-5, atol=1e-6, msg=lambda m: f"{key}: {m}")


@pytest.mark.parametrize(("name", "words"), [("kto", []), ("beta_dpo", []), ("madpo", []), ("hypo", ["method.kl=exact"]),
                                             ("simpo", []), ("f_dpo", [])])
def test_captured_pairs_equal_usual_ones(name, words):
    """Methods with statistics of the batch, or sums over all arms, beside the loss of each pair."""
    usual, graphs = (train(name, "bandit", 1, graph, 63, *words) for graph in (False, True))
    assert graphs.graphs.graphs, "nothing was captured"
    for key, value in usual.method.state_dict().items():
        torch.testing.assert_close(graphs.method.state_dict()[key], value, rtol=1e-4, atol=1e-5, msg=lambda m: f"{key}: {m}")


@pytest.mark.parametrize("words", [["method.mode=preference"], ["method.mode=frozen"]])
def test_captured_rewards_equal_usual_ones(words):
    """Adv-GRPO's reward model, fitted between the generator's updates."""
    usual, graphs = (train("adv_grpo", "digits", 1, graph, 63, *words) for graph in (False, True))
    assert graphs.graphs.graphs, "nothing was captured"
    for key, value in usual.method.state_dict().items():
        torch.testing.assert_close(graphs.method.state_dict()[key], value, rtol=1e-4, atol=1e-5, msg=lambda m: f"{key}: {m}")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("name", "env"), [("td3_bc", "pointmass_medium"), ("dpo", "bandit")])
def test_captured_updates_keep_the_precision(name, env, precision):
    """Casts of weights are made anew for every update inside a graph: else nine of ten updates would see old ones."""
    usual, graphs = (train(name, env, 1, graph, 93, f"hardware.precision={precision}") for graph in (False, True))
    assert graphs.graphs.graphs, "nothing was captured"
    for key, value in usual.method.state_dict().items():
        torch.testing.assert_close(graphs.method.state_dict()[key], value, rtol=1e-4, atol=1e-5, msg=lambda m: f"{key}: {m}")


@pytest.mark.parametrize("name", ["td3", "sac"])
def test_captured_online_training_equals_usual_training(name):
    usual, graphs = (train(name, "pointmass", 1, g, 63) for g in (False, True))
    assert len(graphs.graphs.graphs) == BLOCK
    for key, value in usual.method.state_dict().items():
        torch.testing.assert_close(graphs.method.state_dict()[key], value, rtol=1e-4, atol=1e-5, msg=lambda m: f"{key}: {m}")


@pytest.mark.parametrize(("name", "env", "words"), [
    ("cfg", "ring", []), ("ddpm", "ring", []), ("flow_grpo", "digits", []),
    ("flow_matching", "digits", ["policy=dit", "policy.width=64", "policy.depth=2", "hardware.precision=bf16-mixed"]),
    ("flow_matching", "digits", ["policy=dit", "policy.width=64", "policy.depth=2", "hardware.precision=bf16-mixed",
                                 "hardware.compile=true"])])
def test_recorded_generation_is_the_usual_one(name, env, words):
    """Before and after some training, whose weights a graph reads where they lie."""
    loop = train(name, env, 1, False, 3, *words)
    method, shape, g = loop.method, loop.world.spec().sample_shape, torch.Generator().manual_seed(0)
    noise, condition = torch.randn(12, *shape, generator=g).cuda(), torch.arange(12).cuda() % 2
    first = None
    for _ in range(2):
        drawn = []
        for records in (True, False):
            type(method).records = records
            drawn.append(method.draw(noise, condition, torch.Generator().manual_seed(1)).x)
        type(method).records = True
        torch.testing.assert_close(*drawn, rtol=2e-3, atol=2e-3)
        assert method.graphed.graphs
        assert first is None or not torch.equal(first, drawn[0])  # the weights have moved
        first, loop.settings = drawn[0], Settings(steps=6, log_every=17)
        loop.run()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize(("width", "heads", "side"), [(128, 2, 16), (96, 6, 12), (256, 2, 40)])
def test_a_transformers_fused_kernels_are_its_formulas(width, heads, side, library, dtype, monkeypatch):
    """Output, gradients of the input and of every weight: as near to float32 as torch's own half precision, with tokens that fill
    blocks of kernels (64) and that do not (36, 400)."""
    from methods.diffusion import cublaslt
    from methods.diffusion.dit import DiT

    if not library:
        monkeypatch.setattr(cublaslt, "available", lambda: False)
    else:
        assert cublaslt.available()
    torch.manual_seed(0)
    network = DiT((4, side, side), 5, width, 2, heads, 2).cuda()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.5 / p.shape[-1] ** 0.5)
    x, t, condition = torch.randn(3, 4, side, side, device="cuda"), torch.rand(3, device="cuda"), torch.arange(3).cuda()
    towards = torch.randn_like(x)

    def results(fused, half):
        network.fused, given = fused, x.clone().requires_grad_()
        network.zero_grad()
        with torch.autocast("cuda", dtype, enabled=half):
            out = network(given, t, condition).float()
            with torch.no_grad():
                alone = network(given, t, condition).float()
        (out * towards).sum().backward()
        return [out.detach(), alone, given.grad, *(p.grad for p in network.parameters())]

    names = ["out", "without gradients", "x", *(n for n, _ in network.named_parameters())]
    for name, exact, usual, fused in zip(names, results(False, False), results(False, True), results(True, True), strict=True):
        assert fused.dtype == exact.dtype and fused.shape == exact.shape
        error, allowed = (((a - exact).norm() / exact.norm()).item() for a in (fused, usual))
        assert error <= 1.5 * allowed + 1e-5, (name, error, allowed)
        assert torch.isfinite(fused).all()


def test_updates_never_wait_for_the_host():
    for name in logged(capturable()):
        job = compose([f"method={name}", f"env={place(name)}", "size=smoke", "logger=none", "hardware=gpu"], BOOK)
        method, _, stream, _ = _assemble(job, make_fabric(job.config["hardware"]))
        method.update(stream.next())
        method.updates += 1
        batch = stream.next()  # may play, which the host does
        torch.cuda.set_sync_debug_mode("error")
        try:
            method.update(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("rows", "queries", "width"), [(1000, 256, 23), (77, 3, 5), (100_003, 256, 23), (5, 1, 9)])
def test_the_kernel_finds_the_nearest_rows(rows, queries, width):
    from methods.control.neighbours import Neighbours

    generator = torch.Generator().manual_seed(rows)
    data, asked = (torch.randn(n, width, generator=generator) for n in (rows, queries))
    data[rows // 2] = data[0]  # equal rows: the first is meant
    asked[0] = data[0]
    exact = torch.cdist(asked.double(), data.double())
    found = Neighbours(data.cuda()).nearest(asked.cuda()).cpu().squeeze(1)
    assert found[0] == 0
    best = exact.min(1).values
    assert torch.allclose(exact.gather(1, found[:, None]).squeeze(1), best, rtol=1e-6, atol=1e-7)
    assert (found == exact.argmin(1)).float().mean() > 0.99
