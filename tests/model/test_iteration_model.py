"""Random histories of a cluster: what never happens, and that the job always goes on."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from model.cluster import Fault, Server, World

from fedcore.core.iteration import GLOBAL_TIMEOUT, Phase, Policy, round_timeout, server_exited
from fedcore.core.job import RunningState

POLICY = Policy(
    start_threshold=3,
    update_threshold=2,
    start_window=10.0,
    update_window=15.0,
    global_window=20.0,
    last_iteration=1000,
)
PATIENCE = 40  # ticks of a second: the longest window and what may have to be repeated
CLIENTS = st.sampled_from([f"c{i}" for i in range(6)])
HOSTS = st.integers(0, 2)


def reasons(number: int) -> set[str]:
    """Why an iteration may fail."""
    return {
        GLOBAL_TIMEOUT,
        round_timeout("startFLJob"),
        round_timeout("updateModel"),
        server_exited(number),
    }


class ClusterHistory(RuleBasedStateMachine):
    """One to three servers, devices that come and go, and everything that may break."""

    @initialize(hosts=st.integers(1, 3), last=st.sampled_from([2, POLICY.last_iteration]))
    def begin(self, hosts: int, last: int) -> None:
        policy = Policy(
            **{**{name: getattr(POLICY, name) for name in POLICY.__slots__}, "last_iteration": last}
        )
        self.world = World(hosts, policy)
        self.reached = (0, 0)
        self.seen: dict[str, int] = {}

    def alive(self, index: int) -> Server | None:
        """The server of a host, if it lives."""
        hosts = sorted(self.world.disks)
        return self.world.servers.get(hosts[index % len(hosts)])

    def on(self, index: int, action: Callable[[Server], object]) -> None:
        server = self.alive(index)
        if server is not None:
            action(server)

    # ---- devices

    @rule(index=HOSTS, fl_id=CLIENTS)
    def device_starts(self, index: int, fl_id: str) -> None:
        self.on(index, lambda server: server.start_client(fl_id))

    @rule(index=HOSTS, fl_id=CLIENTS)
    def device_uploads(self, index: int, fl_id: str) -> None:
        self.on(index, lambda server: server.upload(fl_id))

    @rule(
        index=HOSTS,
        other=HOSTS,
        fl_ids=st.lists(CLIENTS, unique=True, min_size=2, max_size=3),
        last=st.sampled_from(Fault),
        then=st.sampled_from(Fault),
    )
    def devices_take_part(self, index: int, other: int, fl_ids: list[str], last: Fault, then: Fault) -> None:
        """Each asks any server, as a load balancer has it; the last upload may break, or what follows from it."""
        for fl_id in fl_ids:
            self.on(index, lambda server, fl_id=fl_id: server.start_client(fl_id))  # type: ignore[misc]
            if fl_id == fl_ids[-1]:
                self.on(other, lambda server: server.line.break_at(last, 1))
            self.on(other, lambda server, fl_id=fl_id: server.upload(fl_id))  # type: ignore[misc]
            index, other = other, index
        for host in (index, other):
            self.what_a_server_does_breaks(host, then)

    # ---- servers

    @rule(index=HOSTS, steps=st.integers(1, 3))
    def server_goes_on(self, index: int, steps: int) -> None:
        for _ in range(steps):
            self.on(index, lambda server: server.busy and server.perform())

    @rule()
    def all_go_on_until_they_wait(self) -> None:
        for _ in range(8):
            for index in range(3):
                self.server_goes_on(index, 1)

    @rule(index=HOSTS)
    def server_looks(self, index: int) -> None:
        self.on(index, lambda server: server.tick())

    @rule(seconds=st.sampled_from([1, 1, 4, 9, 16, 30]))
    def time_passes(self, seconds: int) -> None:
        """Once a second each server looks; and whatever it does, a step of it takes less than that."""
        for _ in range(seconds):
            self.world.now += 1.0
            for index in range(3):
                self.server_goes_on(index, 1)
                self.server_looks(index)

    # ---- faults

    @rule(index=HOSTS, fault=st.sampled_from([Fault.BEFORE, Fault.AFTER]), steps=st.integers(1, 8))
    def a_connection_will_break(self, index: int, fault: Fault, steps: int) -> None:
        self.on(index, lambda server: server.line.break_at(fault, steps))

    @rule(index=HOSTS, fault=st.sampled_from([Fault.BEFORE, Fault.AFTER]))
    def what_a_server_does_breaks(self, index: int, fault: Fault) -> None:
        def break_it(server: Server) -> None:
            if server.busy and fault is not Fault.NONE:
                server.line.break_at(fault, 1)
                server.perform()
                server.line.mend()

        self.on(index, break_it)

    @rule()
    def connections_come_back(self) -> None:
        for server in self.world.servers.values():
            if server.busy and not server.line.up:
                server.perform()  # what was under way has failed meanwhile
            server.line.up = True
            server.tick()

    @rule(index=HOSTS, again=st.booleans())
    def a_server_is_killed(self, index: int, again: bool) -> None:
        self.on(index, lambda server: self.world.servers.pop(server.host))
        if again:
            self.a_server_is_started(index)

    @rule(index=HOSTS)
    def a_server_is_started(self, index: int) -> None:
        hosts = sorted(self.world.disks)
        host = hosts[index % len(hosts)]
        if host not in self.world.servers:
            self.world.start(host)

    @precondition(lambda self: self.running in (RunningState.RUNNING, RunningState.DISABLE))
    @rule(for_long=st.booleans())
    def the_job_is_switched(self, for_long: bool) -> None:
        status = self.world.shared.status
        assert status is not None
        status.running = RunningState(1 - status.running)
        if not for_long:
            self.time_passes(1)
            if (status := self.world.shared.status).running in (RunningState.RUNNING, RunningState.DISABLE):
                status.running = RunningState.RUNNING

    @property
    def running(self) -> RunningState | None:
        status = self.world.shared.status
        return None if status is None else status.running

    # ---- what always holds

    @invariant()
    def nothing_goes_back(self) -> None:
        status = self.world.shared.status
        if status is not None:
            assert (status.number, status.attempt) >= self.reached
            self.reached = (status.number, status.attempt)
        for server in self.world.servers.values():
            assert server.iteration.number <= self.reached[0]
            assert server.opened == sorted(set(server.opened))

    @invariant()
    def every_iteration_ends_exactly_once(self) -> None:
        status = self.world.shared.status
        ended = set(self.world.published) | set(self.world.failed)
        assert ended == set(range(1, 1 if status is None else status.number))

    @invariant()
    def never_beyond_quorum_or_places(self) -> None:
        shared, policy = self.world.shared, self.world.policy
        assert all(len(uploads) <= policy.update_threshold for uploads in shared.uploads.values())
        assert all(len(clients) <= policy.start_threshold for clients in shared.clients.values())

    @invariant()
    def no_clock_ends_an_iteration_that_was_complete_in_time(self) -> None:
        for number, result in self.world.failed.items():
            completed, started = self.world.shared.completed.get(number), self.world.started[number]
            if completed is not None and started is not None and result != server_exited(number):
                # another server's copy may be a second old; its clock may then win against the seal
                assert completed - started >= self.world.policy.start_window - 2.0  # the shortest of all

    @invariant()
    def what_is_published_is_exactly_what_was_counted(self) -> None:
        for number, model in self.world.published.items():
            assert model.number == number
            assert model.updates == set(self.world.shared.uploads[number])
            assert len(model.updates) == self.world.policy.update_threshold

    @invariant()
    def every_promise_is_kept_or_its_iteration_failed_by_name(self) -> None:
        for number, result in self.world.failed.items():
            assert result in reasons(number)
        for number, model in self.world.published.items():
            assert self.world.promised.get(number, set()) <= model.updates

    @invariant()
    def a_finished_job_stays_finished(self) -> None:
        status = self.world.shared.status
        if status is not None and status.number > self.world.policy.last_iteration:
            assert status.running is RunningState.FINISH
            assert status.number == self.world.policy.last_iteration + 1

    # ---- and from wherever it has come

    def teardown(self) -> None:
        """With all servers alive and connected, the job goes on: first to the next iteration, then to a model."""
        if not hasattr(self, "world"):
            return
        world = self.world
        for host in world.disks:
            if host not in world.servers:
                world.start(host)
        for server in world.servers.values():
            server.line.mend()
        self.connections_come_back()
        self.calm_second()
        status = world.shared.status
        assert status is not None
        if status.running is RunningState.DISABLE:
            status.running = RunningState.RUNNING
        self.until_next("fresh")
        before = len(world.published)
        self.until_next("more")
        finished = world.shared.status is not None and world.shared.status.running is RunningState.FINISH
        assert finished or len(world.published) == before + 1
        self.check_all()

    def until_next(self, name: str) -> None:
        """Let devices come and seconds pass until the iteration is another one."""
        status = self.world.shared.status
        assert status is not None
        number = status.number
        for _ in range(PATIENCE):
            assert self.world.shared.status is not None
            if self.world.shared.status.number > number:
                break
            if self.world.shared.status.running is RunningState.FINISH:
                return
            for fl_id in (f"{name}{i}" for i in range(4)):  # those who are refused return
                for server in self.world.servers.values():
                    server.start_client(fl_id)
            for server in self.world.servers.values():
                for fl_id in self.world.shared.clients.get(number, {}):
                    server.upload(fl_id)
            self.calm_second()
        else:
            raise AssertionError(f"the job hangs in {self.world.shared.status}")
        self.calm_second()

    def calm_second(self) -> None:
        """A second in which nothing breaks."""
        self.world.now += 1.0
        for _ in range(3):
            for server in self.world.servers.values():
                server.tick()
            for _ in range(20):
                for server in self.world.servers.values():
                    if server.busy:
                        server.perform()
        self.check_all()

    def check_all(self) -> None:
        self.nothing_goes_back()
        self.every_iteration_ends_exactly_once()
        self.never_beyond_quorum_or_places()
        self.no_clock_ends_an_iteration_that_was_complete_in_time()
        self.what_is_published_is_exactly_what_was_counted()
        self.every_promise_is_kept_or_its_iteration_failed_by_name()
        self.a_finished_job_stays_finished()


TestClusterHistory = ClusterHistory.TestCase
TestClusterHistory.settings = settings(
    max_examples=300,
    stateful_step_count=80,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def test_a_quiet_history_publishes_a_model_a_second() -> None:
    """The simulation itself works: nothing breaks, and every iteration is valid."""
    history = ClusterHistory()
    history.begin(hosts=2, last=1000)
    for _ in range(20):
        history.until_next("device")
    assert history.world.failed == {}
    assert sorted(history.world.published) == list(range(1, 21))
    assert history.world.shared.status is not None
    assert history.world.shared.status.phase is Phase.COLLECTING
