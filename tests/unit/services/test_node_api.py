"""What servers do for each other and for workers: two real servers, one message at a time.

Both ends are here, ``services.peers`` and ``services.node_api``; between them is a channel in memory that carries real
frames.
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from model.job_in_memory import Job, in_the_middle
from model.server_in_memory import CLIENTS, NodeStandIn, Server, content_of, trained
from twisted.internet import defer

from fedcore.core.iteration import Phase
from fedcore.core.node_id import address_of
from fedcore.errors import PeerError
from fedcore.ledger.copy import PartialCopy
from fedcore.ledger.layout import Damaged
from fedcore.net.networks import Networks
from fedcore.net.node_client import PeerRefused, PeerTimeout, PeerUnreachable
from fedcore.net.node_listener import Request
from fedcore.services.ledgers import Closed, Whereabouts
from fedcore.services.node_api import NodeApi
from fedcore.services.peers import Peers, offer_of
from fedcore.wire import codec
from fedcore.wire import node_messages as messages
from fedcore.wire.messages import (
    FeatureMap,
    RequestFLJob,
    RequestGetModel,
    RequestUpdateModel,
    ResponseFLJob,
    ResponseGetModel,
    ResponseUpdateModel,
)
from fedcore.wire.node import Command, Meta, PayloadKind, decode_model
from fedcore.wire.node_messages import CHUNK

STRANGER = "10.9.9.9:7000::2026-01-01-00:00:00.000.000::10099"


class Pair:
    """Servers A and B on two hosts; A asks and B answers."""

    def __init__(self, *allowed: str) -> None:
        self.job = Job((1, 2))
        self.job.pass_time(2.0)
        self.a, self.b = self.job.living
        self.peers = Peers(self.client(self.a.node_id))
        peers = Peers(self.client(self.b.node_id))
        self.api = NodeApi(
            self.b.driver,
            self.b.api,
            self.b.intake,
            self.b.ledgers,
            self.b.publication,
            peers,
            Networks(allowed),
        )

    def client(self, node_id: str) -> Any:
        return NodeStandIn(node_id, self.job.network, self.a.reactor)

    def until_sealed(self) -> None:
        """Stop in iteration 2 once it is sealed and both servers know; the finaliser gets no further."""
        in_the_middle(self.job, 0)
        status = self.job.shared.status
        assert status is not None
        while status.phase is not Phase.REDUCING:
            assert self.job.move()

    def outcome(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Let everything go on until something has come of it."""
        found: list[Any] = []
        defer.Deferred.fromCoroutine(work).addBoth(found.append)
        for _ in range(2000):
            if found or not self.job.move():
                break
        assert found, "no answer"
        if hasattr(found[0], "raiseException"):
            found[0].raiseException()
        return found[0]

    def asked(
        self,
        command: int,
        data: bytes = b"",
        *,
        sender: str = STRANGER,
        peer: str = "10.9.9.9",
        user_cmd: int = 0,
        number: int = 0,
    ) -> Any:
        """Ask B's handler as the node channel does."""
        meta = Meta(command, 1, user_cmd=user_cmd, iteration_num=number, send_node=sender)
        return self.outcome(self.api.handlers()[command](Request(meta, data, peer)))  # type: ignore[arg-type]

    def refused(self, command: int, *given: Any, **named: Any) -> str:
        with pytest.raises(PeerError) as caught:
            self.asked(command, *given, **named)
        return str(caught.value.args[0])


@pytest.fixture
def pair() -> Iterator[Pair]:
    found = Pair()
    yield found
    found.job.close()


@pytest.fixture
def open_pair() -> Iterator[Pair]:
    """B takes workers from one network."""
    found = Pair("10.9.9.0/24", "fd00::/8")
    yield found
    found.job.close()


def own(server: Server) -> str:
    ledger = server.ledgers.own
    assert ledger is not None
    return ledger.id


FOR_WORKERS = (Command.ROUND_REQUEST, Command.GET_MODEL_WEIGHT)
EMPTY = (
    Command.COLLECTIVE_SEND_DATA,
    Command.SERVER_BROADCAST_EVENT,
    Command.SERVER_PING,
    Command.SERVER_PONG,
    Command.BROADCAST_MODEL_WEIGHT,
)


