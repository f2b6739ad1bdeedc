"""The link to a real Redis: who we are there, TLS, which node it is, replicas, Sentinels, notices.

Everything goes through ``launch.redis_of`` and ``launch.notices_of``, so what is tested is what a daemon gets from its
configuration file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from integration.redis_fixture import (
    DEADLINE_S,
    PrivateRedis,
    ReactorThread,
    ask,
    private_redis,
    replicated_redis,
    sentinel_group,
    start_sentinel,
    the_redis_server,
)
from twisted.internet import defer, ssl
from twisted.logger import LogLevel, formatEvent, globalLogPublisher
from twisted.protocols.portforward import ProxyFactory
from twisted.protocols.tls import TLSMemoryBIOFactory

from fedcore.config import Address, RedisTls, Settings, parse_addresses
from fedcore.core.admission import Acceptance, Selection
from fedcore.core.client_key import client_key
from fedcore.core.iteration import Phase
from fedcore.core.job import RunningState
from fedcore.errors import ConfigError, StoreUnavailable
from fedcore.pki.authority import Issued, Role, issue, make_authority
from fedcore.store import notices as notices_module
from fedcore.store import redis as redis_module
from fedcore.store.cluster_state import ClientMeta, ClusterState, Raised, Rebased, Reserve, claim_instance
from fedcore.store.instances import Disabling, Enabling, disable, enable, hyper_parameters_text, new_instance
from fedcore.store.link import RIGHTS
from fedcore.store.notices import Notices
from fedcore.store.redis import Redis
from fedctl.processes import HOST, Family, free_ports, reserved_ports, wait_until
from fldaemons import launch

PASSWORD = "correct horse battery staple"


# ---- what the tests are given


class Journal:
    """What was logged since the beginning of the test."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def texts(self, level: LogLevel | None = None) -> list[str]:
        return [formatEvent(event) for event in list(self.events) if level in (None, event["log_level"])]

    def wait_for(self, words: str, level: LogLevel | None = None) -> str:
        """Wait until a sentence that holds these words has been logged; return it."""
        # what is news is logged at the first attempt, not at the tenth
        wait_until(lambda: any(words in text for text in self.texts(level)), words, 8.0)
        return next(text for text in self.texts(level) if words in text)


@pytest.fixture
def journal() -> Iterator[Journal]:
    journal = Journal()
    globalLogPublisher.addObserver(journal.events.append)
    yield journal
    globalLogPublisher.removeObserver(journal.events.append)
    assert not [text for text in journal.texts() if PASSWORD in text]


def settings_for(port: int, *, cache: dict[str, Any] | None = None, **redis: Any) -> Settings:
    """The settings of a daemon whose Redis is at a port of this machine.

    Args:
        port: of Redis.
        cache: other keys of distributed_cache.
        **redis: keys of fedcore.redis.
    """
    base = Settings()
    own = replace(base.fedcore.redis, **redis)
    given: dict[str, Any] = {"address": Address(HOST, port), **(cache or {})}
    return replace(
        base,
        distributed_cache=replace(base.distributed_cache, **given),
        fedcore=replace(base.fedcore, redis=own),
    )


@contextmanager
def running(loop: ReactorThread, settings: Settings) -> Iterator[Redis]:
    """The link of a daemon with these settings, started, perhaps not connected."""

    def start() -> Redis:
        redis = launch.redis_of(settings, lambda: None, loop.reactor)
        redis.startService()
        return redis

    redis = loop.call(start)
    try:
        yield redis
    finally:
        loop.call(redis.stopService)


@pytest.fixture
def secret(tmp_path: Path) -> str:
    file = tmp_path / "password"
    file.write_text(f"{PASSWORD}\nthe second line does not matter\n")
    file.chmod(0o600)
    return str(file)


def came_up(loop: ReactorThread, redis: Redis) -> None:
    loop.run(redis.connected())
    assert loop.run(redis.command("PING")) == b"PONG"


# ---- who we are


def test_where_nobody_listens_the_key_of_the_address_is_named(loop: ReactorThread, journal: Journal) -> None:
    [port] = free_ports(1)
    with running(loop, settings_for(port)) as redis:
        assert "is distributed_cache.address right?" in journal.wait_for("cannot use Redis")
        assert not redis.available


