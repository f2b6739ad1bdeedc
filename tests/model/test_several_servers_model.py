"""Two real servers of one job: in turn, everything around them breaks after each move of an iteration.

Every test runs on one host, where servers read each other's ledgers, and on two, where they ask each other for sums.
Afterwards every update that was accepted is in the model of its iteration exactly once, or the iteration failed for a
reason that it names, and both servers have the same model (``Job.come_to_rest``). What takes longer than a moment is
tried after every second or fourth move only.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from model.cluster import key_of
from model.job_in_memory import TIMEOUTS, Job, in_the_middle
from model.server_in_memory import CLIENTS, Server

from fedcore.core.iteration import server_exited, status_lost

TOGETHER, APART = (1, 1), (1, 2)
MOVES = 64  # of one iteration, with some to spare

topology = pytest.mark.parametrize("hosts", [TOGETHER, APART], ids=["one host", "two hosts"])
each_move = pytest.mark.parametrize("after", range(MOVES))
some_moves = pytest.mark.parametrize("after", range(1, MOVES, 4))
each_place = pytest.mark.parametrize("place", [0, 1], ids="AB")


def two_servers(hosts: tuple[int, int], after: int) -> Job:
    """Servers, so many moves after the updates of iteration 2 have reached them."""
    job = Job(hosts)
    in_the_middle(job, after)
    return job


def at(job: Job, place: int) -> Server:
    server = job.servers[place]
    assert server is not None
    return server


def finish(job: Job) -> None:
    job.come_to_rest()
    assert len(job.living) == 2
    job.close()


def complete(job: Job) -> bool:
    """Tell whether iteration 2 has its quorum, so that nothing may end it but its model."""
    counted = len(job.shared.uploads.get(2, ()))
    return job.number > 2 or counted >= job.policy.update_threshold


@topology
def test_the_moves_cover_a_whole_iteration(hosts: tuple[int, int]) -> None:
    job = Job(hosts)
    assert in_the_middle(job, 1000) < MOVES
    assert set(job.published) == {1, 2}
    assert {server.driver.iteration.number for server in job.living} == {3}
    finish(job)


@topology
@each_place
@each_move
def test_a_server_may_die_and_come_back(hosts: tuple[int, int], place: int, after: int) -> None:
    """At once, on the same host: what is in its ledger is there."""
    job = two_servers(hosts, after)
    job.kill(place)
    job.start(place)
    whole = complete(job)
    job.pass_time(15.0)
    assert not job.failed or not whole
    assert (2 in job.published) or not whole
    finish(job)


@topology
@each_place
@some_moves
def test_a_server_may_die_for_a_while(hosts: tuple[int, int], place: int, after: int) -> None:
    """For less than the others' patience: its ledger is adopted by its neighbour, or waits for it."""
    job = two_servers(hosts, after)
    job.kill(place)
    whole = complete(job)
    job.pass_time(8.0)
    job.start(place)
    job.pass_time(15.0)
    assert (2 in job.published) or not whole
    finish(job)


@each_place
@some_moves
def test_a_neighbour_goes_on_with_the_ledger_of_a_dead_server(place: int, after: int) -> None:
    job = two_servers(TOGETHER, after)
    job.kill(place)
    whole = complete(job)
    job.pass_time(5.0)
    assert (2 in job.published) or not whole
    job.come_to_rest()
    job.close()


@each_place
@some_moves
def test_a_host_that_is_gone_takes_only_its_own_updates_along(place: int, after: int) -> None:
    """They are given up by name, and what the other host holds is not."""
    job = two_servers(APART, after)
    dead = at(job, place)
    own = dead.ledgers.own
    held = {client for client, ledger in job.shared.uploads.get(2, {}).items() if own and ledger == own.id}
    job.given_up.update(fl_id for fl_id in CLIENTS if key_of(fl_id) in held)
    job.kill(place)
    job.pass_time(45.0)
    told = [host.directory / "event.txt" for host in job.hosts.values()]
    given_up = any("accepted updates" in path.read_text() for path in told if path.exists())
    broken = job.promised.get(2, set()) - job.published.get(2, frozenset())
    assert given_up or not broken or 2 in job.failed
    job.come_to_rest(names=TIMEOUTS | {server_exited(number) for number in range(1, 6)})
    job.close()


@topology
@each_place
@each_move
def test_the_connection_of_a_server_to_redis_may_break(
    hosts: tuple[int, int], place: int, after: int
) -> None:
    job = two_servers(hosts, after)
    at(job, place).lose_redis()
    job.moves(3)
    at(job, place).redis.come_back()
    job.pass_time(3.0)
    assert set(job.published) == {1, 2}
    finish(job)


