"""Behaviour cloning: maximum likelihood of the logged actions (methods/control/imitation.py as it stands).

    L = - mean_B log pi(a|s)

The baseline of everything that learns from stored data (Pomerleau 1991 and many after).
"""

from __future__ import annotations

from methods.control.imitation import Imitation


class BC(Imitation):
    pass