class TestPassword:
    @pytest.fixture
    def guarded(self, tmp_path: Path) -> Iterator[PrivateRedis]:
        with private_redis(tmp_path / "redis") as server:
            assert server.ask("CONFIG", "SET", "requirepass", PASSWORD) == "+OK"
            yield server

    def test_the_right_one_opens(
        self, loop: ReactorThread, guarded: PrivateRedis, secret: str, journal: Journal
    ) -> None:
        with running(loop, settings_for(guarded.port, password_file=secret)) as redis:
            came_up(loop, redis)

    def test_without_one_the_remedy_is_logged(
        self, loop: ReactorThread, guarded: PrivateRedis, journal: Journal
    ) -> None:
        with running(loop, settings_for(guarded.port)) as redis:
            assert "give fedcore.redis.password_file" in journal.wait_for("NOAUTH", LogLevel.error)
            assert not redis.available
            assert redis.run_id == ""

    def test_a_wrong_one_is_tried_again_until_it_is_right(
        self, loop: ReactorThread, guarded: PrivateRedis, tmp_path: Path, journal: Journal
    ) -> None:
        wrong = tmp_path / "wrong"
        wrong.write_text("rosebud")
        with running(loop, settings_for(guarded.port, password_file=str(wrong))) as redis:
            assert "check fedcore.redis.username" in journal.wait_for("WRONGPASS", LogLevel.error)
            with pytest.raises(StoreUnavailable):
                loop.run(redis.command("PING"))
            loop.call(self.soon_asked(redis))
            assert len([text for text in journal.texts() if "WRONGPASS" in text]) == 1
            with running(loop, settings_for(guarded.port, password_file=str(self.right(tmp_path)))) as other:
                loop.run(other.connected())
                loop.run(other.command("CONFIG", "SET", "requirepass", "rosebud"))
            came_up(loop, redis)

    @staticmethod
    def right(tmp_path: Path) -> Path:
        file = tmp_path / "right"
        file.write_text(PASSWORD)
        return file

    @staticmethod
    def soon_asked(redis: Redis) -> Callable[[], defer.Deferred[None]]:
        """Wait for the second attempt: its failure is no news and not logged."""
        link = redis._link

        async def second() -> None:
            while link._failures < 2:
                await defer.Deferred.fromCoroutine(link._pause())

        return lambda: defer.Deferred.fromCoroutine(second())

    def test_a_needless_one_is_said(
        self, loop: ReactorThread, shared_server: PrivateRedis, secret: str, journal: Journal
    ) -> None:
        with running(loop, settings_for(shared_server.port, password_file=secret)) as redis:
            assert "remove fedcore.redis.username" in journal.wait_for("AUTH", LogLevel.error)
            assert not redis.available

    @pytest.mark.parametrize(
        ("content", "fault"), [(None, "cannot read the password file"), ("\n", "is empty")]
    )
    def test_a_file_that_holds_none_ends_the_start(
        self, loop: ReactorThread, tmp_path: Path, content: str | None, fault: str
    ) -> None:
        file = tmp_path / "password"
        if content is not None:
            file.write_text(content)
        settings = settings_for(1, password_file=str(file))
        with pytest.raises(ConfigError, match=fault):
            launch.redis_of(settings, lambda: None, loop.reactor)

    def test_a_file_that_others_can_read_is_said(
        self, loop: ReactorThread, secret: str, journal: Journal
    ) -> None:
        launch.redis_of(settings_for(1, password_file=secret), lambda: None, loop.reactor)
        assert journal.texts() == []
        Path(secret).chmod(0o640)
        launch.redis_of(settings_for(1, password_file=secret), lambda: None, loop.reactor)
        assert journal.texts() == [f"others can read the password file {secret}: chmod 600 it"]


