"""Two servers on two hosts that cannot reach each other, while both reach Redis: in each phase of an iteration.

The way back is open again after some seconds, and then the iteration completes by itself: nothing that was
acknowledged is lost, and both servers give the same bytes, judged by ``oracle.py``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from integration.cluster import wait_until
from integration.faults import Fleet, NodeLinks, Run, fleet_of
from integration.schedule import node_links_of
from integration.watching import RedisReader, status_of

TWO_HOSTS = {0: 0, 1: 1}
PLACES = 6
EVERYBODY = frozenset(range(PLACES))
CUT_S = 2.0  # less than any time-out of the channel, more than two looks of a server
RETURN_S = 3.0  # from the return of the links to the model
LOST = "fl_updates_lost_total"
Cut = Callable[[NodeLinks, int], None]

CUTS = pytest.mark.parametrize("cut", [NodeLinks.cut, NodeLinks.vanish], ids=["refused", "silent"])


def spread_uploads(run: Run) -> None:
    """Let all clients but the last one upload, half of them to each server."""
    run.start_all(range(PLACES))
    run.upload(range(PLACES // 2), server=1)
    run.upload(range(PLACES // 2, PLACES - 1), server=0)


def complete_when_cut(fleet: Fleet, run: Run, cut: Cut, answers: int) -> None:
    """Let server 0 complete the iteration and cut the links after so many answers that it gets from server 1."""
    way = node_links_of(fleet).links[0, 1]
    way.mute(after=answers) if answers else way.mute()
    run.upload([PLACES - 1], server=0)
    wait_until(lambda: way.held, "server 1 has answered")
    cut(node_links_of(fleet), 1)


def phase_of(fleet: Fleet) -> tuple[int, str]:
    """Return the number and the phase of the current iteration, as Redis tells them."""
    with RedisReader(fleet.cluster.redis_port) as redis:
        status = status_of(redis)
    return int(status["iterationNum"]), status["phase"]


def judge_after_return(fleet: Fleet, run: Run) -> None:
    """Bring the links back; the iteration must be complete soon, and the next one like any other."""
    node_links_of(fleet).restore(1)
    returned = time.monotonic()
    run.see_everywhere(1)
    assert time.monotonic() - returned < RETURN_S
    run.fetch(range(PLACES))
    spread_uploads(run)
    run.upload([PLACES - 1], server=1)
    run.fetch(range(PLACES))
    run.see_everywhere(2)
    assert run.judge(quorum=PLACES).members == {1: EVERYBODY, 2: EVERYBODY}
    assert fleet.metric(LOST) == 0


@CUTS
def test_links_cut_while_updates_come_in_delay_the_model_and_lose_nothing(tmp_path: Path, cut: Cut) -> None:
    with fleet_of(tmp_path, TWO_HOSTS, places=PLACES, node_links=True) as fleet, Run(fleet) as run:
        spread_uploads(run)
        cut(node_links_of(fleet), 1)
        run.upload([0], server=0)  # a repeat of what the other server holds
        run.upload([PLACES - 1], server=0)
        threading.Event().wait(CUT_S)
        assert phase_of(fleet) == (1, "reducing")
        judge_after_return(fleet, run)


@CUTS
@pytest.mark.parametrize(
    ("answers", "complaint"),
    [(0, "does not offer its partials"), (1, "could not be read")],
    ids=["sealing", "reading"],
)
def test_links_cut_while_the_finaliser_reads_partials_delay_the_model_and_lose_nothing(
    tmp_path: Path, cut: Cut, answers: int, complaint: str
) -> None:
    """Server 1 has closed its ledger, or sent its sum, and server 0 does not get the answer."""
    with fleet_of(tmp_path, TWO_HOSTS, places=PLACES, node_links=True) as fleet, Run(fleet) as run:
        spread_uploads(run)
        complete_when_cut(fleet, run, cut, answers)
        threading.Event().wait(CUT_S)
        assert phase_of(fleet) == (1, "reducing")
        assert (complaint in fleet.log(0)) == (cut is NodeLinks.cut)  # else it still waits for the answer
        judge_after_return(fleet, run)


@CUTS
def test_links_cut_while_the_new_model_spreads_delay_only_the_server_without_it(
    tmp_path: Path, cut: Cut
) -> None:
    """Server 0 publishes without server 1, which gives out nothing until it has read the model."""
    with fleet_of(tmp_path, TWO_HOSTS, places=PLACES, node_links=True) as fleet, Run(fleet) as run:
        spread_uploads(run)
        node_links_of(fleet).links[1, 0].mute()  # so that server 1 cannot read the model meanwhile
        run.upload([PLACES - 1], server=0)
        wait_until(lambda: phase_of(fleet) == (1, "candidate"), "server 0 has the model")
        cut(node_links_of(fleet), 1)
        cut_at = time.monotonic()
        run.client(0).fetch(0, iteration=1)
        assert time.monotonic() - cut_at < RETURN_S
        wait_until(lambda: not fleet.cluster.ready(1), "server 1 knows that it has no model")
        judge_after_return(fleet, run)
