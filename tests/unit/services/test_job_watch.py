"""A scheduler's words about its job."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet import defer, task

from fedcore.services.job_watch import PERIOD_S, JobWatch, in_words
from fedcore.services.operator_api import Refusal


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({}, "state unknown, no node"),
        ({"cluster_state": "CLUSTER_FINISH"}, "CLUSTER_FINISH, no node"),
        (
            {
                "cluster_state": "CLUSTER_READY",
                "nodes": [{"role": r} for r in ("WORKER", "SERVER", "SERVER")],
            },
            "CLUSTER_READY, 2 servers, 1 worker",
        ),
    ],
)
def test_an_answer_in_words(answer: dict[str, Any], words: str) -> None:
    assert in_words(answer) == words


class Api:
    """Answers when the test says so."""

    def __init__(self) -> None:
        self.asked: list[defer.Deferred[dict[str, object]]] = []

    async def state(self) -> dict[str, object]:
        self.asked.append(defer.Deferred())
        return await self.asked[-1]


def test_one_look_at_a_time_and_changes_are_told() -> None:
    api, clock = Api(), task.Clock()
    watch = JobWatch(api, "lenet", clock)  # type: ignore[arg-type]
    told: list[str] = []
    watch.changed = lambda: told.append(watch.state)
    watch.startService()
    clock.advance(PERIOD_S)
    watch.look()
    assert len(api.asked) == 1
    api.asked[0].callback({"cluster_state": "CLUSTER_READY"})
    clock.advance(PERIOD_S)
    api.asked[1].callback({"cluster_state": "CLUSTER_READY"})
    watch.look()
    api.asked[2].errback(Refusal("Cannot find cluster info for lenet"))
    assert told == ["job lenet: CLUSTER_READY, no node", "job lenet: Cannot find cluster info for lenet"]
    watch.stopService()
    assert not clock.getDelayedCalls()
