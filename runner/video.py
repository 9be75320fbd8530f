"""One episode of a trained policy as a film."""

from __future__ import annotations

from pathlib import Path

from runner.errors import UserError

SIZE = (480, 480)  # width, height in pixels
FPS = 20


def write_video(method, world, target: Path, steps: int, seed: int):
    """Write `target` (.mp4 through ffmpeg, or .gif) and say where it is."""
    if target.suffix not in (".mp4", ".gif"):
        raise UserError(f"--to {target}: the file must end in .mp4 or .gif")
    if not hasattr(world, "frames"):
        raise UserError(f"this env has nothing to film ({type(world).__name__}); video is for control")
    try:
        import imageio
    except ImportError:
        raise UserError("video needs the package imageio: pip install -e '.[control]'") from None
    try:
        frames = list(world.frames(method, seed, steps, SIZE))
    except UserError:
        raise
    except Exception as error:  # the GL libraries fail in many ways, none of them with a class of its own
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        if not any(w in repr(error).lower() + text.lower() for w in ("gl", "display", "render")):
            raise
        raise UserError(f"no picture can be rendered here: {text}\n"
                        "headless rendering needs a GL library: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri "
                        "(MUJOCO_GL=egl), or libosmesa6 (MUJOCO_GL=osmesa)") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    options = {"fps": FPS} if target.suffix == ".mp4" else {"duration": 1000 / FPS, "loop": 0}
    try:
        imageio.mimsave(target, frames, **options)
    except (ImportError, ValueError) as error:
        raise UserError(f"{target} cannot be written: {str(error).splitlines()[0]}\n"
                        "mp4 needs the package imageio-ffmpeg; a .gif needs nothing more") from None
    print(f"{target}: {len(frames)} frames")
