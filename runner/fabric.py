"""Lightning Fabric without the rest of Lightning: three seconds less at the start of every process.

`import lightning.fabric` first runs the package's own __init__, which imports the Trainer, and then imports torchmetrics only to
ask for its version (which brings transformers, scipy and matplotlib). Nothing of that is used here.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from importlib import metadata


def fabric_class() -> type:
    """lightning.fabric.Fabric. Whoever uses more of `lightning` in this process still gets all of it."""
    if "lightning" not in sys.modules:
        _import_alone()
    from lightning.fabric import Fabric

    return Fabric


def _import_alone():
    """Import lightning.fabric with a `lightning` around it whose own __init__ has not run, and with torchmetrics' version for
    torchmetrics."""
    spec = importlib.util.find_spec("lightning")
    package = sys.modules["lightning"] = importlib.util.module_from_spec(spec)
    package.__version__ = metadata.version("lightning")
    stub = None
    if "torchmetrics" not in sys.modules:
        stub = sys.modules["torchmetrics"] = types.ModuleType("torchmetrics")
        stub.__version__ = metadata.version("torchmetrics")  # Lightning depends on it
    try:
        import lightning.fabric  # noqa: F401
    except BaseException:
        del sys.modules["lightning"]
        raise
    finally:
        if stub is not None:
            del sys.modules["torchmetrics"]

    def complete(name):
        """The first look at a name that is not there runs the __init__ after all."""
        if name.startswith("__") or f"lightning.{name}" in sys.modules:  # the import system's questions
            raise AttributeError(name)
        del package.__getattr__
        spec.loader.exec_module(package)
        return getattr(package, name)

    package.__getattr__ = complete
