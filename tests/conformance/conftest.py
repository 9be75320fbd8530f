"""Tests of one method stand next to each other, so that they find its runs (lab.course) in the process they run in."""

from __future__ import annotations

from pathlib import Path


def pytest_collection_modifyitems(items):
    places = [i for i, item in enumerate(items) if item.path.parent == Path(__file__).parent]
    found = sorted((items[i] for i in places), key=lambda item: item.callspec.params["name"] if hasattr(item, "callspec") else "")
    for place, item in zip(places, found):
        items[place] = item
