"""Faults at random under load, judged by the oracle; and whether oracle, links and schedules are what they claim.

``FEDCORE_SOAK`` is the number of seconds for all random runs together, with other seeds each time. A run that fails
prints its seed and what was done when; ``FEDCORE_SEED`` repeats it.
"""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
from integration.cluster import wait_until
from integration.faults import Fleet, Run, fleet_of
from integration.links import Link
from integration.oracle import (
    MODEL,
    Acknowledged,
    Answered,
    Journal,
    Outcome,
    judge,
    longest_gap,
    mean_of,
    steps_back,
)
from integration.schedule import NODE_FAULTS, SERVER_FAULTS, Action, Kind, Schedule, perform
from integration.watching import RedisReader, status_of

SOAK_S = float(os.environ.get("FEDCORE_SOAK", "60"))
SEED = os.environ.get("FEDCORE_SEED")
USUAL_SEED = (
    768764649  # of `make test`, which shall say the same twice; it once found a fault. The soak takes others
)
CLIENTS, PLACES, QUORUM = 10, 8, 6
WIPED = "The instance status info stored in distributed cache is empty"
GOOD = Outcome(True, "")


# ---- random runs


@dataclass(frozen=True)
class Setting:
    """One kind of random run.

    Attributes:
        hosts: server -> host at the start.
        schedule: what may happen.
        least: iterations per ten seconds that must be completed.
        may_be_alone: whether the only server may be away too.
    """

    hosts: dict[int, int]
    schedule: Schedule
    least: int
    may_be_alone: bool = False


QUIET = (Kind.REDIS_RESTART, Kind.REDIS_PAUSE)
ON_SERVERS = (Kind.KILL, Kind.KILL, Kind.KILL, Kind.STOP, Kind.PAUSE, Kind.CUT, Kind.HANG, Kind.RESET)
ON_NODE_LINKS = (Kind.NODE_CUT, Kind.NODE_VANISH, Kind.NODE_DEAF, Kind.NODE_MUTE)
SETTINGS = {
    "one server": Setting(
        {0: 0}, Schedule([0], kinds=(*ON_SERVERS, *QUIET), least_there=0), 2, may_be_alone=True
    ),
    "one host": Setting({0: 0, 1: 0}, Schedule([0, 1], [2], (*ON_SERVERS, *QUIET, Kind.ADD)), 3),
    "two hosts": Setting(
        {0: 0, 1: 1, 2: 0},
        Schedule([0, 1, 2], [3], (*ON_SERVERS, *QUIET, *ON_NODE_LINKS, Kind.ADD), most_away=2),
        2,
    ),
    "wipes": Setting(
        {0: 0, 1: 1},
        Schedule([0, 1], [2], (*ON_SERVERS, *QUIET, *ON_NODE_LINKS, Kind.REDIS_WIPE, Kind.REDIS_WIPE)),
        1,
    ),
}


@contextmanager
def told(seed: int, log: list[str]) -> Iterator[None]:
    """Print the seed and what was done if it goes wrong."""
    try:
        yield
    except BaseException:
        print(f"FEDCORE_SEED={seed}", *log, sep="\n")
        raise


def last_iteration(fleet: Fleet) -> int:
    """Wait until nothing moves any more that the clients have set going; return the last iteration that is over."""

    def at_rest() -> int:
        with RedisReader(fleet.cluster.redis_port) as redis:
            status = status_of(redis)
            number, instance = status["iterationNum"], redis.ask("GET", "ms_fl:job:InstanceName:String")
            uploads = redis.ask("HLEN", f"ms_fl:job:{instance}:{number}:uploads:Hash")
        waits = status.get("phase", "collecting") == "collecting" and int(uploads) < QUORUM
        return int(number) if waits else 0

    return wait_until(at_rest, "the last iteration ends", 30) - 1


