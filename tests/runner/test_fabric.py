"""The import of Lightning Fabric alone: nothing heavy comes along, and who wants the rest of Lightning gets it."""

from __future__ import annotations

PROGRAM = """
import sys
from runner.fabric import fabric_class
Fabric = fabric_class()
heavy = {"lightning.pytorch", "torchmetrics", "transformers", "scipy", "matplotlib"} & sys.modules.keys()
assert not heavy, heavy
from lightning.pytorch import LightningModule
import lightning
assert lightning.LightningModule is LightningModule and lightning.Fabric is Fabric is lightning.fabric.Fabric
assert sys.modules["torchmetrics"].Metric and fabric_class() is Fabric and not hasattr(lightning, "nonsense")
"""


def test_fabric_comes_alone_and_the_rest_when_it_is_asked_for(shell):
    result = shell("-c", PROGRAM, python=())
    assert result.code == 0, result.text
