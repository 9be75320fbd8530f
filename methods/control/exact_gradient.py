"""Exact policy gradient (Sutton et al. 2000) in a known Markov decision process: the tabular base as it stands
(methods/control/tabular.py). It climbs whatever reward it is given, a proxy's flaws included. Adam in place of plain ascent.
"""

from __future__ import annotations

from methods.control.tabular import Tabular


class ExactGradient(Tabular):
    pass
