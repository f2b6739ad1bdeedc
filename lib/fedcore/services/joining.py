"""How a server takes part in a job: it finds or makes the instance, and agrees with the others on what rules it.

The first server of an instance writes the hyper-parameters and the description of the model, every later one takes the
former over, in place of its file's, and compares the latter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twisted.logger import Logger

from fedcore.config import Role, Settings, hyper_parameters, unsupported
from fedcore.config import hyper as shared_values
from fedcore.config.crosscheck import forced, in_force, protection_faults
from fedcore.core import model_info
from fedcore.core.job import RunningState
from fedcore.errors import ConfigError, StoreUnavailable
from fedcore.services.recovery import Memory
from fedcore.store.cluster_state import ClusterState, Snapshot, claim_instance
from fedcore.store.instances import hyper_parameters_text
from fedcore.store.keys import job_ttl
from fedcore.store.redis import Redis
from fedcore.wire.arrays import Layout

if TYPE_CHECKING:
    from fedcore.services.iteration_driver import IterationDriver, Parts

log = Logger()


@dataclass(frozen=True, slots=True)
class Joined:
    """A server's part in an instance.

    Attributes:
        cluster: the shared state of the instance.
        settings: the file's, with the values that the cluster shares.
        snapshot: where the instance is.
    """

    cluster: ClusterState
    settings: Settings
    snapshot: Snapshot


async def join(
    redis: Redis, settings: Settings, layout: Layout, proposed: str, first: int, base: str, epoch: int = 0
) -> Joined:
    """Join the job's instance, making it if there is none.

    Args:
        redis: the connection.
        settings: the file's.
        layout: of the server's model.
        proposed: name of the instance if this server makes it.
        first: number of its first iteration if its status is not there yet.
        base: digest of the model that it begins with then.
        epoch: how many instances the job had before it then.

    Raises:
        ConfigError: server and cluster contradict each other; waiting does not help.
        StoreError: Redis cannot be reached, or holds what cannot be read.
    """
    ttl = job_ttl(settings.round.global_iteration_time_window)
    instance = await claim_instance(redis, settings.fl_name, proposed, ttl)
    cluster = ClusterState(redis, settings.fl_name, instance, settings.round.global_iteration_time_window)
    if instance == proposed and first > 1:
        await cluster.await_founders()
    settings = await _agree_on_values(cluster, settings)
    await _agree_on_model(cluster, layout)
    running = RunningState.FINISH if first > settings.fl_iteration_num else RunningState.RUNNING
    await cluster.create(first, success=True, result="", running=running, base=base, epoch=epoch)
    snapshot = (await cluster.read()).snapshot
    if snapshot is None:
        raise StoreUnavailable("Redis forgets the status as soon as it is written")
    log.info(
        "joined instance {instance} at iteration {iteration}",
        instance=instance,
        iteration=snapshot.iteration.number,
    )
    return Joined(cluster, settings, snapshot)


async def _agree_on_values(cluster: ClusterState, settings: Settings) -> Settings:
    """Write the hyper-parameters, or take over those that are there."""
    local = hyper_parameters(settings)
    await cluster.offer_hyper_parameters(local)
    text = await hyper_parameters_text(cluster.redis, settings.fl_name, cluster.keys.instance)
    if text is None:
        raise StoreUnavailable("Redis forgets the hyper-parameters as soon as they are written")
    shared = shared_values.parse_shared(text)
    conflict = shared_values.conflict(local, shared)
    if conflict is not None:
        raise ConfigError(
            f"{conflict}\nSync hyper params with distributed cache failed, distributed_cache_address: "
            f"{settings.distributed_cache.address}",
            hint="set the same value on all servers",
        )
    for sentence in shared_values.differences(local, shared):
        log.warn("{difference}", difference=sentence)
    asked = shared_values.adopt(settings, shared)
    for warning in forced(asked):
        log.warn("{warning}", warning=warning)
    adopted = in_force(asked)
    faults = [*unsupported(adopted, Role.SERVER), *protection_faults(adopted)]
    if faults:
        raise ConfigError("\n".join(faults), hint="the cluster's hyper-parameters ask for it")
    return adopted


async def _agree_on_model(cluster: ClusterState, layout: Layout) -> None:
    """Write the description of the model, or compare it with the one that is there."""
    shared = await cluster.offer_model_info(model_info.describe(layout))
    mismatch = model_info.mismatch(layout, shared)
    if mismatch is not None:
        raise ConfigError(
            mismatch,
            hint=f"give all servers of {cluster.keys.fl_name} the same model; for another model take another "
            "fl_name, or delete the ModelInfo key of this one while no server runs",
        )


class Joining:
    """One server's way into the instances of its job; it works for the driver.

    A server that has left an instance for a newer one, and finds the old one again as Redis has lost the newer, goes on
    where it was: its copy of the iteration, its memory and its ledgers are kept until it takes part in another one.
    """

    def __init__(
        self,
        driver: IterationDriver,
        parts: Parts,
        memory: Memory,
        settings: Settings,
        new_instance_name: Callable[[], str],
    ) -> None:
        """Join the job of ``settings``, those of the file."""
        self._driver = driver
        self._parts = parts
        self._memory = memory
        self._settings = settings
        self._new_instance_name = new_instance_name
        self._joining = False
        self._follows = False  # whether this server was in an instance before the one that it is to join
        self._left = ""  # the instance whose state this server still holds

    def leave(self, instance: str) -> None:
        """Take notice that an instance was left for a newer one."""
        self._follows, self._left = True, instance

    async def join(self) -> None:
        """Find or make the job's instance, and take up its current iteration; nothing if that is under way or done."""
        driver = self._driver
        if self._joining:
            return
        self._joining = True
        try:
            await self._parts.redis.connected()
            if not driver.running or driver.cluster is not None:
                return
            models = self._parts.models
            joined = await join(
                self._parts.redis,
                self._settings,
                models.newest_image.layout,
                self._new_instance_name(),
                1 if self._follows else models.newest + 1,
                models.newest_image.digest,
                self._memory.epoch + 1 if self._follows else 0,
            )
            back, self._left = joined.cluster.keys.instance == self._left, ""
            if back:
                driver.go_on(joined)
            else:
                driver.take_part(joined)
        except ConfigError as error:
            driver.on_fatal(error)
            return
        finally:
            self._joining = False
        for callback in driver.on_join:
            callback()
        if back:
            await driver.remind()
        await driver.repair()
