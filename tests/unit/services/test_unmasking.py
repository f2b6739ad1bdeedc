"""Masked updates on real servers in memory: when masks come off, and what becomes of an iteration in which they do not.

The devices' exchange is played here with the real keys, shares and masks; of the shared state only its reports are.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from memory_reactor import MemoryReactor
from model import job_in_memory, server_in_memory
from model.cluster import key_of
from model.job_in_memory import Job
from model.server_in_memory import CLIENTS, Server
from twisted.internet import defer

from fedcore.config.settings import MaskLayout
from fedcore.core.iteration import (
    GLOBAL_TIMEOUT,
    REPORTS_ROUND,
    UNMASKED_SUCCESS,
    Phase,
    exchange_lost,
    round_timeout,
    server_exited,
    unmask_failed,
)
from fedcore.observe.metrics import ServerMetrics
from fedcore.secagg import keys, masks, shamir, unmask
from fedcore.secagg.masks import Layout
from fedcore.secagg.shares import to_bytes
from fedcore.services import iteration_driver
from fedcore.services.departure import Departure
from fedcore.services.unmasking import Unmasked, Unmasking
from fedcore.store.cipher_state import Material, Share, pack_shares
from fedcore.wire import codec
from fedcore.wire.arrays import Floats, Weight
from fedcore.wire.arrays import Layout as ModelLayout
from fedcore.wire.image import ImageTemplate
from fedcore.wire.messages import RequestExchangeKeys

WINDOW_S = 6.0
T = 2
ROUNDS = {"exchangeKeys": 3, "getKeys": 3, "shareSecrets": 3, "getSecrets": 3, "getClientList": 3}


class Exchange:
    """What devices have exchanged in one iteration, and how they mask and report.

    Attributes:
        members: id -> keys, as on the list.
    """

    def __init__(self, ids: Sequence[str], size: int, layout: Layout = Layout.CONTIGUOUS) -> None:
        """Have every device share its secrets with all others.

        Args:
            ids: of the devices, in bytewise order.
            size: floats of a mask.
            layout: which of them go with which weight; only for ``uploaded``.
        """
        self.layout = layout
        self._chance = chance = random.Random(f"{ids} {size}")
        self._size = size
        pairs = {fl_id: keys.new_pair(chance.randbytes) for fl_id in ids}
        self._private = {fl_id: pair.private for fl_id, pair in pairs.items()}
        self._own = {fl_id: chance.randbytes(32) for fl_id in ids}
        self.members = {
            fl_id: RequestExchangeKeys(
                fl_id=fl_id,
                c_pk=pair.public,
                s_pk=pair.public,
                iteration=1,
                ind_iv=chance.randbytes(16),
                pw_iv=chance.randbytes(16),
                pw_salt=chance.randbytes(32),
            )
            for fl_id, pair in pairs.items()
        }
        self._dealt = {
            owner: {
                kind: dict(zip([i for i in ids if i != owner], self._split(secret), strict=True))
                for kind, secret in (("s", self._private[owner]), ("b", self._own[owner]))
            }
            for owner in ids
        }

    def _split(self, secret: bytes) -> list[tuple[int, int]]:
        count = len(self.members) - 1
        return shamir.split(int.from_bytes(secret, "big"), T, count, self._chance.randrange)

    def mask(self, fl_id: str) -> Floats:
        """The mask of a device, whose sources are all others."""
        members = {name: masks.Member.of(entry) for name, entry in self.members.items()}
        return masks.client_mask(
            fl_id, self._private[fl_id], self._own[fl_id], members, list(self.members), self._size
        )

    def report(self, fl_id: str, uploaders: Sequence[str], spoil: Sequence[str] = ()) -> bytes:
        """What a device reports, wrong shares for ``spoil``."""
        shares, places = [], {name: place for place, name in enumerate(self.members)}
        for owner in self.members:
            if owner != fl_id:
                index, share = self._dealt[owner]["b" if owner in uploaders else "s"][fl_id]
                share += owner in spoil
                shares.append(Share(places[owner], index, to_bytes(share)))
        return pack_shares(shares)

    def gathered(self) -> dict[str, dict[str, bytes]]:
        """What Redis holds of the rounds before the updates."""
        entries = {key_of(name): bytes(16) + codec.encode(entry) for name, entry in self.members.items()}
        return {"exchangeKeys": entries, "shareSecrets": dict.fromkeys(entries, b"1")}


class MaskedJob:
    """A job whose devices mask their updates.

    Attributes:
        job: its servers.
        exchange: of the current iteration.
    """

    def __init__(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        self.job = job
        self.exchange = Exchange(CLIENTS, len(CLIENTS))
        plain = server_in_memory.trained
        monkeypatch.setattr(
            server_in_memory, "trained", lambda fl_id, n: plain(fl_id, n) + self.exchange.mask(fl_id)
        )

    def exchanged(self) -> None:
        """Devices have exchanged what they need."""
        self.job.pass_time(1.0)
        for name, held in self.exchange.gathered().items():
            self.job.shared.gathered[self.job.number, name] = held
            self.count(name, len(held))

    def report(self, *clients: str, spoil: Sequence[str] = (), silently: bool = False) -> None:
        """Devices report, all to the same list; ``silently``: no server hears of it before the next one does."""
        number = self.job.number
        counted = self.job.shared.uploads_of(number)
        uploaders = [fl_id for fl_id in CLIENTS if key_of(fl_id) in counted]
        held = self.job.shared.gathered.setdefault((number, REPORTS_ROUND), {})
        for fl_id in clients:
            held[key_of(fl_id)] = self.exchange.report(fl_id, uploaders, spoil)
        if not silently:
            self.count(REPORTS_ROUND, len(held))

    def is_mean_of(self, clients: Sequence[str], number: int = 1) -> bool:
        """Tell whether every server serves the mean of these clients' updates, but for what float32 takes."""
        wanted = np.zeros(len(CLIENTS))
        wanted[[CLIENTS.index(fl_id) for fl_id in clients]] = number / len(clients)
        served = [server.driver.models.get(number) for server in self.job.living]
        digests = {None if image is None else image.digest for image in served}
        return len(digests) == 1 and all(
            image is not None and np.allclose(image.arrays["who"], wanted, atol=1e-6) for image in served
        )

    @property
    def status(self) -> Any:
        status = self.job.shared.status
        assert status is not None
        return status

    @property
    def finaliser(self) -> int:
        """Place of the server that makes the model."""
        node_id = self.status.token.partition(":")[2]
        return next(n for n, server in enumerate(self.job.servers) if server and server.node_id == node_id)

    def server(self, place: int) -> Server:
        server = self.job.servers[place]
        assert server is not None
        return server

    def count(self, name: str, requests: int) -> None:
        """So many requests of a cipher round are counted."""
        rounds = self.job.shared.rounds.setdefault(self.job.number, {})
        _, since = rounds.get(name, (0, self.job.now * 1000))
        rounds[name] = requests, since
        self.job.store.told(name)
        self.job.settle()

    def collect(self, *clients: str) -> None:
        """Devices come, and their updates are counted."""
        for fl_id in clients:
            self.job.device_starts(fl_id)
        self.job.settle()
        for fl_id in clients:
            self.job.device_uploads(fl_id)
        self.job.settle()

    def until_masked(self) -> None:
        """The mean of enough updates is with the devices."""
        self.job.pass_time(2.0)
        self.collect(*CLIENTS[: self.job.policy.update_threshold])
        self.job.pass_time(1.0)
        assert self.status.phase is Phase.UNMASKING

    def result(self, number: int = 1, seconds: int = 60) -> str:
        """Why an iteration ended; it does within these seconds."""
        for _ in range(seconds):
            if number in self.job.store.ends:
                break
            self.job.pass_time(1.0)
        return self.job.store.ends[number].result

    def holds(self, place: int, digest: str) -> bool:
        return self.server(place).publication.held(digest) is not None


