"""What the original's devices were seen to compute; see tests/vectors/privacy.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VECTORS: dict[str, Any] = json.loads(Path(__file__).parents[2].joinpath("vectors/privacy.json").read_text())
