"""What operators do to a job: start it anew, suspend it, let it go on.

Each is one script, one atomic step, told at once to all who listen to the job's changes. A caller that gets
StoreUnavailable does not know whether the step was done; doing it again does no harm, but a second new instance is
one more instance. Servers call ``disable`` too, for a job that somebody else has only marked as suspended.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum

from fedcore.core.iteration import DISABLED
from fedcore.store import keys
from fedcore.store.redis import Argument, Redis

_OLD_INSTANCE_TTL_S = 30  # as in MindSpore Federated 0.1


class Disabling(StrEnum):
    """Answer of ``disable``."""

    DISABLED = "disabled"
    MARKED = "marked"
    ALREADY = "already"
    COMPLETED = "completed"
    MISSING = "missing"


class Enabling(StrEnum):
    """Answer of ``enable``."""

    ENABLED = "enabled"
    FINISHED = "finished"
    ALREADY = "already"
    COMPLETED = "completed"
    MISSING = "missing"


def instance_name_at(moment: datetime) -> str:
    """Return the name of an instance that begins at a moment: ``i_YYYY-mm-dd-HH:MM:SS.mmm.uuu``."""
    milliseconds, microseconds = divmod(moment.microsecond, 1000)
    return f"i_{moment:%Y-%m-%d-%H:%M:%S}.{milliseconds:03d}.{microseconds:03d}"


async def hyper_parameters_text(redis: Redis, fl_name: str, instance: str) -> bytes | None:
    """Return the hyper-parameters of an instance as Redis holds them, None if there are none."""
    text: bytes | None = await redis.command("GET", keys.InstanceKeys(fl_name, instance).hyper_params)
    return text


async def new_instance(
    redis: Redis, fl_name: str, current: str, name: str, hyper_parameters: Mapping[str, object], ttl: int
) -> bool:
    """Start a new instance in iteration 1, running, with the model that the current one has.

    Args:
        redis: the connection.
        fl_name: the job.
        current: the instance that the caller has seen.
        name: of the new one.
        hyper_parameters: of the new one, all of them.
        ttl: seconds that the new keys live without renewal.

    Returns:
        False if the current instance is another one by now, or the name is taken: look again, then repeat.

    Raises:
        StoreUnavailable: Redis gave no answer, or an error.
    """
    old, new = keys.InstanceKeys(fl_name, current), keys.InstanceKeys(fl_name, name)
    names = [keys.instance_name(fl_name), old.status, old.hyper_params, new.status, new.hyper_params]
    text = json.dumps(hyper_parameters, sort_keys=True, separators=(",", ":"), allow_nan=False)
    arguments: list[Argument] = [current, name, text, ttl, _OLD_INSTANCE_TTL_S, keys.changes(fl_name)]
    return bool(await redis.script("new_instance", names, arguments))


async def disable(redis: Redis, fl_name: str, instance: str, ttl: int) -> Disabling:
    """Suspend a job, and end its current iteration in the same step.

    Args:
        redis: the connection.
        fl_name: the job.
        instance: its instance.
        ttl: seconds that the status lives on without renewal.

    Returns:
        DISABLED: done. MARKED: ``runningState`` stood at 1 already but the iteration had not ended; it has now.
        ALREADY: nothing was left to do. COMPLETED: the job is finished or stopped. MISSING: Redis holds no status.

    Raises:
        StoreUnavailable: Redis gave no answer, or an error.
    """
    instance_keys = keys.InstanceKeys(fl_name, instance)
    arguments: list[Argument] = [
        instance_keys.prefix,
        DISABLED,
        ttl,
        keys.RELEASE_TTL_S,
        keys.changes(fl_name),
    ]
    word = await redis.script("disable", [instance_keys.status], arguments)
    return Disabling(word.decode())


async def enable(redis: Redis, fl_name: str, instance: str, last_iteration: int, ttl: int) -> Enabling:
    """Let a suspended job go on.

    Args:
        redis: the connection.
        fl_name: the job.
        instance: its instance.
        last_iteration: fl_iteration_num of the instance.
        ttl: seconds that the status lives on without renewal.

    Returns:
        ENABLED: done. FINISHED: the suspension had ended the last iteration, so the job is now finished. ALREADY: it
        was running. COMPLETED: it was finished or stopped. MISSING: Redis holds no status.

    Raises:
        StoreUnavailable: Redis gave no answer, or an error.
    """
    status = keys.InstanceKeys(fl_name, instance).status
    arguments: list[Argument] = [last_iteration, ttl, keys.changes(fl_name)]
    word = await redis.script("enable", [status], arguments)
    return Enabling(word.decode())