@contextmanager
def masked(
    monkeypatch: pytest.MonkeyPatch, hosts: Sequence[int] = (1,), unmask: bool = True
) -> Iterator[MaskedJob]:
    plain, settings_of = iteration_driver.policy_of, job_in_memory.settings_of
    rounds = tuple({**ROUNDS, REPORTS_ROUND: T + 1}.items()) if unmask else tuple(ROUNDS.items())[:2]

    def policy_of(settings: Any) -> Any:
        return replace(plain(settings), unmask=unmask, cipher_window=WINDOW_S, cipher_rounds=rounds)

    def patient(places: int, quorum: int, last: int) -> Any:
        settings = settings_of(len(CLIENTS), len(CLIENTS) - 1, last)
        windows = replace(
            settings.round,
            start_fl_job_time_window=50_000,
            update_model_time_window=50_000,
            global_iteration_time_window=60_000,
        )
        return replace(settings, round=windows)

    monkeypatch.setattr(iteration_driver, "policy_of", policy_of)
    monkeypatch.setattr(job_in_memory, "settings_of", patient)
    job = Job(hosts)
    run = MaskedJob(job, monkeypatch)
    monkeypatch.setattr(job.store, "on_end", lambda number, end: None)  # rounded, and looked at here
    try:
        yield run
    finally:
        job.close()