@pytest.mark.parametrize("name", SETTINGS)
def test_random_faults(tmp_path: Path, name: str) -> None:
    setting, seconds = SETTINGS[name], SOAK_S / len(SETTINGS)
    fresh = random.SystemRandom().randrange(1 << 30) if "FEDCORE_SOAK" in os.environ else USUAL_SEED
    seed = int(SEED) if SEED else fresh
    log: list[str] = []
    actions = setting.schedule.actions(seed, seconds)
    settings: dict[str, Any] = {
        "places": PLACES,
        "update_model_ratio": QUORUM / PLACES,
        "node_links": not NODE_FAULTS.keys().isdisjoint(setting.schedule.kinds),
    }
    with told(seed, log), fleet_of(tmp_path, setting.hosts, **settings) as fleet:
        with Run(fleet, clients=CLIENTS, seed=seed) as run:
            perform(
                run, actions, log, may_be_alone=setting.may_be_alone, hosts=2 if name != "one host" else 1
            )
            run.check_clients()
            fleet.wait_ready()
            run.wait_for_iterations(2, 30)
            run.stop()
            run.see_everywhere(last_iteration(fleet))
        wipes = sum(action.kind is Kind.REDIS_WIPE for action in actions)
        # After a loss Redis counts up to the quorum anew, and then what was promised before comes back (ADR 8).
        quorum = None if wipes else QUORUM
        report = run.judge(may_fail=lambda reason: bool(wipes) and WIPED in reason, quorum=quorum)
        assert min(map(len, report.members.values())) >= QUORUM
        gap = run.prober.gap(run.prober.began)
        print(
            f"{name}: {len(actions)} faults, {len(report.members)} valid and {len(report.failed)} failed "
            f"iterations, {report.acknowledged} promises kept, {report.models} models compared, "
            f"{run.journal.repeated} requests repeated, longest silence {gap:.1f} s"
        )
        assert len(report.members) >= setting.least * seconds / 10
        assert len(report.failed) <= 2 * wipes


# ---- the oracle


def journal_of(
    model: Any, promised: set[int] = frozenset({0, 1}), sent: set[int] = frozenset({0, 1})
) -> Journal:
    """Return the journal of one iteration with a model, given by two servers."""
    journal = Journal()
    for client in sent:
        journal.send(1, client)
    journal.acknowledge(*(Acknowledged(1, client, 0, 1.0) for client in promised))
    for server in (0, 1):
        journal.receive(1, 2, server, model, 2.0)
    return journal


def test_the_oracle_accepts_what_is_right() -> None:
    report = judge(journal_of(mean_of({0, 1}, 1)), {1: GOOD}, quorum=2)
    assert (report.members, report.failed, report.missing) == ({1: frozenset({0, 1})}, {}, frozenset())
    judge(journal_of(mean_of({0, 1}, 1), promised={0}), {1: GOOD})  # the answer to the other one got lost
    report = judge(journal_of(mean_of({0}, 1)), {1: GOOD}, lost=1)
    assert report.missing == {(1, 1)}


@pytest.mark.parametrize(
    ("journal", "outcome", "fault"),
    [
        (journal_of(mean_of({0}, 1)), GOOD, "1 acknowledged updates are in no model, 0 are reported"),
        (journal_of(mean_of([0, 1, 1], 1)), GOOD, "client 1 is counted twice"),
        (journal_of(mean_of({0, 1}, 2)), GOOD, "it is not the mean"),
        (journal_of(mean_of({0, 1}, 1) | {"all": MODEL["all"].reshape(-1) + 1}), GOOD, "it is not the mean"),
        (journal_of(mean_of({0, 1, 2}, 1)), GOOD, r"updates of \[2\] that nobody sent"),
        (
            journal_of({name: values.reshape(-1) for name, values in MODEL.items()}),
            GOOD,
            "no update is in it",
        ),
        (journal_of(mean_of({0}, 1), {0}, {0}), GOOD, "iteration 1 was made of 1 updates instead of 2"),
        (journal_of(mean_of({0, 1}, 1)), Outcome(False, "why"), "iteration 1 failed: why"),
        (journal_of(mean_of({0, 1}, 1)), Outcome(False, ""), "iteration 1 failed: without a reason"),
    ],
)
def test_the_oracle_sees(journal: Journal, outcome: Outcome, fault: str) -> None:
    with pytest.raises(AssertionError, match=fault):
        judge(journal, {1: outcome}, quorum=2)


