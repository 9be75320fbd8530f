"""Weights that training starts from: those in the project, or those that an env's recipe made here (runner/data.py).

Such an env has the settings `start` (shipped, own, none), `own` (the name of what `data build` makes) and `data_size`."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from runner.errors import UserError
from runner.places import data_root, own_id


def load(config, shipped: Path) -> dict[str, Tensor]:
    """{name: float32 tensor}; {} for start=none. shipped: the folder of those in the project."""
    from safetensors.torch import load_file

    if config.start == "none":
        return {}
    if not config.own:
        raise UserError("this env comes with no starting weights\nname a finished run on it: policy.path=FOLDER; or, if nothing "
                        "has to be learned from them, begin from random weights: env.start=none")
    path = shipped / f"{Path(config.own).parent.name}.safetensors" if config.start == "shipped" else \
        data_root() / own_id(config.own, config.data_size) / "start.safetensors"
    if not path.is_file():
        raise UserError(f"no starting weights of this env are shipped: {path.name}\nbuild them: env.start=own, or begin from "
                        "random weights: env.start=none" if config.start == "shipped" else
                        f"the starting weights are not there: {path}")
    return {k: v.float() for k, v in load_file(path).items()}


def keep(network: torch.nn.Module, folder: Path, figures: dict[str, float], headline: str) -> dict:
    """Write a network's weights into `folder`; what World.collect tells of them. headline: the figure that is told."""
    from safetensors.torch import save_file

    path = folder / "start.safetensors"
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in network.state_dict().items()}, path)
    parameters = sum(p.numel() for p in network.parameters())
    return {"parameters": parameters, "metrics": figures, "digest": hashlib.sha256(path.read_bytes()).hexdigest(),
            "told": f"a start of {parameters:,} parameters, {headline} {figures[headline]:.3f}"}
