"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: one module is both the policy and its reference."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence

from torch import nn

from runner.errors import UserError, nearest

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(policy: nn.Module, rank: int = 16, alpha: float = 32.0, targets: Sequence[str] = TARGETS) -> list[nn.Parameter]:
    """Put adapters W + alpha / rank * B A on the layers named `targets`; B starts at 0, so nothing changes yet.

    All else is frozen; returned are the adapters' parameters. Call it before the optimiser is made and before a state is
    loaded. A is drawn from torch's own generator. UserError: peft is missing, or a target is no layer of the policy."""
    try:
        import peft
    except ImportError:
        raise UserError("adapters need peft, which is not installed\nwithout it: train all weights\n"
                        "install it: pip install -e '.[lm]'") from None
    there = {name.rpartition(".")[2] for name, module in policy.named_modules() if isinstance(module, nn.Linear)}
    for target in targets:
        if target not in there:
            raise UserError(f"the policy has no layer '{target}' for an adapter\n"
                            f"the nearest: {', '.join(nearest(target, there) or sorted(there))}\nname layers of the policy")
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0,
                                                 bias="none"), policy)
    return [p for p in policy.parameters() if p.requires_grad]


def adapted(policy: nn.Module) -> list[nn.Module]:
    """The layers that have adapters."""
    return [m for m in policy.modules() if hasattr(m, "base_layer") and hasattr(m, "enable_adapters")]


@contextlib.contextmanager
def reference(policy: nn.Module):
    """`with reference(policy)`: its adapters are off, so it is the policy that they were added to."""
    layers = adapted(policy)
    if not layers:
        raise ValueError("a policy without adapters has no reference inside; keep a copy instead")
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield policy
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class Unadapted:
    """A policy as it was before its adapters, with what scoring asks of a policy."""

    def __init__(self, policy: nn.Module):
        self.policy = policy

    def packed(self, ids):
        with reference(self.policy):
            return self.policy.packed(ids)

    def model(self, *args):
        with reference(self.policy):
            return self.policy.model(*args)

    @property
    def head(self):
        with reference(self.policy):
            return self.policy.head


def without(policy: nn.Module) -> nn.Module:
    """A copy whose adapters are off for good."""
    policy = copy.deepcopy(policy)
    for layer in adapted(policy):
        layer.enable_adapters(False)
    return policy


def merged_copy(policy: nn.Module) -> nn.Module:
    """A copy with its adapters merged into the weights, plain layers in their place; without adapters, the policy itself."""
    if not adapted(policy):
        return policy
    policy = copy.deepcopy(policy)
    for name, layer in list(policy.named_modules()):
        if hasattr(layer, "base_layer") and hasattr(layer, "enable_adapters"):
            layer.merge()
            parent, _, own = name.rpartition(".")
            setattr(policy.get_submodule(parent), own, layer.base_layer)
    return policy
