"""What the original's devices and servers were seen to compute; see tests/vectors/compression.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VECTORS: dict[str, Any] = json.loads(
    Path(__file__).parents[2].joinpath("vectors/compression.json").read_text()
)
