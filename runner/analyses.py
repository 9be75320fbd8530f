"""What a study's claim can judge besides a difference of arms: a curve fitted over a swept knob.

An analysis turns the arms' values into one number a seed; its interval and verdict are made like those of any claim.
"""

from __future__ import annotations

import json
import math

from runner.errors import UserError, unknown

SCALES = {"linear": float, "log2": math.log2, "log10": math.log10}
KEYS = ("kind", "arm", "knob", "scale")


def check(spec: dict, claim: str, arms: dict[str, list[str]]):
    """Refuse an analysis that cannot be made of these arms ({name: overrides})."""
    for key in spec:
        if key not in KEYS:
            raise unknown(f"key of the analysis of claim {claim}:", key, KEYS)
    if spec.get("kind") != "slope":
        raise unknown(f"analysis of claim {claim}:", spec.get("kind"), ["slope"])
    if spec.get("scale", "linear") not in SCALES:
        raise unknown(f"scale of the analysis of claim {claim}:", spec["scale"], SCALES)
    points = positions(spec, arms)
    if len(points) < 3:
        raise UserError(f"claim {claim}: a slope needs an arm '{spec.get('arm')}' that sweeps {spec.get('knob')} over at least "
                        f"three values; found {len(points)}")


def positions(spec: dict, arms: dict[str, list[str]]) -> dict[str, float]:
    """{arm: where it stands on the knob's axis} of the arms that the sweep made."""
    out = {}
    for name, overrides in arms.items():
        if name.startswith(f"{spec.get('arm')}["):
            given = dict(o.split("=", 1) for o in overrides)
            if spec["knob"] in given:
                out[name] = SCALES[spec.get("scale", "linear")](json.loads(given[spec["knob"]]))
    return out


def run(spec: dict, arms: dict[str, tuple[list[str], list[float]]], labels: list[str]) -> dict:
    """The least-squares slope of the metric over the knob, seed by seed (and setting by setting), and its effect.

    arms: {name: (overrides, values in the order of labels)}; labels: each value's setting, the strata."""
    import numpy as np

    from runner import statistics as st

    at = positions(spec, {n: o for n, (o, _) in arms.items()})
    x = np.array(list(at.values()))
    y = np.array([arms[n][1] for n in at])  # (points, seeds)
    centred = x - x.mean()
    slopes = centred @ (y - y.mean(0)) / (centred @ centred)
    effect = st.paired_difference(slopes, np.zeros_like(slopes), strata=labels, method="studentized")
    scale = "" if spec.get("scale", "linear") == "linear" else f"{spec['scale']} "
    return {"kind": "slope", "name": f"slope over {scale}{spec['knob']}", "x": x.tolist(), "mean": y.mean(1).tolist(),
            "slopes": slopes.tolist(), "share": float((slopes > 0).mean()), "effect": effect}
