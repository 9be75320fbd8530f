"""S-DICE: V-DICE with the semi-gradient (the paper's own ablation of O-DICE; methods/control/dice.py as it stands)."""

from __future__ import annotations

from methods.control.dice import ValueDice


class SDice(ValueDice):
    pass