@topology
@each_place
@some_moves
def test_a_server_may_lose_redis_for_longer_than_its_lease(
    hosts: tuple[int, int], place: int, after: int
) -> None:
    """It is not dead: its neighbours see its file, and other hosts ask it."""
    job = two_servers(hosts, after)
    at(job, place).lose_redis()
    job.pass_time(13.0)
    at(job, place).redis.come_back()
    job.pass_time(15.0)
    assert not job.failed
    finish(job)


@topology
@each_move
def test_the_link_between_the_nodes_may_break(hosts: tuple[int, int], after: int) -> None:
    job = two_servers(hosts, after)
    job.network.break_off()
    job.pass_time(3.0)
    assert set(job.published) == {1, 2}
    finish(job)


def _silent(job: Job) -> None:
    job.network.silent = True


def _closed(job: Job) -> None:
    job.network.break_off()
    job.network.closed = True


def _lossy(job: Job) -> None:
    job.network.lossy = True


@topology
@pytest.mark.parametrize("spoil", [_silent, _closed, _lossy])
@some_moves
def test_the_link_between_the_nodes_may_be_bad_for_a_while(
    hosts: tuple[int, int], spoil: Callable[[Job], None], after: int
) -> None:
    """Messages vanish, connections break, or replies are lost: the iteration waits as long as it has to."""
    job = two_servers(hosts, after)
    spoil(job)
    job.pass_time(12.0)
    job.network.silent = job.network.closed = job.network.lossy = False
    job.pass_time(15.0)
    assert set(job.published) == {1, 2}
    finish(job)


def lose_redis(job: Job) -> None:
    for server in job.living:
        server.lose_redis()


@topology
@each_move
def test_redis_may_lose_its_last_writes(hosts: tuple[int, int], after: int) -> None:
    """All since the updates were sent; whoever comes back first, both tell it what they know."""
    first = after % 2
    job = two_servers(hosts, 0)
    before = job.store.copy()
    job.moves(after)
    lose_redis(job)
    job.store.fail_over(before)
    at(job, first).redis.come_back()
    job.moves(after // 4)
    at(job, 1 - first).redis.come_back()
    job.pass_time(25.0)
    assert set(job.published) == {1, 2}
    finish(job)


@topology
@some_moves
def test_a_replica_of_redis_may_take_over(hosts: tuple[int, int], after: int) -> None:
    """It has what was waited for."""
    job = two_servers(hosts, 0)
    job.store.wait()
    job.moves(after)
    lose_redis(job)
    job.store.fail_over(job.store.standby)
    for server in job.living:
        server.redis.come_back()
    job.pass_time(25.0)
    assert set(job.published) == {1, 2}
    finish(job)


@topology
@some_moves
def test_redis_may_lose_everything(hosts: tuple[int, int], after: int) -> None:
    job = two_servers(hosts, after)
    lose_redis(job)
    job.store.fail_over(None)
    for server in job.living:
        server.redis.come_back()
    job.pass_time(25.0)
    assert not job.failed
    finish(job)


@topology
@each_place
@pytest.mark.parametrize("after", range(0, MOVES, 2))
def test_redis_may_lose_its_last_writes_while_a_server_dies(
    hosts: tuple[int, int], place: int, after: int
) -> None:
    """The dead server's ledger is all that is left of what only it knew; a candidate's updates may be past help."""
    job = two_servers(hosts, 0)
    before = job.store.copy()
    job.moves(after)
    lose_redis(job)
    job.store.fail_over(before)
    job.kill(place)
    at(job, 1 - place).redis.come_back()
    job.pass_time(2.0)
    job.start(place)
    job.pass_time(25.0)
    job.come_to_rest(names=TIMEOUTS | {status_lost(2)})
    job.close()


@each_place
def test_a_full_disk_is_made_up_for_by_the_other_host(place: int) -> None:
    """A model that another process holds may be published."""
    job = two_servers(APART, 0)
    job.hosts[place + 1].full = True
    job.pass_time(3.0)
    assert set(job.published) == {1, 2}
    finish(job)


@topology
def test_a_quiet_history_publishes_model_after_model(hosts: tuple[int, int]) -> None:
    """No iteration waits for a tick, and devices of both servers are in the models."""
    job = Job(hosts)
    job.pass_time(1.0)
    for _ in range(10):
        for fl_id in CLIENTS[:4]:
            job.device_starts(fl_id)
        job.settle()
        for fl_id in CLIENTS[:4]:
            job.device_uploads(fl_id)
        job.settle()
    assert job.failed == {}
    assert sorted(job.published) == list(range(1, 11))
    asked = {fl_id: CLIENTS.index(fl_id) % 2 for fl_id in CLIENTS}
    assert all({asked[fl_id] for fl_id in updates} == {0, 1} for updates in job.published.values())
    finish(job)