def test_the_oracle_sees_two_models_of_one_iteration() -> None:
    journal = journal_of(mean_of({0, 1}, 1))
    journal.receive(1, 2, 2, mean_of({0}, 1), 3.0)
    with pytest.raises(AssertionError, match="iteration 1 has several models"):
        judge(journal, {1: GOOD})


def test_the_oracle_sees_a_failed_iteration_that_changes_the_model() -> None:
    journal = journal_of(mean_of({0, 1}, 1))
    journal.receive(2, 3, 0, mean_of({0}, 2), 3.0)
    with pytest.raises(AssertionError, match="iteration 2 failed and yet has another model"):
        judge(journal, {1: GOOD, 2: Outcome(False, "why")}, may_fail=lambda reason: reason == "why")


def test_the_oracle_sees_a_model_that_nobody_saw_and_one_too_early() -> None:
    journal = journal_of(mean_of({0, 1}, 1))
    journal.send(2, 0)
    journal.acknowledge(Acknowledged(2, 0, 0, 3.0))
    judge(journal, {1: GOOD})  # under way
    with pytest.raises(AssertionError, match="nobody ever saw the model of iteration 2"):
        judge(journal, {1: GOOD, 2: GOOD})
    journal.receive(2, 2, 1, mean_of({0, 1}, 1), 4.0)
    with pytest.raises(AssertionError, match="answered for iteration 2 while it served 2"):
        judge(journal, {1: GOOD})


def test_the_oracle_knows_a_model_by_the_failed_iterations_that_kept_it() -> None:
    journal = Journal()
    for iteration, client in product((1, 2), (0, 1)):
        journal.send(iteration, client)
        journal.acknowledge(Acknowledged(iteration, client, 0, 1.0))
    journal.receive(3, 4, 0, mean_of({0, 1}, 1), 3.0)
    failed = Outcome(False, "why")
    report = judge(journal, {1: GOOD, 2: failed, 3: failed}, may_fail=lambda reason: reason == "why")
    assert report.members == {1: frozenset({0, 1})}
    with pytest.raises(AssertionError, match="the model of iteration 2"):  # it has not the updates of 2
        judge(journal, {1: GOOD, 2: GOOD, 3: failed}, may_fail=lambda reason: reason == "why")


def test_the_oracle_sees_steps_back() -> None:
    first = Answered(server=0, life=0, asked=1.0, at=2.0, serving=5, placed=True)
    crossed = replace(first, asked=1.9, at=3.0, serving=4)  # asked before the other was answered
    assert steps_back([first, crossed, replace(first, asked=2.5, at=2.6)]) == []
    back = replace(first, asked=2.1, at=2.2, serving=4, placed=False)
    assert steps_back([first, back]) == ["server 0 (process 0) went back to iteration 4 after 5"]
    assert steps_back([first, replace(back, life=1)]) == []  # a new process may not know yet
    elsewhere = replace(back, server=1, placed=True)
    assert steps_back([first, elsewhere]) == ["server 1 gave a place in iteration 4 after 5"]


def test_the_longest_gap() -> None:
    assert longest_gap([1.0, 2.0, 5.0, 5.5], 0.0, 6.0) == 3.0
    assert longest_gap([1.0, 9.0], 2.0, 6.0) == 4.0
    assert longest_gap([], 2.0, 6.0) == 4.0


# ---- schedules


@pytest.mark.parametrize("name", SETTINGS)
def test_schedules_keep_their_limits(name: str) -> None:
    schedule = SETTINGS[name].schedule
    seen = set()
    for seed in range(30):
        actions = schedule.actions(seed, 120)
        assert actions == schedule.actions(seed, 120)
        assert actions == sorted(actions, key=lambda action: action.at)
        seen |= {action.kind for action in actions}
        assert all(away_at(actions, action.at) <= schedule.most_away for action in actions)
        cuts = [action for action in actions if action.kind in NODE_FAULTS]
        assert all(one.at + one.length < other.at for one, other in pairwise(cuts))
    assert seen == set(schedule.kinds)
    assert schedule.actions(1, 120) != schedule.actions(2, 120)


def away_at(actions: list[Action], moment: float) -> int:
    return sum(
        action.kind in SERVER_FAULTS and action.at <= moment < action.at + action.length for action in actions
    )