class TestUser:
    @pytest.fixture
    def guarded(self, tmp_path: Path) -> Iterator[PrivateRedis]:
        with private_redis(tmp_path / "redis") as server:
            self.allow(server, RIGHTS)
            yield server

    @staticmethod
    def allow(server: PrivateRedis, rights: str) -> None:
        assert server.ask("ACL", "SETUSER", "fed", "reset", "on", f">{PASSWORD}", *rights.split()) == "+OK"

    def test_the_documented_rights_are_enough(
        self, loop: ReactorThread, guarded: PrivateRedis, secret: str, journal: Journal
    ) -> None:
        settings = settings_for(guarded.port, username="fed", password_file=secret, database=2)
        with running(loop, settings) as redis:
            came_up(loop, redis)
            loop.run(self.whole_iteration(redis))
            loop.run(redis.refresh())
            loop.run(redis.command("WAIT", 0, 1))
            loop.run(redis.command("SCRIPT", "LOAD", "return 1"))
        heard: list[bytes] = []
        with listening(loop, settings, heard, "ms_fl:job:notices") as notices:
            wait_until(lambda: heard == [b""], "a subscription", DEADLINE_S)
            assert notices.subscribed
            loop.call(lambda: notices.follow("ms_fl:job:others"))
            wait_until(lambda: heard == [b"", b""], "another subscription", DEADLINE_S)

    @staticmethod
    async def whole_iteration(redis: Redis) -> None:
        """Each operation of the shared state at least once."""
        await claim_instance(redis, "job", "i_1", 60)
        state = ClusterState(redis, "job", "i_1", 60_000)
        assert await state.create(1, success=True, result="", running=RunningState.RUNNING, base="b")
        await state.heartbeat("server", "n", "address")
        assert await state.own_ledger("L", "n")
        meta, reserve = ClientMeta(1, 0, 1), Reserve(60_000, 120_000, 5_000)
        for fl_id, expected in (("a", Selection.SELECTED), ("b", None)):
            chosen, _ = await state.select_client(1, fl_id, meta, places=1, fit=True, reserve=reserve)
            assert expected in (chosen, None)
        taken, _, _ = await state.accept_upload(1, 1, 1, "a", quorum=1, ledger_id="L", node_id="n", fit=True)
        assert taken is Acceptance.ACCEPTED
        assert await state.counted(1, "L", ["a"]) == {"a": meta}
        assert await state.uploads_by_ledger(1) == {"L": 1}
        assert await state.uploads(1) == {client_key("a"): "L"}
        assert await state.restore_clients(1, "L", "n", {client_key("c"): meta}) == 1
        assert await state.seal(1, 1, 1)
        assert await state.reopen(1, 1, phase=Phase.SEALED, token="", ledgers=["gone"]) == 0
        assert await state.seal(1, 2, 1)
        token, *_ = await state.claim_reduction(1, 2, "", "n") or ("",)
        assert await state.record_model(1, 2, token, "c", len(await state.uploads(1)), Phase.CANDIDATE)
        end = {"phase": Phase.CANDIDATE, "token": token, "base": "c"}
        assert await state.advance(1, 2, **end, success=True, result="done", finishes=False)
        rebased = await state.rebase(2, "c", "d", result="the model is gone", finishes=False)
        assert rebased is Rebased.REBASED
        await state.forget_interruption()
        await state.finish(2)
        await state.offer_hyper_parameters({"a": 1})
        assert await hyper_parameters_text(redis, "job", "i_1") == b'{"a": 1}'
        assert await state.offer_model_info("[]") == b"[]"
        seen = (await state.read()).snapshot
        assert seen is not None
        ahead = replace(seen, iteration=replace(seen.iteration, attempt=2), started_ago=1.0)
        assert await state.raise_to(ahead) is Raised.RAISED
        assert await state.ledgers() == {"L": "n"}
        assert await state.ledger_owner("L") == "n"
        assert await state.is_alive("server", "n")
        assert len(await state.nodes("server")) == 1
        await state.announce_release()
        await state.forget_ledger("L")
        await state.leave("server", "n")
        assert await state.nodes("server") == []
        assert await new_instance(redis, "job", "i_1", "i_2", {"a": 2}, 60)
        assert await disable(redis, "job", "i_2", 60) is Disabling.DISABLED
        assert await enable(redis, "job", "i_2", 9, 60) is Enabling.ENABLED

    @pytest.mark.parametrize(
        "words",
        [("GET", "other"), ("KEYS", "*"), ("FLUSHALL",), ("PUBLISH", "other", "x"), ("CONFIG", "GET", "*")],
    )
    def test_they_allow_nothing_else(
        self, loop: ReactorThread, guarded: PrivateRedis, secret: str, words: tuple[str, ...]
    ) -> None:
        with running(loop, settings_for(guarded.port, username="fed", password_file=secret)) as redis:
            came_up(loop, redis)
            with pytest.raises(StoreUnavailable, match="NOPERM"):
                loop.run(redis.command(*words))
            assert redis.available

    @pytest.mark.parametrize("right", ["+info", "+ping", "+script|load"])
    def test_a_right_that_is_missed_at_once_is_told_with_all_of_them(
        self, loop: ReactorThread, guarded: PrivateRedis, secret: str, right: str, journal: Journal
    ) -> None:
        self.allow(guarded, RIGHTS.replace(f"{right} ", ""))
        with running(loop, settings_for(guarded.port, username="fed", password_file=secret)) as redis:
            assert RIGHTS in journal.wait_for("NOPERM", LogLevel.error)
            assert not redis.available

    def test_databases_are_apart(
        self, loop: ReactorThread, guarded: PrivateRedis, secret: str, journal: Journal
    ) -> None:
        def settings(database: int) -> Settings:
            return settings_for(guarded.port, username="fed", password_file=secret, database=database)

        with running(loop, settings(0)) as first, running(loop, settings(15)) as last:
            came_up(loop, first)
            came_up(loop, last)
            loop.run(last.command("SET", "ms_fl:where", "here", "EX", 60))
            assert loop.run(first.command("GET", "ms_fl:where")) is None
            assert loop.run(last.command("GET", "ms_fl:where")) == b"here"
        with running(loop, settings(16)):
            assert "fedcore.redis.database must be below" in journal.wait_for("SELECT", LogLevel.error)