@contextmanager
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Note which failures the unmasking logs; they are none of the tests'."""
    told: list[str] = []

    def failure(text: str, **fields: Any) -> None:
        told.append(sys.exc_info()[0].__name__)  # type: ignore[union-attr]

    log = Unmasking.log
    recording = SimpleNamespace(failure=failure, error=log.error, warn=log.warn, info=log.info)
    monkeypatch.setattr(Unmasking, "log", recording)
    yield told


class TestTheTimers:
    @pytest.mark.parametrize("name", list(ROUNDS)[:4])
    def test_a_round_of_the_exchange_has_its_window(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        with masked(monkeypatch) as run:
            run.job.pass_time(1.0)
            run.collect(CLIENTS[0])
            run.count(name, ROUNDS[name] - 1)
            run.job.pass_time(WINDOW_S - 1.0)
            assert not run.job.store.ends
            assert run.result(seconds=3) == round_timeout(name)

    def test_a_round_that_is_complete_has_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with masked(monkeypatch) as run:
            run.job.pass_time(1.0)
            run.collect(*CLIENTS[:3])
            for name in list(ROUNDS)[:4]:
                run.count(name, ROUNDS[name])
            run.job.pass_time(WINDOW_S + 2.0)
            assert not run.job.store.ends

    @pytest.mark.parametrize("name", ["getClientList", REPORTS_ROUND])
    def test_nor_may_the_reports_take_longer(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        with masked(monkeypatch, (1, 2)) as run:
            run.until_masked()
            run.count(name, 1)
            assert run.result(seconds=9) == round_timeout(name)

    def test_if_nobody_asks_for_the_list_the_global_window_ends_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with masked(monkeypatch) as run:
            run.until_masked()
            assert run.result(seconds=65) == GLOBAL_TIMEOUT

    def test_reports_that_do_not_do_are_as_none_when_their_window_is_over(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with masked(monkeypatch, (1, 2)) as run:
            run.exchanged()
            run.until_masked()
            run.report("c0", "c1", "c2", spoil=["c0", "c5"])
            run.job.pass_time(WINDOW_S - 1.5)
            assert not run.job.store.ends
            assert run.result(seconds=4) == unmask_failed(1)


class TestAModel:
    """The masks come off, and the plain mean is left."""

    @pytest.mark.parametrize("hosts", [(1, 1), (1, 2)], ids=["one host", "two hosts"])
    def test_is_the_mean_of_the_updates(
        self, monkeypatch: pytest.MonkeyPatch, hosts: tuple[int, ...]
    ) -> None:
        with masked(monkeypatch, hosts) as run:
            run.exchanged()
            run.until_masked()
            uploaders = CLIENTS[: run.job.policy.update_threshold]
            aggregate = run.server(0).publication.held(run.status.aggregate)
            assert aggregate is not None and np.abs(aggregate.arrays["who"]).max() > 0.2, "it was masked"
            run.report(*uploaders)
            assert run.result(seconds=3) == UNMASKED_SUCCESS
            run.job.pass_time(3.0)
            assert run.is_mean_of(uploaders)
            metrics = [server.driver._parts.metrics.registry for server in run.job.living]
            dropouts = sum(m.get_sample_value("fl_cipher_dropouts_total") or 0 for m in metrics)
            assert dropouts == len(CLIENTS) - len(uploaders)
            assert sum(m.get_sample_value("fl_unmasking_duration_seconds_count") or 0 for m in metrics) == 1

    def test_is_made_by_who_succeeds_the_finaliser(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with masked(monkeypatch, (1, 2)) as run:
            run.exchanged()
            run.until_masked()
            run.job.pass_time(1.0)
            uploaders = CLIENTS[: run.job.policy.update_threshold]
            run.report(*uploaders[:2])
            run.job.kill(run.finaliser)
            run.report(*uploaders)
            assert run.result(seconds=15) == UNMASKED_SUCCESS
            run.job.pass_time(3.0)
            assert run.is_mean_of(uploaders)

    @pytest.mark.parametrize("after", range(0, 60, 3))
    def test_is_the_same_whoever_makes_it(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        """The finaliser dies at some move of the unmasking, its sibling has the ledgers, or the mean, or the model."""
        with masked(monkeypatch, (1, 1)) as run:
            run.exchanged()
            run.until_masked()
            uploaders = CLIENTS[: run.job.policy.update_threshold]
            monkeypatch.setattr(run.job, "settle", lambda: None)
            run.report(*uploaders)
            run.job.moves(after)
            monkeypatch.delattr(run.job, "settle")
            candidate = run.status.digest
            if run.job.number == 1:
                run.job.kill(run.finaliser)
            assert run.result(seconds=15) == UNMASKED_SUCCESS
            run.job.pass_time(3.0)
            assert run.is_mean_of(uploaders)
            assert candidate in ("", run.status.base)

    def test_waits_for_reports_that_make_up_for_bad_ones(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with masked(monkeypatch, (1, 2)) as run:
            run.exchanged()
            run.until_masked()
            run.report("c0", spoil=["c4"])
            run.report("c1", "c2")
            run.job.pass_time(2.0)
            assert run.status.phase is Phase.UNMASKING
            run.report("c3", "c4")
            assert run.result(seconds=3) == UNMASKED_SUCCESS
            run.job.pass_time(3.0)
            assert run.is_mean_of(CLIENTS[:5])

    def test_is_tried_again_where_there_was_no_memory_for_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        noise, tries = unmask.noise, []

        def scarce(*given: Any) -> None:
            tries.append(given)
            if len(tries) < 3:
                raise MemoryError
            noise(*given)

        monkeypatch.setattr(unmask, "noise", scarce)
        with masked(monkeypatch, (1, 2)) as run:
            run.exchanged()
            run.until_masked()
            with captured(monkeypatch) as told:
                run.report("c0", "c1", "c2")
                assert run.result(seconds=5) == UNMASKED_SUCCESS
            assert len(tries) == 3 and told == ["MemoryError"]
            run.job.pass_time(3.0)
            assert run.is_mean_of(CLIENTS[:5])

    def test_is_given_up_if_there_is_none_until_the_reports_are_over(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def scarce(*given: Any) -> None:
            raise MemoryError

        monkeypatch.setattr(unmask, "noise", scarce)
        with masked(monkeypatch, (1, 2)) as run:
            run.exchanged()
            run.until_masked()
            with captured(monkeypatch) as told:
                run.report("c0", "c1", "c2")
                run.job.pass_time(WINDOW_S - 1.5)
                assert not run.job.store.ends
                assert run.result(seconds=4) == unmask_failed(1)
            assert told == ["MemoryError"], "once, with these reports"

    def test_leaves_bad_reports_out_and_tells_of_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with masked(monkeypatch, (1, 2)) as run:
            run.exchanged()
            run.until_masked()
            uploaders = CLIENTS[: run.job.policy.update_threshold]
            run.report("c1", "c2", "c3", silently=True)
            run.report("c0", spoil=["c5"])
            assert run.result(seconds=3) == UNMASKED_SUCCESS
            run.job.pass_time(3.0)
            assert run.is_mean_of(uploaders)
            metrics = [server.driver._parts.metrics.registry for server in run.job.living]
            assert sum(m.get_sample_value("fl_cipher_reports_excluded_total") or 0 for m in metrics) == 1


class TestAListOfClients:
    """Once devices may know whose updates count, nothing makes another one."""

    def test_the_other_servers_get_the_masked_mean(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with masked(monkeypatch, (1, 2)) as run:
            run.until_masked()
            run.job.pass_time(1.0)
            assert run.holds(0, run.status.aggregate) and run.holds(1, run.status.aggregate)
            assert run.status.aggregate != run.status.digest == ""

    @pytest.mark.parametrize("hosts", [(1, 2), (1, 1)], ids=["two hosts", "one host"])
    def test_stays_though_the_finaliser_dies(
        self, monkeypatch: pytest.MonkeyPatch, hosts: tuple[int, ...]
    ) -> None:
        with masked(monkeypatch, hosts) as run:
            run.until_masked()
            run.job.pass_time(1.0)
            aggregate, before = run.status.aggregate, run.finaliser
            run.job.kill(before)
            run.job.pass_time(15.0)
            assert run.finaliser == 1 - before
            assert (run.status.phase, run.status.attempt) == (Phase.UNMASKING, 1)
            assert run.status.aggregate == aggregate and run.holds(1 - before, aggregate)

    def test_stays_though_the_mean_has_to_be_made_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with masked(monkeypatch, (1, 1)) as run:
            run.until_masked()
            run.job.pass_time(1.0)
            aggregate, before = run.status.aggregate, run.finaliser
            run.server(1 - before).publication._candidates.clear()
            run.job.kill(before)
            run.job.pass_time(8.0)
            assert run.finaliser == 1 - before
            assert (run.status.phase, run.status.attempt) == (Phase.UNMASKING, 1)
            assert run.holds(1 - before, aggregate)

    def test_fails_with_the_mean_and_a_ledger(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with masked(monkeypatch, (1, 2)) as run:
            run.until_masked()
            run.job.pass_time(1.0)
            before = run.finaliser
            run.server(1 - before).publication._candidates.clear()
            run.job.kill(before)
            assert run.result(seconds=40) == server_exited(1)

    def test_needs_no_ledger_while_somebody_has_the_mean(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with masked(monkeypatch, (1, 2)) as run:
            run.until_masked()
            run.job.pass_time(1.0)
            run.job.kill(run.finaliser)
            run.job.pass_time(30.0)
            assert (run.status.phase, run.status.attempt) == (Phase.UNMASKING, 1)
            assert not run.job.store.ends


class TestACleanStop:
    def test_gives_the_masked_mean_away(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with masked(monkeypatch, (1, 2)) as run:
            run.exchanged()
            run.until_masked()
            run.job.pass_time(1.0)
            place, aggregate = run.finaliser, run.status.aggregate
            other = run.server(1 - place)
            other.publication._candidates.clear()
            leaving = run.server(place)
            stopped: list[Any] = []
            departure = Departure(leaving.driver, leaving.driver._parts)
            defer.Deferred.fromCoroutine(departure.hand_over()).addBoth(stopped.append)
            run.job.settle()
            assert stopped == [None]
            assert run.holds(1 - place, aggregate) and not other.ledgers.adopted
            run.job.kill(place)
            run.report("c0", "c1", "c2")
            assert run.result(seconds=15) == UNMASKED_SUCCESS

    @pytest.mark.parametrize("has_model", [True, False])
    def test_does_so_with_the_model_if_there_is_one(
        self, monkeypatch: pytest.MonkeyPatch, has_model: bool
    ) -> None:
        """Without it, the updates are handed over: the masks can be taken off again."""
        with masked(monkeypatch, (1, 2)) as run:
            run.exchanged()
            run.until_masked()
            run.job.pass_time(1.0)
            place = run.finaliser
            leaving = run.server(place)
            monkeypatch.setattr(leaving.publication, "spread", lambda *given: defer.Deferred())
            run.report("c0", "c1", "c2")
            assert run.status.phase is Phase.CANDIDATE
            if not has_model:
                leaving.publication._candidates.clear()
            departure = Departure(leaving.driver, leaving.driver._parts)
            stopped: list[Any] = []
            defer.Deferred.fromCoroutine(departure.hand_over()).addBoth(stopped.append)
            run.job.settle()
            assert stopped == [None]
            assert run.holds(1 - place, run.status.digest) is has_model
            run.job.kill(place)
            assert run.result(seconds=15) == UNMASKED_SUCCESS
            run.job.pass_time(3.0)
            assert run.is_mean_of(CLIENTS[:5])


class TestALossBeforeIt:
    def test_is_that_of_dropouts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with masked(monkeypatch, (1, 2)) as run:
            run.job.pass_time(2.0)
            run.collect(CLIENTS[0])
            run.job.kill(0)
            run.job.pass_time(25.0)
            assert (run.status.phase, run.status.attempt) == (Phase.COLLECTING, 2)
            assert not run.job.shared.uploads_of(1)

    def test_fails_where_nobody_can_take_masks_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with masked(monkeypatch, (1, 2), unmask=False) as run:
            run.job.pass_time(2.0)
            run.collect(CLIENTS[0])
            run.job.kill(0)
            assert run.result(seconds=40) == server_exited(1)


class TestARedisThatMayHaveLostKeys:
    @pytest.mark.parametrize("phase", [Phase.COLLECTING, Phase.UNMASKING])
    @pytest.mark.parametrize("wiped", [True, False], ids=["empty", "with its data"])
    def test_costs_the_iteration_at_once(
        self, monkeypatch: pytest.MonkeyPatch, phase: Phase, wiped: bool
    ) -> None:
        with masked(monkeypatch, (1, 2)) as run:
            if phase is Phase.COLLECTING:
                run.job.pass_time(2.0)
                run.collect(CLIENTS[0])
            else:
                run.until_masked()
            for server in run.job.living:
                server.lose_redis()
            run.job.store.fail_over(None if wiped else run.job.store.copy())
            for server in run.job.living:
                server.redis.come_back()
            run.job.settle()
            assert run.result(seconds=3) == exchange_lost(1)
            assert run.status.phase is Phase.COLLECTING

    def test_costs_none_that_has_not_begun(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with masked(monkeypatch, (1, 2)) as run:
            run.job.pass_time(2.0)
            for server in run.job.living:
                server.lose_redis()
            run.job.store.fail_over(None)
            for server in run.job.living:
                server.redis.come_back()
            run.job.pass_time(12.0)
            assert not run.job.store.ends
            run.until_masked()

    def test_costs_no_plain_iteration(self, monkeypatch: pytest.MonkeyPatch) -> None:
        job = Job((1, 2))
        try:
            job.pass_time(2.0)
            job.device_starts(CLIENTS[0])
            job.settle()
            for server in job.living:
                server.lose_redis()
            job.store.fail_over(None)
            for server in job.living:
                server.redis.come_back()
            job.pass_time(3.0)
            assert not job.store.ends
        finally:
            job.close()


class Counted:
    """Stands for the shared state where it tells whose updates count."""

    def __init__(self, uploaders: Sequence[str], data_size: int) -> None:
        self.keys = SimpleNamespace(instance="i_1")
        self._uploaders, self._data_size = uploaders, data_size

    async def uploads(self, number: int) -> dict[str, str]:
        return {key_of(fl_id): "L1" for fl_id in self._uploaders}

    async def data_size(self, number: int) -> tuple[int, int]:
        return len(self._uploaders), self._data_size


@pytest.mark.parametrize("mask_layout", MaskLayout)
def test_weights_of_their_own_places_in_the_mask_and_none_for_what_is_not_aggregated(
    mask_layout: MaskLayout,
) -> None:
    """Three clients mask as devices do, one more has dropped out; the mean is rounded as uploads are, in float32."""
    weights = ModelLayout((Weight("a", (3,)), Weight("b", (2, 2), aggregated=False), Weight("c", (5,))))
    template, layout = ImageTemplate(weights), Layout(mask_layout.value)
    sizes = [weight.size for weight in weights]
    exchange = Exchange(CLIENTS[:4], layout.length(sizes))
    uploaders, chance = CLIENTS[:3], np.random.default_rng(1)
    trained = [{w.name: chance.normal(size=w.size).astype(np.float32) for w in weights} for _ in uploaders]
    data_sizes = (1, 7, 12)
    mean: dict[str, Any] = {}
    for weight, place in zip(weights, layout.slices(sizes), strict=True):
        uploads = [
            (model[weight.name] * size + exchange.mask(fl_id)[place]).astype(np.float32)
            for fl_id, model, size in zip(uploaders, trained, data_sizes, strict=True)
        ]
        mean[weight.name] = np.sum(uploads, axis=0, dtype=np.float64) / sum(data_sizes)
    kept = np.arange(4, dtype=np.float32)
    masked_mean = template.image({**mean, "b": kept})

    async def material(cluster: Any, number: int) -> Material:
        gathered = exchange.gathered()
        reports = {key_of(fl_id): exchange.report(fl_id, uploaders) for fl_id in uploaders}
        return Material(list(gathered["exchangeKeys"].values()), list(gathered["shareSecrets"]), reports)

    reactor = MemoryReactor()
    unmasking = Unmasking(template, mask_layout, ServerMetrics(), reactor, material)
    state: Any = Counted(uploaders, sum(data_sizes))
    found: list[Any] = []
    defer.Deferred.fromCoroutine(unmasking.unmask(state, 1, masked_mean, T)).addBoth(found.append)
    while not found:
        reactor.work()
    (outcome,) = found
    assert isinstance(outcome, Unmasked) and outcome.updates == 3
    assert np.array_equal(outcome.image.arrays["b"], kept)
    for name in ("a", "c"):
        plain = sum(m[name].astype(float) * s for m, s in zip(trained, data_sizes, strict=True)) / 20
        assert np.allclose(outcome.image.arrays[name], plain, atol=2e-6)
        assert not np.allclose(masked_mean.arrays[name], plain, atol=1e-2)
