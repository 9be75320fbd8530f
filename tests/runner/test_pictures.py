"""Pictures of a run: PNG files that any decoder reads, in the run's folder and on the report's page."""

from __future__ import annotations

import io
import re

import pytest
import torch
from PIL import Image

from envs.generation import drawing
from runner.pictures import png


def decoded(data: bytes):
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 7, 3), (240, 239, 3)])
def test_png_is_what_was_drawn(shape):
    image = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    assert torch.equal(decoded(png(image)), image)


def test_points_lie_where_they_are():
    image = drawing.density(torch.tensor([[2.0, 2.0], [-2.0, -2.0], [9.0, 9.0]]), torch.tensor([0, 1, 0]), 3.0, 60)
    dark = (image.float().mean(2) < 254).nonzero()
    assert {tuple((p > 30).tolist()) for p in dark} == {(False, True), (True, False)}  # right above, left below; none outside


def test_tiles_stand_row_by_row():
    images = torch.full((3, 1, 2, 2), -1.0)
    images[1] = 1.0
    out = drawing.tiles(images, 2, 1)
    assert out.shape == (5, 5, 3)
    assert out[0, 0, 0] == 0 and out[0, 3, 0] == 255 and out[3, 0, 0] == 0 and out[3, 3, 0] == 255  # nothing is white


def test_a_runs_pictures_reach_its_folder_and_the_report(cli):
    done = cli("method=flow_matching", "env=ring", "size=smoke", "logger=none")
    assert done.code == 0, done.text
    folder = next((cli.cwd / "runs").iterdir()) / "pictures"
    assert sorted(p.name for p in folder.iterdir()) == ["paths.png", "samples.png"]
    assert decoded((folder / "samples.png").read_bytes()).shape == (240, 240, 3)
    assert cli("report", "--to", "page.html").code == 0
    page = (cli.cwd / "page.html").read_text()
    assert len(re.findall(r'<img src="data:image/png;base64,', page)) == 2 and "img-src data:" in page
