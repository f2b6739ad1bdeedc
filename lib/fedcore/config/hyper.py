"""The hyper-parameters that servers of one job share through Redis and operators see in /queryInstance.

The first server of an instance writes them, or the scheduler when it starts a new instance; every other server
takes them in place of its file's. One table says where each lives in Settings. Nothing here reads Redis or a file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from operator import attrgetter
from typing import Any, NoReturn

from fedcore.config.keys import U32_MAX, Key, Kind, Limits, plain_text
from fedcore.config.settings import KEYS, EncryptType, Settings
from fedcore.core.quorum import to_float32
from fedcore.errors import ConfigError, StoreError

_NOWHERE = ""  # secure_aggregation: no key of the file sets it, and nobody uses it

# Name in Redis -> path in Settings, in the order of MindSpore Federated 0.1.
_PLACES = {
    "global_iteration_time_window": "round.global_iteration_time_window",
    "start_fl_job_threshold": "round.start_fl_job_threshold",
    "start_fl_job_time_window": "round.start_fl_job_time_window",
    "update_model_ratio": "round.update_model_ratio",
    "update_model_time_window": "round.update_model_time_window",
    "client_epoch_num": "client.client_epoch_num",
    "client_batch_size": "client.client_batch_size",
    "client_learning_rate": "client.client_learning_rate",
    "fl_iteration_num": "fl_iteration_num",
    "aggregation_type": "aggregation.aggregation_type",
    "iid_rate": "aggregation.iid_rate",
    "total_client_num": "aggregation.total_client_num",
    "secure_aggregation": _NOWHERE,
    "encrypt_type": "encrypt.encrypt_type",
    "share_secrets_ratio": "encrypt.pw_encrypt.share_secrets_ratio",
    "cipher_time_window": "encrypt.pw_encrypt.cipher_time_window",
    "reconstruct_secrets_threshold": "encrypt.pw_encrypt.reconstruct_secrets_threshold",
    "dp_eps": "encrypt.dp_encrypt.dp_eps",
    "dp_delta": "encrypt.dp_encrypt.dp_delta",
    "dp_norm_clip": "encrypt.dp_encrypt.dp_norm_clip",
    "sign_k": "encrypt.signds.sign_k",
    "sign_eps": "encrypt.signds.sign_eps",
    "sign_thr_ratio": "encrypt.signds.sign_thr_ratio",
    "sign_global_lr": "encrypt.signds.sign_global_lr",
    "sign_dim_out": "encrypt.signds.sign_dim_out",
    "upload_compress_type": "compression.upload_compress_type",
    "upload_sparse_rate": "compression.upload_sparse_rate",
    "download_compress_type": "compression.download_compress_type",
    "enable_ssl": "enable_ssl",
    "pki_verify": "client_verify.pki_verify",
}
# What the original does not share. It is compared and not taken over: it must be right on the devices, too.
_OWN_PLACES = {"mask_layout": "fedcore.secure_aggregation.mask_layout"}
_KEYS = {key.path: key for key in KEYS}
_MUST_AGREE = ("enable_ssl", "pki_verify")
_REMEDY = "start a new instance, or delete the key hyperParams of this one so that a server writes it again"

# What newInstance may change, in the order in which it is checked.
_CHANGEABLE: dict[str, Kind] = {
    "global_iteration_time_window": Kind.INT,
    "start_fl_job_threshold": Kind.INT,
    "start_fl_job_time_window": Kind.INT,
    "update_model_ratio": Kind.FLOAT,
    "update_model_time_window": Kind.INT,
    "client_epoch_num": Kind.INT,
    "client_batch_size": Kind.INT,
    "client_learning_rate": Kind.FLOAT,
    "fl_iteration_num": Kind.INT,
}


class BadRequest(ValueError):
    """A newInstance request cannot be merged; the text is the protocol's."""