# ---- TLS


class Authority:
    """A CA and the certificates that it has signed, in a folder."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self._own = make_authority(directory.name, datetime.now(UTC))
        self.file = self._write("ca.crt", self._own)

    def issue(self, name: str, *hosts: str) -> tuple[str, str]:
        """Sign a certificate for names and IP addresses; return its file and its key's."""
        made = issue(self._own, Role.SERVER, name, datetime.now(UTC), hosts=hosts or [name])
        key_file = self.directory / f"{name}.key"
        key_file.write_bytes(made.key_pem())
        return self._write(f"{name}.crt", made), str(key_file)

    def _write(self, name: str, issued: Issued) -> str:
        file = self.directory / name
        file.write_bytes(issued.certificate_pem())
        return str(file)


@dataclass
class Secured:
    """A Redis with TLS.

    Attributes:
        port: of TLS.
        authority: signed its certificate and those of clients.
        cache: keys of distributed_cache that lead there.
    """

    port: int
    authority: Authority
    cache: dict[str, Any] = field(default_factory=dict)


@contextmanager
def relay(loop: ReactorThread, server: PrivateRedis, options: ssl.CertificateOptions) -> Iterator[int]:
    """End TLS in front of a Redis that was built without it."""

    def listen() -> Any:
        factory = TLSMemoryBIOFactory(options, False, ProxyFactory(HOST, server.port))
        return loop.reactor.listenTCP(0, factory, interface=HOST)

    port = loop.call(listen)
    try:
        yield port.getHost().port
    finally:
        loop.call(port.stopListening)


def built_with_tls() -> bool:
    return b"tls-auth-clients" in Path(the_redis_server()).resolve().read_bytes()


@contextmanager
def secured_redis(
    loop: ReactorThread, directory: Path, authority: Authority, *hosts: str, clients: bool = False
) -> Iterator[Secured]:
    """Run a Redis with TLS, whose certificate is for these hosts; ``clients`` must show one too."""
    certificate, key = authority.issue("redis", *hosts)
    cache = {"cacert_filename": authority.file}
    if built_with_tls():
        with reserved_ports(1) as (port,):
            options: dict[str, str | int] = {
                "tls-port": port,
                "tls-cert-file": certificate,
                "tls-key-file": key,
                "tls-ca-cert-file": authority.file,
                "tls-auth-clients": "yes" if clients else "no",
            }
            with private_redis(directory, options=options):
                yield Secured(port, authority, cache)
        return
    pair = ssl.PrivateCertificate.loadPEM(Path(key).read_bytes() + Path(certificate).read_bytes())
    root = ssl.Certificate.loadPEM(Path(authority.file).read_bytes())
    extra = {"trustRoot": ssl.trustRootFromCertificates([root])} if clients else {}
    accepted = ssl.CertificateOptions(pair.privateKey.original, pair.original, **extra)
    with private_redis(directory) as server, relay(loop, server, accepted) as port:
        yield Secured(port, authority, cache)


