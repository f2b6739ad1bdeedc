"""What servers tell each other about the model before they work on it together: names, sizes, aggregation.

The first server of a job puts it into Redis (key ModelInfo), the others compare. Shapes and types are told but not
compared, as in MindSpore Federated 0.1.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

from fedcore.errors import StoreError
from fedcore.wire.arrays import Layout

T = TypeVar("T", int, bool)
_BYTES_PER_VALUE = 4  # every weight is float32


def describe(layout: Layout) -> str:
    """Return the model's description as compact JSON, keys in bytewise order.

    Returns:
        ``{"features":{name:{"require_aggr":bool,"shape":[..],"size":bytes,"type":"fp32"}}}``
    """
    features = {
        weight.name: {
            "require_aggr": weight.aggregated,
            "shape": list(weight.shape),
            "size": weight.size * _BYTES_PER_VALUE,
            "type": "fp32",
        }
        for weight in layout
    }
    return json.dumps({"features": features}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def mismatch(local: Layout, shared: bytes | str) -> str | None:
    """Why a server's model is not the cluster's, None if it is.

    Args:
        local: the server's model.
        shared: what ``describe`` gave on the first server.

    Returns:
        The protocol's text. Number of weights, names, sizes and aggregation are looked at one after the other, each
        in bytewise order of the names.

    Raises:
        StoreError: the shared text is no such description.
    """
    features = _features(shared)
    if len(features) != len(local):
        return (
            f"The number {len(local)} of local features != the number {len(features)} declared in the the "
            "distributed cache"
        )
    for name in features:
        if name not in local.by_name:
            return (
                "The features are inconsistent with that declared in distributed cache: cannot find feature "
                f"{name} in local"
            )
    for name, (size, _) in features.items():
        own = local.by_name[name].size * _BYTES_PER_VALUE
        if own != size:
            return f"The feature size {own} of local != that {size} declared in the distributed cache, feature: {name}"
    for name, (_, aggregated) in features.items():
        flag = local.by_name[name].aggregated
        if flag != aggregated:
            return (
                f"The feature require_aggr {flag:d} of local != that {aggregated:d} declared in the distributed "
                f"cache, feature: {name}"
            )
    return None


def _features(text: bytes | str) -> dict[str, tuple[int, bool]]:
    """Size in bytes and aggregation by name, in bytewise order."""
    try:
        features: dict[str, Any] = json.loads(text if isinstance(text, str) else text.decode())["features"]
        found = {
            name: (_typed(int, feature["size"]), _typed(bool, feature["require_aggr"]))
            for name, feature in features.items()
        }
        return dict(sorted(found.items(), key=lambda item: item[0].encode()))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as fault:
        raise StoreError(
            f"the description of the model in Redis cannot be read ({type(fault).__name__}: {fault})",
            hint="delete the key ModelInfo of this job once no server runs, then start the servers again",
        ) from fault


def _typed(kind: type[T], value: object) -> T:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value