class TestWhoIsServed:
    @pytest.mark.parametrize("command", sorted(set(Command) - set(FOR_WORKERS)))
    def test_a_stranger_is_no_server(self, open_pair: Pair, command: int) -> None:
        if command in open_pair.api.handlers():
            assert "is not registered as a server of this job" in open_pair.refused(command)

    @pytest.mark.parametrize("command", FOR_WORKERS)
    def test_a_stranger_is_no_worker(self, pair: Pair, command: int) -> None:
        assert pair.refused(command) == "10.9.9.9 is not in fedcore.node.allow"

    @pytest.mark.parametrize("peer", ["10.9.8.9", "fe80::1", "localhost", ""])
    def test_neither_is_one_of_another_network(self, open_pair: Pair, peer: str) -> None:
        assert "is not in fedcore.node.allow" in open_pair.refused(Command.GET_MODEL_WEIGHT, peer=peer)

    @pytest.mark.parametrize("peer", ["10.9.9.200", "fd12::1"])
    def test_a_worker_of_an_allowed_network_is_served(self, open_pair: Pair, peer: str) -> None:
        assert open_pair.asked(Command.GET_MODEL_WEIGHT, peer=peer).kind is PayloadKind.PROTOBUF

    def test_a_server_needs_no_network(self, pair: Pair) -> None:
        assert pair.asked(Command.GET_MODEL_WEIGHT, sender=pair.a.node_id).kind is PayloadKind.PROTOBUF

    def test_who_registered_just_now_is_looked_for(self, pair: Pair) -> None:
        pair.job.shared.heartbeat(STRANGER)
        assert pair.asked(Command.SERVER_PING).data == b""

    def test_without_redis_only_known_servers_are_served(self, pair: Pair) -> None:
        pair.job.shared.heartbeat(STRANGER)
        pair.b.lose_redis()
        assert "not registered" in pair.refused(Command.SERVER_PING)
        assert pair.asked(Command.SERVER_PING, sender=pair.a.node_id).data == b""

    @pytest.mark.parametrize("command", EMPTY)
    def test_what_the_protocols_servers_tell_is_acknowledged(self, pair: Pair, command: int) -> None:
        reply = pair.asked(command, b"anything", sender=pair.a.node_id)
        assert (reply.data, reply.kind) == (b"", PayloadKind.RAW)


class TestRounds:
    def test_an_unknown_round(self, open_pair: Pair) -> None:
        said = open_pair.refused(Command.ROUND_REQUEST, user_cmd=9)
        assert said == "Tcp server doesn't support command 9"

    def start(self, pair: Pair, fl_id: str) -> Any:
        body = codec.encode(RequestFLJob(fl_name="job", fl_id=fl_id, data_size=1, timestamp="1"))
        return pair.asked(Command.ROUND_REQUEST, body, user_cmd=2)

    def update(self, pair: Pair, fl_id: str) -> Any:
        request = RequestUpdateModel(
            fl_name="job",
            fl_id=fl_id,
            iteration=1,
            feature_map=(FeatureMap("who", trained(fl_id, 1)),),
            timestamp="1",
        )
        return pair.asked(Command.ROUND_REQUEST, codec.encode(request), user_cmd=3)

    def test_start_fl_job(self, open_pair: Pair) -> None:
        reply = self.start(open_pair, "c1")
        answer = codec.decode(ResponseFLJob, bytes(reply.data))
        assert (reply.kind, answer.retcode, answer.iteration) == (PayloadKind.FLATBUFFERS, 200, 1)

    def test_update_model_counts(self, open_pair: Pair) -> None:
        self.start(open_pair, "c1")
        reply = self.update(open_pair, "c1")
        assert codec.decode(ResponseUpdateModel, bytes(reply.data)).retcode == 200
        assert list(open_pair.job.shared.uploads_of(1).values()) == [own(open_pair.b)]

    def test_get_model(self, open_pair: Pair) -> None:
        body = codec.encode(RequestGetModel(fl_name="job", iteration=0, timestamp="1"))
        reply = open_pair.asked(Command.ROUND_REQUEST, body, user_cmd=4)
        answer = codec.decode(ResponseGetModel, bytes(reply.data))
        assert (answer.retcode, answer.reason) == (200, "Get model for iteration 0")

    def test_a_refusal_in_words_is_raw(self, open_pair: Pair) -> None:
        open_pair.b.api.stopping = True
        reply = self.start(open_pair, "c1")
        assert reply.kind is PayloadKind.RAW and b"disabled or finished" in reply.data

    def test_nonsense_is_answered_as_to_a_device(self, open_pair: Pair) -> None:
        reply = open_pair.asked(Command.ROUND_REQUEST, b"\xff" * 40, user_cmd=2)
        assert codec.decode(ResponseFLJob, bytes(reply.data)).retcode == 400

    def test_an_update_that_no_device_could_send_is_refused_before_room_is_made(
        self, open_pair: Pair
    ) -> None:
        length = open_pair.b.api.longest_update + 1
        said = open_pair.refused(Command.ROUND_REQUEST, bytes(length), user_cmd=3)
        assert said == f"an update of {length} bytes is longer than the model allows"
        assert open_pair.b.ledgers.own is not None
        assert open_pair.b.ledgers.own.free_slots == open_pair.b.ledgers.own.shape.slots