class TestTls:
    @pytest.fixture(scope="class")
    @staticmethod
    def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
        return Authority(tmp_path_factory.mktemp("pki") / "good")

    @pytest.fixture(scope="class")
    @staticmethod
    def secured(
        loop: ReactorThread, tmp_path_factory: pytest.TempPathFactory, authority: Authority
    ) -> Iterator[Secured]:
        with secured_redis(
            loop, tmp_path_factory.mktemp("redis"), authority, HOST, "redis.example"
        ) as secured:
            yield secured

    def settings(self, secured: Secured, **cache: Any) -> Settings:
        return settings_for(secured.port, cache={**secured.cache, **cache}, tls=RedisTls.ON)

    @pytest.mark.parametrize("name", ["", "redis.example"])
    def test_a_certificate_for_the_address_or_the_given_name(
        self, loop: ReactorThread, secured: Secured, name: str
    ) -> None:
        with running(loop, self.settings(secured, server_name=name)) as redis:
            came_up(loop, redis)

    def test_enable_ssl_means_redis_too(self, loop: ReactorThread, secured: Secured) -> None:
        settings = settings_for(secured.port, cache=secured.cache)
        with running(loop, replace(settings, enable_ssl=True)) as redis:
            came_up(loop, redis)

    def test_notices_come_the_same_way(self, loop: ReactorThread, secured: Secured) -> None:
        heard: list[bytes] = []
        settings = self.settings(secured)
        with listening(loop, settings, heard, "ms_fl:c"), running(loop, settings) as redis:
            wait_until(lambda: heard == [b""], "a subscription", DEADLINE_S)
            came_up(loop, redis)
            loop.run(redis.command("PUBLISH", "ms_fl:c", "news"))
            wait_until(lambda: heard == [b"", b"news"], "a notice", DEADLINE_S)

    def test_certificates_of_a_folder(self, loop: ReactorThread, secured: Secured, tmp_path: Path) -> None:
        (tmp_path / "0a1b2c3d.0").write_bytes(Path(secured.authority.file).read_bytes())
        (tmp_path / "README").write_text("no certificate")
        with running(loop, self.settings(secured, cacert_filename="", capath=str(tmp_path))) as redis:
            came_up(loop, redis)

    def test_another_ca_is_not_believed(
        self, loop: ReactorThread, secured: Secured, tmp_path: Path, journal: Journal
    ) -> None:
        other = Authority(tmp_path / "other")
        with running(loop, self.settings(secured, cacert_filename=other.file)) as redis:
            assert "distributed_cache.cacert_filename" in journal.wait_for(
                "certificate verify failed", LogLevel.error
            )
            assert not redis.available

    @pytest.mark.parametrize("name", ["other.example", "127.0.0.2"])
    def test_another_host_is_not_believed(
        self, loop: ReactorThread, secured: Secured, name: str, journal: Journal
    ) -> None:
        with running(loop, self.settings(secured, server_name=name)) as redis:
            text = journal.wait_for("its certificate is for another host", LogLevel.error)
            assert "server_name" in text
            assert not redis.available

    def test_a_redis_that_asks_for_a_certificate(
        self, loop: ReactorThread, authority: Authority, tmp_path: Path, journal: Journal
    ) -> None:
        with secured_redis(loop, tmp_path / "redis", authority, HOST, clients=True) as secured:
            with running(loop, self.settings(secured)) as redis:
                journal.wait_for("cannot use Redis")
                assert not redis.available
            certificate, key = authority.issue("server-1")
            own = {"cert_filename": certificate, "private_key_filename": key}
            with running(loop, self.settings(secured, **own)) as redis:
                came_up(loop, redis)

    def test_plain_words_to_a_port_with_tls_are_explained(
        self, loop: ReactorThread, secured: Secured, journal: Journal
    ) -> None:
        with running(loop, settings_for(secured.port, tls=RedisTls.OFF)) as redis:
            journal.wait_for("see fedcore.redis.tls")
            assert not redis.available


# ---- which node it is


