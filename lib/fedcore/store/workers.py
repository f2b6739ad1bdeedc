"""The list of a job's workers: who is on it, under which name.

A worker renews its entry every second; one that has not for ``keys.HEARTBEAT_TTL_S`` seconds is dead, and whoever reads
the list takes it off. Unlike a server a worker renews nothing else: a job without servers shall be forgotten.
"""

from __future__ import annotations

from datetime import datetime

from fedcore.store import keys
from fedcore.store.redis import Redis

ROLE = "worker"


def worker_id_at(moment: datetime, number: int) -> str:
    """Return the id of a worker that starts at a moment, the protocol's form.

    Args:
        moment: local time.
        number: 10000..99999, by chance: two workers may start in one microsecond.
    """
    milliseconds, microseconds = divmod(moment.microsecond, 1000)
    return f"worker_fl_{moment:%Y-%m-%d-%H:%M:%S}.{milliseconds:03d}.{microseconds:03d}::{number}"


async def register(redis: Redis, fl_name: str, instance: str, worker_id: str, ttl: int) -> str:
    """Put a worker on the list of an instance, or renew its entry, if that instance is still the job's.

    Args:
        redis: the connection.
        fl_name: the job.
        instance: the one that the worker knows, "" if none.
        worker_id: the worker.
        ttl: seconds that the list lives on without renewal.

    Returns:
        Name of the job's instance, "" if there is none. The worker is on the list if it is the one that it knows.

    Raises:
        StoreUnavailable: Redis gave no answer, or an error.
    """
    own = keys.InstanceKeys(fl_name, instance)
    names = [keys.instance_name(fl_name), own.nodes(ROLE), own.heartbeat(ROLE, worker_id)]
    name = await redis.script("register_worker", names, [instance, worker_id, keys.HEARTBEAT_TTL_S, ttl])
    return "" if name is None else name.decode()


async def deregister(redis: Redis, fl_name: str, instance: str, worker_id: str) -> None:
    """Take a worker off the list of an instance.

    Raises:
        StoreUnavailable: Redis gave no answer, or an error; the entry then expires by itself.
    """
    own = keys.InstanceKeys(fl_name, instance)
    await redis.command("HDEL", own.nodes(ROLE), worker_id)
    await redis.command("DEL", own.heartbeat(ROLE, worker_id))