class TestModelWeight:
    def test_the_model_of_an_iteration(self, open_pair: Pair) -> None:
        open_pair.job.until_next()
        reply = open_pair.asked(Command.GET_MODEL_WEIGHT, number=1)
        model = decode_model(bytes(reply.data))
        (param,) = model.params
        assert (model.fl_name, model.instance_name, model.iteration_num) == ("job", "i_001", 1)
        assert (param.name, param.shape, param.type, param.require_aggr) == ("who", (6,), "fp32", True)
        there = open_pair.b.driver.models.newest_image.arrays["who"]
        assert np.array_equal(np.frombuffer(param.data, "<f4"), there)

    def test_one_that_is_not_kept(self, open_pair: Pair) -> None:
        said = open_pair.refused(Command.GET_MODEL_WEIGHT, number=8)
        assert said == "Failed to get model of iteration 8"


class TestLedgers:
    def test_locate(self, pair: Pair) -> None:
        locate = pair.peers.locate
        assert pair.outcome(locate(pair.b.node_id, own(pair.b))) is Whereabouts.HERE
        assert pair.outcome(locate(pair.b.node_id, own(pair.a))) is Whereabouts.ABSENT

    def test_nothing_is_shown_of_an_iteration_that_collects(self, pair: Pair) -> None:
        with pytest.raises(PeerRefused, match="iteration 1 is not sealed in attempt 1 here"):
            pair.outcome(pair.peers.seal(pair.b.node_id, "i_001", 1, 1))

    @pytest.mark.parametrize("where", [("i_001", 1, 1), ("i_001", 3, 1), ("i_001", 2, 2), ("i_002", 2, 1)])
    def test_nor_of_another_iteration_attempt_or_instance(
        self, pair: Pair, where: tuple[str, int, int]
    ) -> None:
        pair.until_sealed()
        with pytest.raises(PeerRefused, match="is not sealed in attempt"):
            pair.outcome(pair.peers.seal(pair.b.node_id, *where))

    def test_a_sealed_sum_is_offered_and_read(self, pair: Pair) -> None:
        pair.until_sealed()
        (offer,) = pair.outcome(pair.peers.seal(pair.b.node_id, "i_001", 2, 1))
        assert (offer.ledger, offer.updates) == (own(pair.b), 1)
        copy = pair.a.ledgers.copy_in_memory(offer.head_bytes(), offer.start, offer.length)
        pair.outcome(pair.peers.copy_partial(pair.b.node_id, offer, "i_001", 2, 1, copy))
        epoch = replace(pair.a.driver.epoch(), iteration=2)
        partial = copy.finish(pair.a.publication.held(epoch.base).layout, epoch)  # type: ignore[union-attr]
        assert partial.totals.count == 1 and partial.sums[CLIENTS.index("c1")] == 2.0

    @pytest.mark.parametrize(
        ("offset", "length", "good"),
        [(0, 1, True), (0, 0, False), (1 << 40, 1, False), (0, CHUNK + 1, False)],
    )
    def test_only_bytes_that_are_there_are_given(
        self, pair: Pair, offset: int, length: int, good: bool
    ) -> None:
        pair.until_sealed()
        asked = messages.pack(messages.ReadPartial("i_001", 2, 1, own(pair.b), offset, length))
        if good:
            assert len(pair.asked(Command.READ_PARTIAL, asked, sender=pair.a.node_id).data) == length
        else:
            said = pair.refused(Command.READ_PARTIAL, asked, sender=pair.a.node_id)
            assert said.startswith(f"there are no {length} bytes at {offset} of")

    def test_the_last_byte_is_there(self, pair: Pair) -> None:
        pair.until_sealed()
        (offer,) = pair.outcome(pair.peers.seal(pair.b.node_id, "i_001", 2, 1))
        for past, good in ((0, True), (1, False)):
            request = messages.ReadPartial("i_001", 2, 1, offer.ledger, offer.length - 4 + past, 4)
            if good:
                pair.asked(Command.READ_PARTIAL, messages.pack(request), sender=pair.a.node_id)
            else:
                pair.refused(Command.READ_PARTIAL, messages.pack(request), sender=pair.a.node_id)

    def test_a_ledger_adopted_after_the_first_reading_can_be_read(self, pair: Pair) -> None:
        """Its process may be noticed to be gone only while the finaliser is reading already."""
        pair.until_sealed()
        asked = messages.ReadPartial("i_001", 2, 1, own(pair.b), 0, 8)
        first = pair.asked(Command.READ_PARTIAL, messages.pack(asked), sender=pair.a.node_id)
        held = pair.outcome(pair.b.intake.seal(2, 1))
        pair.b.ledgers.adopted["ab" * 16] = replace(held, ledger_id="ab" * 16)
        later = messages.pack(replace(asked, ledger="ab" * 16))
        second = pair.asked(Command.READ_PARTIAL, later, sender=pair.a.node_id)
        assert bytes(second.data) == bytes(first.data)

    def test_a_ledger_of_somebody_else_cannot_be_read(self, pair: Pair) -> None:
        pair.until_sealed()
        asked = messages.pack(messages.ReadPartial("i_001", 2, 1, own(pair.a), 0, 1))
        said = pair.refused(Command.READ_PARTIAL, asked, sender=pair.a.node_id)
        assert said == "this server does not hold that ledger"

    def test_a_sum_is_not_shown_any_more_once_the_iteration_is_over(self, pair: Pair) -> None:
        pair.until_sealed()
        asked = messages.pack(messages.ReadPartial("i_001", 2, 1, own(pair.b), 0, 1))
        pair.asked(Command.READ_PARTIAL, asked, sender=pair.a.node_id)
        pair.job.settle()
        assert pair.job.number == 3
        assert "is not sealed" in pair.refused(Command.READ_PARTIAL, asked, sender=pair.a.node_id)

    def test_a_broken_sum_is_offered_as_empty(self, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
        """So that its updates are given up at once, not waited for."""
        pair.until_sealed()

        async def broken(number: int, attempt: int) -> None:
            raise Damaged("a merge failed")

        monkeypatch.setattr(pair.b.intake, "seal", broken)
        asked = messages.pack(messages.SealPartials("i_001", 2, 1))
        (offer,) = messages.unpack_offers(pair.asked(Command.SEAL_PARTIAL, asked, sender=pair.a.node_id).data)
        assert (offer.ledger, offer.updates, offer.length) == (own(pair.b), 0, 0)


class TestHandOver:
    def giving(self, pair: Pair) -> tuple[Any, Peers]:
        """A has sealed what it holds, and is about to stop."""
        in_the_middle(pair.job, 0)
        pair.job.moves(12)
        partial = pair.outcome(pair.a.intake.seal(2, 1))
        pair.a.driver.stopping = Closed(("i_001", 2, 1), [partial])
        return partial, pair.peers

    def test_a_sum_changes_hands(self, pair: Pair) -> None:
        partial, peers = self.giving(pair)
        held = partial.totals.count
        pair.outcome(peers.hand_over(pair.b.node_id, partial, "i_001", 1))
        assert pair.b.ledgers.adopted[partial.ledger_id].totals.count == held
        assert pair.job.shared.ledger_owner(partial.ledger_id) == pair.b.node_id

    def test_not_of_another_iteration(self, pair: Pair) -> None:
        partial, peers = self.giving(pair)
        with pytest.raises(PeerRefused, match="is not under way here"):
            pair.outcome(peers.hand_over(pair.b.node_id, replace(partial, iteration=7), "i_001", 1))

    def test_not_to_a_server_that_stops_itself(self, pair: Pair) -> None:
        partial, peers = self.giving(pair)
        pair.b.api.stopping = True
        with pytest.raises(PeerRefused, match="cannot take a ledger now"):
            pair.outcome(peers.hand_over(pair.b.node_id, partial, "i_001", 1))

    def test_a_sum_that_cannot_be_read_leaves_no_file(self, pair: Pair) -> None:
        partial, peers = self.giving(pair)
        before = set(pair.b.host.ledgers.iterdir())
        pair.a.driver.stopping = Closed(("i_001", 2, 1), [])
        with pytest.raises(PeerRefused):
            pair.outcome(peers.hand_over(pair.b.node_id, partial, "i_001", 1))
        assert set(pair.b.host.ledgers.iterdir()) == before

    @pytest.mark.parametrize("where", [("i_001", 2, 1), ("i_000", 2, 1), ("i_001", 2, 2), ("i_001", 1, 1)])
    def test_a_sum_is_shown_only_where_it_was_sealed(self, pair: Pair, where: tuple[str, int, int]) -> None:
        """In that instance, iteration and attempt; in others the ledger is looked at again."""
        pair.until_sealed()
        held = pair.outcome(pair.b.intake.seal(2, 1))
        pair.b.driver.stopping = Closed(where, [replace(held, ledger_id="ab" * 16)])
        asked = messages.pack(messages.SealPartials("i_001", 2, 1))
        offers = messages.unpack_offers(pair.asked(Command.SEAL_PARTIAL, asked, sender=pair.a.node_id).data)
        shown = {offer.ledger for offer in offers}
        assert shown == ({"ab" * 16} if where == ("i_001", 2, 1) else {own(pair.b)})

    def test_a_ledger_that_is_not_the_givers_is_not_kept(self, pair: Pair) -> None:
        partial, peers = self.giving(pair)
        pair.job.shared.owners[partial.ledger_id] = "another"
        before = set(pair.b.host.ledgers.iterdir())
        with pytest.raises(PeerRefused, match="not the giver's"):
            pair.outcome(peers.hand_over(pair.b.node_id, partial, "i_001", 1))
        assert set(pair.b.host.ledgers.iterdir()) == before
        assert partial.ledger_id not in pair.b.ledgers.adopted


class TestModels:
    def test_a_model_is_described_and_read(self, pair: Pair) -> None:
        image = pair.b.driver.models.newest_image
        tail = pair.outcome(pair.peers.read_model(pair.b.node_id, image.digest, len(image.tail)))
        assert bytes(tail) == image.tail

    def test_one_that_is_longer_than_there_is_room_for_is_not_read(self, pair: Pair) -> None:
        image = pair.b.driver.models.newest_image
        with pytest.raises(PeerError, match=f"offers a model of {len(image.tail)} bytes, this one has 3"):
            pair.outcome(pair.peers.read_model(pair.b.node_id, image.digest, 3))

    def test_one_that_is_not_held(self, pair: Pair) -> None:
        with pytest.raises(PeerRefused, match="does not hold that model"):
            pair.outcome(pair.peers.read_model(pair.b.node_id, "00" * 32, 1000))

    @pytest.mark.parametrize(("offset", "length"), [(0, 0), (10**9, 1), (0, CHUNK + 1)])
    def test_only_bytes_that_are_there_are_given(self, pair: Pair, offset: int, length: int) -> None:
        digest = pair.b.driver.models.newest_image.digest
        asked = messages.pack(messages.ReadModel(digest, offset, length))
        assert "there are no" in pair.refused(Command.READ_MODEL, asked, sender=pair.a.node_id)

    def test_a_candidate_that_redis_does_not_name_is_not_believed(self, pair: Pair) -> None:
        asked = messages.pack(messages.OfferModel(1, "00" * 32))
        said = pair.refused(Command.OFFER_MODEL, asked, sender=pair.a.node_id)
        assert said == "the shared state names no such model"

    def test_a_candidate_is_read_from_who_offers_it(self, pair: Pair) -> None:
        in_the_middle(pair.job, 0)
        status = pair.job.shared.status
        assert status is not None
        while status.phase is not Phase.CANDIDATE:
            assert pair.job.move()
        digest = status.digest
        maker = next(s for s in pair.job.living if s.node_id == status.token.partition(":")[2])
        other = next(s for s in pair.job.living if s is not maker)
        assert other.publication.held(digest) is None
        pair.outcome(Peers(pair.client(maker.node_id)).offer_model(other.node_id, 2, digest, 2.0))
        image = other.publication.held(digest)
        assert image is not None and content_of(image)[0] == 2


class TestPeers:
    def test_a_node_without_an_address_is_asked_nothing(self, pair: Pair) -> None:
        with pytest.raises(PeerError, match="worker_7 tells no address"):
            pair.outcome(pair.peers.locate("worker_7", "l"))

    def test_nobody_listens(self, pair: Pair) -> None:
        pair.job.kill(1)
        with pytest.raises(PeerUnreachable) as caught:
            pair.outcome(pair.peers.locate(pair.b.node_id, "l"))
        assert caught.value.refused

    def test_another_server_at_that_address_is_not_taken_for_it(self, pair: Pair) -> None:
        before = pair.b.node_id[:-5] + "99999"
        assert address_of(before) == address_of(pair.b.node_id)
        with pytest.raises(PeerError, match=f"expect recv node {before} != actual node"):
            pair.outcome(pair.peers.locate(before, "l"))

    def test_a_silent_node_is_not_waited_for_for_ever(self, pair: Pair) -> None:
        pair.job.network.silent = True
        found: list[Any] = []
        defer.Deferred.fromCoroutine(pair.peers.locate(pair.b.node_id, "l")).addBoth(found.append)
        pair.job.pass_time(1.5)
        assert not found
        pair.job.pass_time(1.0)
        assert found[0].check(PeerTimeout)

    def test_nonsense_is_a_fault_of_the_peer(self, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
        class Nowhere:
            value = "nowhere"

        monkeypatch.setattr(pair.b.ledgers, "locate", lambda ledger_id: Nowhere)
        with pytest.raises(PeerError, match="answered nonsense"):
            pair.outcome(pair.peers.locate(pair.b.node_id, "l"))

    def test_a_chunk_of_another_length_is_refused(self, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
        pair.until_sealed()
        (offer,) = pair.outcome(pair.peers.seal(pair.b.node_id, "i_001", 2, 1))
        monkeypatch.setattr("fedcore.services.node_api._part", lambda content, offset, length: content[:5])
        copy: PartialCopy = pair.a.ledgers.copy_in_memory(offer.head_bytes(), offer.start, offer.length)
        with pytest.raises(PeerError, match=f"sent 5 bytes instead of {offer.length}"):
            pair.outcome(pair.peers.copy_partial(pair.b.node_id, offer, "i_001", 2, 1, copy))

    def test_an_offer_says_what_a_sum_is(self, pair: Pair) -> None:
        pair.until_sealed()
        partial = pair.outcome(pair.b.intake.seal(2, 1))
        offer = offer_of(partial)
        assert (offer.ledger, offer.updates) == (partial.ledger_id, 1)
        assert (offer.head_bytes(), offer.start) == (partial.head, partial.start)
        assert offer.length == len(partial.content)
