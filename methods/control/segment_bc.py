"""Cloning all segments, then those that are preferred: the supervised baseline of preference learning.

The base algorithm (methods/control/segments.py) as it stands: the "SFT" arm of Hejna et al. (ICLR 2024, arXiv 2310.13639).
The same with `bc_steps` at the run's length is plain behaviour cloning.
"""

from __future__ import annotations

from methods.control.segments import SegmentPolicy


class SegmentBC(SegmentPolicy):
    pass