class TestNode:
    def test_another_process_has_another_run_id(self, loop: ReactorThread, own_server: PrivateRedis) -> None:
        changes: list[tuple[bool, str]] = []
        with running(loop, settings_for(own_server.port)) as redis:
            redis.on_change.append(lambda available: changes.append((available, redis.run_id)))
            assert redis.run_id == ""
            came_up(loop, redis)
            before = redis.run_id
            assert before == own_server.info("server", "run_id")
            own_server.restart(keep=True)
            wait_until(lambda: len(changes) == 3, "a new connection", DEADLINE_S)
            after = own_server.info("server", "run_id")
            assert before != after
            assert changes == [(True, before), (False, before), (True, after)]

    def test_a_follower_that_fails_does_no_harm(
        self, loop: ReactorThread, shared_server: PrivateRedis, journal: Journal
    ) -> None:
        with running(loop, settings_for(shared_server.port)) as redis:
            redis.on_change.append(lambda available: 1 // 0)  # type: ignore[arg-type,return-value]
            came_up(loop, redis)
            journal.wait_for("whoever follows the connection to Redis has failed")

    def test_scripts_are_called_by_their_digests(self, loop: ReactorThread, own_server: PrivateRedis) -> None:
        with running(loop, settings_for(own_server.port)) as redis:
            came_up(loop, redis)
            state = ClusterState(redis, "job", "i_1", 60_000)
            loop.run(state.read())
            assert own_server.info("commandstats", "cmdstat_eval") == ""
            own_server.ask("SCRIPT", "FLUSH")
            loop.run(state.read())
            assert own_server.info("commandstats", "cmdstat_eval").startswith("calls=1,")

    def test_a_replica_is_not_used_until_it_is_the_master(
        self, loop: ReactorThread, tmp_path: Path, journal: Journal
    ) -> None:
        with replicated_redis(tmp_path) as (_, replica), running(loop, settings_for(replica.port)) as redis:
            journal.wait_for("it is a slave, not the master")
            assert not redis.available
            assert replica.ask("REPLICAOF", "NO", "ONE") == "+OK"
            came_up(loop, redis)

    def test_a_master_that_becomes_a_replica_is_given_up(
        self, loop: ReactorThread, tmp_path: Path, journal: Journal
    ) -> None:
        """Redis does not end the connections itself."""
        with (
            private_redis(tmp_path / "a") as server,
            private_redis(tmp_path / "b") as other,
            running(loop, settings_for(server.port)) as redis,
        ):
            came_up(loop, redis)
            state = ClusterState(redis, "job", "i_1", 60_000)
            server.ask("REPLICAOF", HOST, str(other.port))
            with pytest.raises(StoreUnavailable):
                loop.run(state.create(1, success=True, result="", running=RunningState.RUNNING, base=""))
            assert not redis.available
            journal.wait_for("cannot serve us")
            server.ask("REPLICAOF", "NO", "ONE")
            came_up(loop, redis)
            server.ask("REPLICAOF", HOST, str(other.port))
            with pytest.raises(StoreUnavailable):
                loop.run(redis.refresh())
            assert not redis.available


class TestReplicas:
    def test_without_replicas_there_is_nothing_to_wait_for(
        self, loop: ReactorThread, own_server: PrivateRedis
    ) -> None:
        with running(loop, settings_for(own_server.port)) as redis:
            with pytest.raises(StoreUnavailable):
                loop.run(redis.replicated(100))
            came_up(loop, redis)
            assert redis.replicas == 0
            assert loop.run(redis.replicated(100))
            assert own_server.info("commandstats", "cmdstat_wait") == ""

    def test_a_replica_has_what_was_written(self, loop: ReactorThread, tmp_path: Path) -> None:
        with (
            replicated_redis(tmp_path) as (master, replica),
            running(loop, settings_for(master.port)) as redis,
        ):
            came_up(loop, redis)
            assert redis.replicas == 1
            loop.run(redis.command("SET", "n", 1))
            assert loop.run(redis.replicated(5000))
            assert replica.ask("EXISTS", "n") == ":1"

    def test_one_question_serves_many(self, loop: ReactorThread, tmp_path: Path) -> None:
        with (
            replicated_redis(tmp_path) as (master, _),
            running(loop, settings_for(master.port)) as redis,
        ):
            came_up(loop, redis)

            async def write_and_wait(number: int) -> bool:
                await redis.command("SET", f"n{number}", 1)
                return await redis.replicated(5000)

            async def many() -> list[bool]:
                works = [defer.Deferred.fromCoroutine(write_and_wait(number)) for number in range(100)]
                return list(await defer.gatherResults(works))

            assert loop.run(many()) == [True] * 100
            calls = int(master.info("commandstats", "cmdstat_wait").partition("calls=")[2].partition(",")[0])
            assert 1 <= calls <= 50

    def test_a_replica_that_stands_still_is_told(
        self, loop: ReactorThread, tmp_path: Path, journal: Journal
    ) -> None:
        with (
            replicated_redis(tmp_path) as (master, replica),
            running(loop, settings_for(master.port)) as redis,
        ):
            came_up(loop, redis)
            with replica.paused():
                for _ in range(3):
                    loop.run(redis.command("INCR", "n"))
                    assert not loop.run(redis.replicated(50))
            warnings = [
                text for text in journal.texts(LogLevel.warn) if "a fail-over would lose them" in text
            ]
            assert len(warnings) == 1
            assert loop.run(redis.replicated(5000))

    def test_a_replica_that_is_gone_is_forgotten(
        self, loop: ReactorThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(redis_module, "REFRESH_S", 600.0)  # the time-out itself makes it look
        with (
            replicated_redis(tmp_path) as (master, replica),
            running(loop, settings_for(master.port)) as redis,
        ):
            came_up(loop, redis)
            replica.stop(keep=False)
            wait_until(
                lambda: master.info("replication", "connected_slaves") == "0", "no replica", DEADLINE_S
            )
            loop.run(redis.command("INCR", "n"))
            assert not loop.run(redis.replicated(50))
            wait_until(lambda: redis.replicas == 0, "a look at the replicas", DEADLINE_S)
            assert loop.run(redis.replicated(50))

    def test_who_waits_when_the_connection_ends_is_told(self, loop: ReactorThread, tmp_path: Path) -> None:
        with (
            replicated_redis(tmp_path) as (master, replica),
            running(loop, settings_for(master.port)) as redis,
        ):
            came_up(loop, redis)

            async def begin() -> list[defer.Deferred[bool]]:
                await redis.command("INCR", "n")
                return [defer.Deferred.fromCoroutine(redis.replicated(2000)) for _ in range(3)]

            with replica.paused():
                waiting = loop.run(begin())
                master.stop(keep=True)
                for one in waiting:
                    with pytest.raises(StoreUnavailable):
                        loop.call(lambda one=one: one)  # type: ignore[misc]


# ---- Sentinels


class TestSentinel:
    def test_after_a_fail_over_the_link_leads_to_the_new_master(
        self, loop: ReactorThread, tmp_path: Path
    ) -> None:
        heard: list[bytes] = []
        with sentinel_group(tmp_path) as group:
            settings = settings_for(1, sentinels=parse_addresses(group.sentinels))
            with running(loop, settings) as redis, listening(loop, settings, heard, "ms_fl:c"):
                came_up(loop, redis)
                wait_until(lambda: heard == [b""], "a subscription", DEADLINE_S)
                before, port = redis.run_id, group.master_port
                loop.run(redis.command("SET", "n", 7))
                assert loop.run(redis.replicated(5000))
                group.kill_master()
                wait_until(lambda: redis.available and redis.run_id != before, "a new master", DEADLINE_S)
                assert group.master_port != port
                assert redis.run_id == group.master.info("server", "run_id")
                assert loop.run(redis.command("GET", "n")) == b"7"
                loop.run(redis.command("SET", "n", 8))
                wait_until(lambda: heard == [b"", b""], "another subscription", DEADLINE_S)
                loop.run(redis.command("PUBLISH", "ms_fl:c", "news"))
                wait_until(lambda: heard[2:] == [b"news"], "a notice", DEADLINE_S)

    def test_a_master_that_is_replaced_alive_is_left(self, loop: ReactorThread, tmp_path: Path) -> None:
        with (
            sentinel_group(tmp_path) as group,
            running(loop, settings_for(1, sentinels=parse_addresses(group.sentinels))) as redis,
        ):
            came_up(loop, redis)
            before = redis.run_id
            group.fail_over()
            # the Sentinel itself tells the old one after ten seconds; until then that takes writes which are lost
            wait_until(lambda: redis.available and redis.run_id != before, "a new master", 8.0)
            loop.run(redis.command("SET", "n", 8))

    def test_they_are_asked_in_turn_and_named_if_none_knows(
        self, loop: ReactorThread, tmp_path: Path, journal: Journal
    ) -> None:
        with sentinel_group(tmp_path) as group, reserved_ports(1) as (dead,):
            sentinels = parse_addresses(f"{HOST}:{dead},{group.sentinels}")
            with running(loop, settings_for(1, sentinels=sentinels)) as redis:
                came_up(loop, redis)
            with running(loop, settings_for(1, sentinels=sentinels, sentinel_master="other")) as redis:
                text = journal.wait_for("no Sentinel knows the master other")
                assert f"{HOST}:{dead}: " in text
                assert f"{group.sentinels}: it does not know other" in text
                assert "check fedcore.redis.sentinel_master" in text
            group.stop_sentinel()
            with running(loop, settings_for(1, sentinels=sentinels)):
                journal.wait_for("no Sentinel knows the master fl")

    def test_one_that_names_the_wrong_node_does_not_keep_its_turn(
        self, loop: ReactorThread, tmp_path: Path, journal: Journal
    ) -> None:
        with (
            replicated_redis(tmp_path / "redis") as (master, replica),
            reserved_ports(2) as (wrong, right),
            Family(tmp_path) as family,
        ):
            start_sentinel(family, tmp_path, wrong, replica.port, quorum=2)
            start_sentinel(family, tmp_path, right, master.port, quorum=2)
            sentinels = parse_addresses(f"{HOST}:{wrong},{HOST}:{right}")
            with running(loop, settings_for(1, sentinels=sentinels)) as redis:
                came_up(loop, redis)
                assert redis.run_id == master.info("server", "run_id")
            journal.wait_for("it is a slave, not the master")

    def test_a_password_of_their_own(
        self, loop: ReactorThread, tmp_path: Path, secret: str, journal: Journal
    ) -> None:
        with sentinel_group(tmp_path / "group") as group:
            rights = ("-@all", "+sentinel|get-master-addr-by-name")
            assert ask(group.sentinel_port, "ACL", "SETUSER", "fed", "on", f">{PASSWORD}", *rights) == "+OK"
            sentinels = parse_addresses(group.sentinels)
            given = {"sentinel_username": "fed", "sentinel_password_file": secret}
            with running(loop, settings_for(1, sentinels=sentinels, **given)) as redis:
                came_up(loop, redis)
            given["sentinel_username"] = "nobody"
            with running(loop, settings_for(1, sentinels=sentinels, **given)) as redis:
                journal.wait_for("WRONGPASS")
                assert not redis.available


# ---- notices


@contextmanager
def listening(loop: ReactorThread, settings: Settings, heard: list[bytes], channel: str) -> Iterator[Notices]:
    def start() -> Notices:
        notices = launch.notices_of(settings, heard.append, loop.reactor)
        notices.follow(channel)
        notices.startService()
        return notices

    notices = loop.call(start)
    try:
        yield notices
    finally:
        loop.call(notices.stopService)


class TestNotices:
    def test_each_message_is_heard_as_it_is(self, loop: ReactorThread, own_server: PrivateRedis) -> None:
        heard: list[bytes] = []
        with listening(loop, settings_for(own_server.port), heard, "ms_fl:a"):
            wait_until(lambda: heard == [b""], "a subscription", DEADLINE_S)
            messages = [b"7", b"1.5", b"\xff\x00\r\n", b"subscribe", b"x" * 100_000]
            for message in messages:
                assert own_server.ask("PUBLISH", "ms_fl:a", message) == ":1"
            own_server.ask("PUBLISH", "ms_fl:b", "not ours")
            wait_until(lambda: len(heard) >= 6, "all messages", DEADLINE_S)
            assert heard == [b"", *messages]

    def test_after_a_restart_of_redis_it_goes_on(self, loop: ReactorThread, own_server: PrivateRedis) -> None:
        heard: list[bytes] = []
        with listening(loop, settings_for(own_server.port), heard, "ms_fl:a") as notices:
            wait_until(lambda: heard == [b""], "a subscription", DEADLINE_S)
            own_server.stop(keep=True)
            wait_until(lambda: not notices.subscribed, "the loss", DEADLINE_S)
            own_server.start()
            wait_until(lambda: heard == [b"", b""], "another subscription", DEADLINE_S)
            own_server.ask("PUBLISH", "ms_fl:a", "news")
            wait_until(lambda: heard[2:] == [b"news"], "a notice", DEADLINE_S)

    def test_another_channel_can_be_followed(self, loop: ReactorThread, own_server: PrivateRedis) -> None:
        heard: list[bytes] = []
        with listening(loop, settings_for(own_server.port), heard, "") as notices:
            wait_until(lambda: notices._link.connection is not None, "a connection", DEADLINE_S)
            assert not notices.subscribed and heard == []
            loop.call(lambda: notices.follow("ms_fl:a"))
            wait_until(lambda: heard == [b""], "a subscription", DEADLINE_S)

            def change_twice() -> None:
                notices.follow("ms_fl:b")
                notices.follow("ms_fl:c")

            loop.call(change_twice)
            wait_until(lambda: heard == [b"", b""], "another subscription", DEADLINE_S)
            replies = [own_server.ask("PUBLISH", f"ms_fl:{name}", name) for name in "abc"]
            assert replies == [":0", ":0", ":1"]
            wait_until(lambda: heard[2:] == [b"c"], "a notice", DEADLINE_S)

    def test_a_redis_that_stands_still_is_noticed(
        self, loop: ReactorThread, own_server: PrivateRedis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(notices_module, "PING_S", 0.1)
        heard: list[bytes] = []
        with listening(loop, settings_for(own_server.port, reply_timeout=0.3), heard, "ms_fl:a") as notices:
            wait_until(lambda: heard == [b""], "a subscription", DEADLINE_S)
            with own_server.paused():
                wait_until(lambda: not notices.subscribed, "the loss", DEADLINE_S)
            wait_until(lambda: heard == [b"", b""], "another subscription", DEADLINE_S)

    def test_a_listener_that_fails_does_no_harm(
        self, loop: ReactorThread, own_server: PrivateRedis, journal: Journal
    ) -> None:
        class Fails(list[bytes]):
            def append(self, message: bytes) -> None:
                super().append(message)
                raise ValueError(message)

        heard = Fails()
        with listening(loop, settings_for(own_server.port), heard, "ms_fl:a"):
            wait_until(lambda: len(heard) == 1, "a subscription", DEADLINE_S)
            own_server.ask("PUBLISH", "ms_fl:a", "news")
            wait_until(lambda: heard == [b"", b"news"], "a notice", DEADLINE_S)
        journal.wait_for("whoever hears the notices has failed")