# ---- links


class Echo:
    """A server that answers every message with itself.

    Attributes:
        heard: all that came, of one connection after the other.
    """

    def __init__(self) -> None:
        self.heard = b""
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            while data := connection.recv(4096):
                self.heard += data
                connection.sendall(data)
        except OSError:
            return
        finally:
            connection.close()

    def close(self) -> None:
        self._listening.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    """An echo server."""
    echo = Echo()
    yield echo
    echo.close()


@pytest.fixture
def link(echo: Echo) -> Iterator[Link]:
    """A link to the echo server."""
    with Link(echo.port) as link:
        yield link


def connected(link: Link) -> socket.socket:
    return socket.create_connection(("127.0.0.1", link.port), timeout=5)


def says(connection: socket.socket, text: bytes) -> None:
    connection.sendall(text)
    assert connection.recv(4096) == text


def test_a_link_carries_until_it_is_cut(link: Link) -> None:
    with connected(link) as connection:
        says(connection, b"one")
        link.cut()
        assert ended(connection)
    with pytest.raises(ConnectionRefusedError):
        connected(link)
    link.restore()
    with connected(link) as connection:
        says(connection, b"two")
    wait_until(lambda: link.carried == 2 * len(b"one" + b"two"), "all of it is counted")


def test_a_link_that_hangs_accepts_and_delivers_later(link: Link) -> None:
    with connected(link) as before:
        says(before, b"one")
        link.hang()
        with connected(link) as after:
            for connection in (before, after):
                connection.sendall(b"two")
                connection.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    connection.recv(4096)
                connection.settimeout(5)
            link.restore()
            assert before.recv(4096) == after.recv(4096) == b"two"


def test_a_link_that_hangs_can_be_cut(link: Link) -> None:
    link.hang()
    with connected(link) as connection:
        connection.sendall(b"one")
        wait_until(lambda: link.accepted, "the link has it")
        link.cut()
        assert ended(connection)
    link.restore()
    with connected(link) as connection:
        says(connection, b"two")


def test_a_reset_link_carries_new_connections(link: Link) -> None:
    with connected(link) as connection:
        says(connection, b"one")
        link.reset()
        with pytest.raises(ConnectionResetError):
            connection.recv(4096)
    with connected(link) as connection:
        says(connection, b"two")


def test_a_link_that_vanishes_leaves_connections_without_an_answer_and_delivers_later(link: Link) -> None:
    with connected(link) as before:
        says(before, b"one")
        link.vanish()
        before.sendall(b"two")
        before.settimeout(0.2)
        with pytest.raises(TimeoutError):
            before.recv(4096)
        with socket.socket() as after:
            after.settimeout(0.2)
            with pytest.raises(TimeoutError):
                after.connect((link.host, link.port))
        before.settimeout(5)
        link.restore()
        assert before.recv(4096) == b"two"
        with connected(link) as late:
            says(late, b"three")


def test_a_link_that_vanishes_can_be_cut(link: Link) -> None:
    link.vanish()
    link.cut()
    with pytest.raises(ConnectionRefusedError):
        connected(link)
    link.restore()
    with connected(link) as connection:
        says(connection, b"one")


def test_a_mute_link_carries_questions_and_holds_the_answers(link: Link, echo: Echo) -> None:
    with connected(link) as connection:
        says(connection, b"one")
        link.mute()
        connection.sendall(b"two")
        wait_until(lambda: echo.heard == b"onetwo", "the question arrives")
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(4096)
        connection.settimeout(5)
        link.restore()
        assert connection.recv(4096) == b"two"


def ended(connection: socket.socket) -> bool:
    """Tell whether the peer ends or resets the connection."""
    try:
        return connection.recv(4096) == b""
    except ConnectionResetError:
        return True


def test_a_fleet_sees_a_server_that_ends_by_itself(tmp_path: Path) -> None:
    with fleet_of(tmp_path, {0: 0}) as fleet:
        fleet.check_alive()
        process = fleet.cluster.processes[fleet.cluster.name(0)]
        process.terminate()
        process.wait(20)
        with pytest.raises(AssertionError, match="server 0 ended by itself with 0"):
            fleet.check_alive()
