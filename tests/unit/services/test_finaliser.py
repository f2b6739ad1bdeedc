"""The finaliser where it gives up what it was about to do; tests/model tries it move by move."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from twisted.internet import defer, task

from fedcore.core.iteration import Iteration, Phase
from fedcore.services.finaliser import Finaliser
from fedcore.services.publication import Found
from fedcore.services.recovery import Memory


class Reduction:
    """Stands for the real one, which seals the server's ledger before anything else."""

    def __init__(self) -> None:
        self.sealed = 0

    async def reduce(self, *given: Any) -> None:
        self.sealed += 1


class Publication:
    """Has no model, and takes as long to look for one as ``found`` says."""

    def __init__(self) -> None:
        self.found: defer.Deferred[Found] = defer.Deferred()

    def candidate(self, digest: str) -> None:
        return None

    nominate = held = lambda self, *which: None

    async def obtain(self, *which: Any) -> Found:
        return await self.found


@pytest.mark.parametrize(("then", "sealed"), [(Phase.COLLECTING, 0), (Phase.REDUCING, 1)])
def test_no_ledger_of_a_collecting_iteration_is_sealed(then: Phase, sealed: int) -> None:
    """A candidate was to be made again; while nobody had it, another instance was joined, at the same number."""

    async def refresh_others() -> list[str]:
        return []

    driver: Any = SimpleNamespace(
        iteration=Iteration(1, phase=Phase.CANDIDATE, digest="d"),
        policy=SimpleNamespace(hybrid=False, update_threshold=2),
        models=SimpleNamespace(newest_image=None),
        others=[],
        node_id="me",
        refresh_others=refresh_others,
        joined_cluster=lambda: None,
        epoch=lambda: None,
    )
    parts: Any = SimpleNamespace(reduction=Reduction(), publication=Publication())
    clock = task.Clock()
    spread = defer.Deferred.fromCoroutine(Finaliser(driver, parts, Memory(clock), clock).spread("d"))
    driver.iteration = Iteration(1, phase=then)
    parts.publication.found.callback(Found.NOWHERE)
    assert spread.result is None
    assert parts.reduction.sealed == sealed