def hyper_parameters(settings: Settings) -> dict[str, object]:
    """The 30 shared values of MindSpore Federated 0.1, in its order, and after them ours.

    Fractions are float32 widened to double, as devices see them: 0.8 becomes 0.800000011920929. Those of a
    protection that is not selected are the defaults.

    Args:
        settings: settings of a server.

    Returns:
        Name to int, float, bool or str, ready for JSON.
    """
    places = {**_PLACES, **_OWN_PLACES}
    return {name: _plain(attrgetter(path)(settings)) if path else False for name, path in places.items()}


def parse_json(text: bytes | str) -> object:
    """Read JSON in UTF-8, all of whose numbers are finite.

    Raises:
        ValueError: it is something else, or nested too deeply.
    """
    try:
        return json.loads(
            text if isinstance(text, str) else text.decode("utf-8-sig"),
            parse_constant=_not_a_number,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_object(text: bytes | str) -> dict[str, Any]:
    """Read hyper-parameters, whichever there are.

    Raises:
        StoreError: they are no JSON object.
    """
    try:
        values = parse_json(text)
    except ValueError as fault:
        raise StoreError(f"the hyper-parameters in Redis are not JSON: {fault}", hint=_REMEDY) from fault
    if not isinstance(values, dict):
        raise StoreError("the hyper-parameters in Redis are not a JSON object", hint=_REMEDY)
    return values


def parse_shared(text: bytes | str) -> dict[str, Any]:
    """Read the hyper-parameters that Redis holds; their values are judged by ``adopt``.

    Args:
        text: content of the key hyperParams.

    Returns:
        All 30 values by name, and those that only some versions know.

    Raises:
        StoreError: not a JSON object, or a value is missing.
    """
    values = parse_object(text)
    missing = [name for name in _PLACES if name not in values]
    if missing:
        raise StoreError(f"the hyper-parameters in Redis lack {', '.join(missing)}", hint=_REMEDY)
    return values


def differences(local: Mapping[str, object], shared: Mapping[str, object]) -> list[str]:
    """What of a server's own values gives way to the cluster's: one sentence each.

    Args:
        local: ``hyper_parameters`` of the server's settings.
        shared: those of Redis.

    Returns:
        Sentences in the order of the values. What must agree is left to ``conflict``.
    """
    return [
        f"{name} is {plain_text(local[name])} here, {plain_text(shared[name])} in the cluster; "
        "the cluster's value is used"
        for name, path in _PLACES.items()
        if path and name not in _MUST_AGREE and _differ(local[name], shared[name])
    ]


def conflict(local: Mapping[str, object], shared: Mapping[str, object]) -> str | None:
    """Why a server cannot join: it and the cluster differ in what must agree; None if they do not.

    The layout of masks must agree where the cluster masks: each server may be the one that takes them off. A version
    that knows no layouts has written none.
    """
    names = list(_MUST_AGREE)
    if shared["encrypt_type"] == EncryptType.PW_ENCRYPT:
        names += [name for name in _OWN_PLACES if name in shared]
    for name in names:
        if local[name] != shared[name]:
            return (
                f"Context '{name}' {_digit(local[name])} of local != that {_digit(shared[name])} declared in "
                "distributed cache."
            )
    return None


def adopt(settings: Settings, shared: Mapping[str, object]) -> Settings:
    """Put the cluster's values in place of a file's.

    Args:
        settings: a server's settings.
        shared: what ``parse_shared`` gave.

    Returns:
        A copy with all shared values; ranges are checked where the value is in force.

    Raises:
        ConfigError: values that this version does not know or that are out of range, one per line.
    """
    values = {path: shared[name] for name, path in _PLACES.items() if path}
    adopted: dict[str, object] = {}
    faults = []
    for path, value in values.items():
        key = _KEYS[path]
        condition = key.condition
        in_force = condition is None or values.get(condition.path) in condition.values
        try:
            adopted[path] = _setting(key, value, in_force)
        except ConfigError as fault:
            faults.append(str(fault))
    if faults:
        raise ConfigError("\n".join(faults))
    return _replaced(settings, adopted)  # type: ignore[no-any-return]


def merge(current: Mapping[str, object], requested: object) -> dict[str, object]:
    """Apply a newInstance request to the current hyper-parameters.

    The original accepts 0 for the integers, which no cluster can run with; here it is refused.

    Args:
        current: those of the running instance.
        requested: the request's JSON; what it does not name stays, what is unknown is ignored.

    Returns:
        The hyper-parameters of the new instance.

    Raises:
        BadRequest: it cannot be applied.
    """
    if not isinstance(requested, dict):
        raise BadRequest("Expect hyper param config to be json object")
    merged = dict(current)
    for name, kind in _CHANGEABLE.items():
        if name in requested:
            value = requested[name]
            merged[name] = (
                _requested_integer(name, value) if kind is Kind.INT else _requested_number(name, value)
            )
    return merged


def _requested_integer(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= U32_MAX:
        raise BadRequest(f"Field {name} in hyper param config should be unsigned integer number")
    if value == 0:
        raise BadRequest(f"Field {name} in hyper param config should be larger than 0")
    return value


def _requested_number(name: str, value: object) -> float:
    number = _single(value)
    if number is None:
        raise BadRequest(f"Field {name} in hyper param config should be float or integer number")
    if name == "update_model_ratio" and not 0.0 < number <= 1.0:
        raise BadRequest(f"Field {name} in hyper param config should be in range of (0,1.0]")
    if number <= 0.0:
        raise BadRequest(f"Field {name} in hyper param config should be greater than 0")
    return number


def _single(value: object) -> float | None:
    """A number as devices see it, in single precision; None for what is no number, or beyond that."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = to_float32(float(value))
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _plain(value: object) -> object:
    """A setting as JSON holds it."""
    if isinstance(value, float):
        return to_float32(value)
    return str(value) if isinstance(value, str) else value


def _differ(local: object, shared: object) -> bool:
    if isinstance(local, float):
        return _single(shared) != to_float32(local)
    return type(local) is not type(shared) or local != shared


def _digit(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else plain_text(value)


def _setting(key: Key, value: object, in_force: bool) -> object:
    """The setting that a shared value stands for.

    Raises:
        ConfigError: it has another type, is unknown or out of range.
    """
    kind, choices = key.option.kind, key.option.choices
    if choices:
        if not isinstance(value, str) or value not in choices:
            raise _unusable(key, value, f"this version knows {', '.join(choices)}")
        return type(choices[0])(value)
    number = _single(value)
    if kind is Kind.BOOL and isinstance(value, bool):
        return value
    if kind is Kind.INT and number is not None and isinstance(value, int):
        _check_limits(key, value, value, in_force)
        return value
    if kind is Kind.FLOAT and number is not None:
        _check_limits(key, number, value, in_force)
        return number
    raise _unusable(key, value, f"its type should be {kind.value}")


def _check_limits(key: Key, number: float, given: object, in_force: bool) -> None:
    """A default may lie outside: it stands for "not used"."""
    limits: Limits | None = key.option.limits
    if in_force and limits is not None and number != key.option.default and not limits.holds(number):
        raise _unusable(key, given, f"it should be in {limits}")


def _unusable(key: Key, value: object, reason: str) -> ConfigError:
    name = key.path.rpartition(".")[2]
    return ConfigError(f"{name} is {plain_text(value)} in the cluster: {reason}", hint=_REMEDY)


def _replaced(tree: Any, values: Mapping[str, object], prefix: str = "") -> Any:
    """A copy of a tree of dataclasses with the values below ``prefix`` put in."""
    changed = {}
    for member in fields(tree):
        path = prefix + member.name
        if path in values:
            changed[member.name] = values[path]
        elif is_dataclass(branch := getattr(tree, member.name)) and _reaches(path + ".", values):
            changed[member.name] = _replaced(branch, values, path + ".")
    return replace(tree, **changed)


def _reaches(prefix: str, values: Mapping[str, object]) -> bool:
    return any(path.startswith(prefix) for path in values)


def _not_a_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large")
    return number
