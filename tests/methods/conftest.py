"""Makes token_methods.py importable: pytest's importlib mode does not add a test's folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
