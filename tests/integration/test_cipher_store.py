"""The cipher rounds in the shared state against a real Redis: what is frozen, what is repeated, what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from integration.redis_fixture import PrivateRedis, ReactorThread, redis_client
from integration.test_store import Shared

from fedcore.core.admission import Acceptance, Selection
from fedcore.core.cipher import Outcome
from fedcore.core.client_key import client_key
from fedcore.core.iteration import Phase
from fedcore.store import keys
from fedcore.store.cipher_state import CipherState, Members, Share, Told, pack_shares, unpack_shares
from fedcore.store.cluster_state import ClusterState, IterationMoved, MaskedUpdate, StateMissing
from fedcore.store.notices import Notices
from fedcore.store.redis import Redis
from fedcore.wire.messages import RequestExchangeKeys
from fedctl.processes import wait_until

N = 5  # the current iteration
WINDOW_MS = 300_999
_jobs = itertools.count(1)


def fresh(loop: ReactorThread, redis: Redis) -> Shared:
    """The state of a job that no other test has."""
    return Shared(loop, redis, ClusterState(redis, f"masked{next(_jobs)}", "i_1", WINDOW_MS))


def keys_of(fl_id: str, first: int = 1) -> RequestExchangeKeys:
    """The keys that a client sends; another ``first`` makes other ones."""
    c_pk, s_pk = bytes([first]) * 32, bytes([first + 1]) * 32
    return RequestExchangeKeys(
        fl_id, c_pk, s_pk, N, "1700000000000", bytes([first]) * 16, bytes([first + 2]) * 16, bytes(32)
    )


class Rounds:
    """One fresh job in iteration 5, and short words for what its clients do; X = 3, K = 3, H = 2, t + 1 = 2."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.state = CipherState(shared.state)

    def run(self, work: Any) -> Any:
        return self.shared.run(work)

    def exchange(self, fl_id: str, *, first: int = 1, completes: int = 3, fit: bool = True) -> Told:
        told: Told = self.run(self.state.exchange_keys(keys_of(fl_id, first), completes=completes, fit=fit))
        return told

    def get_keys(self, fl_id: str, *, listed: int = 3, number: int = N) -> Told:
        told: Told = self.run(self.state.get_keys(number, fl_id, listed=listed, completes=3))
        return told

    def members(self) -> Members:
        return Members(self.run(self.state.members(N)))

    def share(self, fl_id: str, *, fit: bool = True, completes: int = 2) -> Told:
        members = self.members()
        source = members.places.get(fl_id, 0)
        shares = {
            other: Share(source, 0, f"{fl_id}->{other}".encode()) for other in members.ids if other != fl_id
        }
        told: Told = self.run(
            self.state.share_secrets(N, fl_id, shares if fit else None, completes=completes)
        )
        return told

    def get_secrets(self, fl_id: str, *, shared: int = 2) -> Told:
        told: Told = self.run(self.state.get_secrets(N, fl_id, shared=shared, completes=2))
        return told

    def listed(self, fl_id: str, *, number: int = N) -> tuple[Told, list[str]]:
        found: tuple[Told, list[str]] = self.run(self.state.client_list(number, fl_id, completes=2))
        return found

    def sign(self, fl_id: str, signature: bytes | None = b"s", *, number: int = N) -> Told:
        told: Told = self.run(self.state.push_list_sign(number, fl_id, signature, completes=2))
        return told

    def get_signs(self, fl_id: str, *, number: int = N) -> Told:
        told: Told = self.run(self.state.get_list_sign(number, fl_id, signed=2, completes=2))
        return told

    def report(self, fl_id: str, owners: dict[str, bytes] | None = None, *, number: int = N) -> Told:
        shares = None
        if owners is not None:
            places = self.members().places
            shares = [Share(places[owner], 1, share) for owner, share in owners.items()]
        told: Told = self.run(self.state.report_secrets(number, fl_id, shares, completes=2))
        return told

    # ---- steps of a whole iteration

    def select(self, *fl_ids: str) -> None:
        for fl_id in fl_ids:
            self.shared.select(fl_id, places=9)

    def exchanged(self) -> None:
        """a, b and c are members and have their list; d has a place only."""
        self.select("a", "b", "c", "d")
        for fl_id in "abc":
            assert self.exchange(fl_id).outcome is Outcome.COUNTED
        for fl_id in "abc":
            assert self.get_keys(fl_id).outcome is Outcome.COUNTED

    def secret(self) -> None:
        """a and b have shared, and have what is for them."""
        self.exchanged()
        for fl_id in "ab":
            assert self.share(fl_id).outcome is Outcome.COUNTED
        for fl_id in "ab":
            assert self.get_secrets(fl_id).outcome is Outcome.COUNTED

    def unmasking(self) -> None:
        """The updates of a and b count, and the list of them is final."""
        self.secret()
        for fl_id in "ab":
            assert self.upload(fl_id)[0] is Acceptance.ACCEPTED
        token = self.shared.claimed()
        assert self.shared.record(token, phase=Phase.UNMASKING)

    def upload(
        self, fl_id: str, digest: bytes = b"d" * 16, ledger_id: str = "L1", fit: bool = True
    ) -> tuple[Acceptance, Any, Any]:
        node = {"L1": "node-1", "L2": "node-1"}[ledger_id]
        self.shared.serve(ledger_id, node)
        asked = {"quorum": 2, "ledger_id": ledger_id, "node_id": node, "fit": fit}
        masked = MaskedUpdate("getSecrets", digest)
        found: tuple[Acceptance, Any, Any] = self.run(
            self.shared.state.accept_upload(N, 1, N, fl_id, masked=masked, **asked)
        )
        return found

    def advance(self) -> None:
        phase = self.shared.read().iteration.phase
        token = self.shared.status().get("token", "")
        assert self.run(
            self.shared.state.advance(
                N, 1, phase=phase, success=True, result="fine", finishes=False, token=token
            )
        )

    def counts(self) -> dict[str, int]:
        return {name: count for name, count, _ in self.shared.read().rounds}


@pytest.fixture
def rounds(loop: ReactorThread, redis: Redis) -> Rounds:
    shared = fresh(loop, redis)
    assert shared.create()
    return Rounds(shared)


class TestExchangeKeys:
    def test_needs_a_place(self, rounds: Rounds) -> None:
        assert rounds.exchange("a").outcome is Outcome.UNKNOWN
        rounds.select("a")
        assert rounds.exchange("a") == Told(Outcome.COUNTED, 1)

    def test_is_counted_with_its_moment(self, rounds: Rounds) -> None:
        rounds.select("a", "b")
        rounds.exchange("a")
        rounds.exchange("b")
        ((name, count, ago),) = rounds.shared.read().rounds
        assert (name, count) == ("exchangeKeys", 2)
        assert 0 <= ago < 60

    def test_the_same_keys_again_change_nothing(self, rounds: Rounds) -> None:
        rounds.select("a")
        rounds.exchange("a")
        again = replace(keys_of("a"), timestamp="1700000009999")
        assert (
            rounds.run(rounds.state.exchange_keys(again, completes=3, fit=True)).outcome is Outcome.REPEATED
        )
        assert rounds.members().entries == (keys_of("a"),)

    def test_other_keys_replace_while_the_list_is_open(self, rounds: Rounds) -> None:
        rounds.select("a", "b")
        rounds.exchange("a")
        rounds.exchange("b")
        assert rounds.exchange("a", first=7).outcome is Outcome.COUNTED
        assert rounds.counts() == {"exchangeKeys": 2}
        assert rounds.members().entries == (keys_of("a", 7), keys_of("b"))

    def test_who_is_left_out(self, rounds: Rounds) -> None:
        def left_out() -> list[str]:
            closes = {"exchangeKeys": 3, "shareSecrets": 2}
            return [one for one in "abcd" if rounds.run(rounds.state.left_out(N, one, closes))]

        rounds.select("a", "b", "c", "d")
        for fl_id in "ab":
            rounds.exchange(fl_id)
        assert left_out() == []
        rounds.exchange("c")
        assert left_out() == ["d"]
        for fl_id in "abc":
            rounds.get_keys(fl_id)
        rounds.share("a")
        assert left_out() == ["d"]
        rounds.share("b")
        assert left_out() == ["c", "d"]
        assert not rounds.run(rounds.state.left_out(N + 1, "d", {"exchangeKeys": 3, "shareSecrets": 2}))
        assert not rounds.run(rounds.state.left_out(N, "c", {"exchangeKeys": 3, "shareSecrets": 0}))

    def test_a_full_list_takes_nobody_and_no_other_keys(self, rounds: Rounds) -> None:
        rounds.exchanged()
        assert rounds.exchange("d").outcome is Outcome.FULL
        assert rounds.exchange("a", first=7).outcome is Outcome.FULL
        assert rounds.exchange("a").outcome is Outcome.REPEATED
        assert rounds.members().ids == ("a", "b", "c")
        assert rounds.members().entries[0] == keys_of("a")

    def test_what_is_unfit_is_told_last_and_never_listed(self, rounds: Rounds) -> None:
        assert rounds.exchange("a", fit=False).outcome is Outcome.UNKNOWN
        rounds.select("a")
        assert rounds.exchange("a", fit=False).outcome is Outcome.UNFIT
        assert len(rounds.members()) == 0

    def test_many_at_once_on_two_servers_never_exceed_the_list(
        self, loop: ReactorThread, shared_server: PrivateRedis, rounds: Rounds
    ) -> None:
        ids = [f"client-{number}" for number in range(40)]
        for fl_id in ids:
            rounds.shared.select(fl_id, places=99)
        with redis_client(loop, shared_server.port) as second:
            loop.run(second.connected())
            here = rounds.shared.state
            there = ClusterState(second, here.keys.fl_name, here.keys.instance, WINDOW_MS)
            states = [CipherState(here), CipherState(there)]
            told = rounds.shared.together(
                [
                    states[number % 2].exchange_keys(keys_of(fl_id), completes=7, fit=True)
                    for number, fl_id in enumerate(ids)
                ]
            )
        outcomes = [one.outcome for one in told]
        assert outcomes.count(Outcome.COUNTED) == 7
        assert outcomes.count(Outcome.FULL) == 33
        counted = {fl_id for fl_id, one in zip(ids, told, strict=True) if one.outcome is Outcome.COUNTED}
        assert set(rounds.members().ids) == counted
        assert sorted(one.counted for one in told if one.outcome is Outcome.COUNTED) == list(range(1, 8))


class TestGetKeys:
    def test_comes_too_early_while_the_list_is_open(self, rounds: Rounds) -> None:
        rounds.select("a", "b", "c")
        rounds.exchange("a")
        assert rounds.get_keys("a").outcome is Outcome.EARLY

    def test_is_for_members_only(self, rounds: Rounds) -> None:
        rounds.exchanged()
        assert rounds.get_keys("d").outcome is Outcome.STRANGER

    def test_a_repeat_is_answered_and_not_counted(self, rounds: Rounds) -> None:
        rounds.exchanged()
        assert rounds.get_keys("a").outcome is Outcome.REPEATED
        assert rounds.counts()["getKeys"] == 3

    def test_members_are_in_bytewise_order(self, rounds: Rounds) -> None:
        ids = ("z", "é", "Z", "a")
        rounds.select(*ids)
        for fl_id in ids:
            rounds.exchange(fl_id, completes=4)
        assert rounds.members().ids == ("Z", "a", "z", "é")


class TestShares:
    def test_lie_with_their_recipients(self, rounds: Rounds) -> None:
        rounds.secret()
        for fl_id, expected in {
            "a": [Share(1, 0, b"b->a")],
            "b": [Share(0, 0, b"a->b")],
            "c": [Share(0, 0, b"a->c"), Share(1, 0, b"b->c")],
        }.items():
            assert unpack_shares(rounds.run(rounds.state.shares_for(N, fl_id))) == expected

    def test_are_stored_once(self, rounds: Rounds) -> None:
        rounds.exchanged()
        assert rounds.share("a") == Told(Outcome.COUNTED, 1)
        assert rounds.share("a").outcome is Outcome.REPEATED
        assert len(unpack_shares(rounds.run(rounds.state.shares_for(N, "b")))) == 1

    def test_need_the_list_of_keys(self, rounds: Rounds) -> None:
        rounds.select("a", "b", "c")
        for fl_id in "abc":
            rounds.exchange(fl_id)
        assert rounds.share("a").outcome is Outcome.STRANGER

    def test_beyond_the_threshold_are_refused(self, rounds: Rounds) -> None:
        rounds.secret()
        assert rounds.share("c").outcome is Outcome.FULL
        assert len(unpack_shares(rounds.run(rounds.state.shares_for(N, "a")))) == 1
        assert rounds.share("a").outcome is Outcome.REPEATED

    def test_that_are_unfit_leave_nothing(self, rounds: Rounds) -> None:
        rounds.exchanged()
        assert rounds.share("a", fit=False).outcome is Outcome.UNFIT
        assert rounds.run(rounds.state.sharers(N)) == frozenset()
        assert rounds.run(rounds.state.shares_for(N, "b")) == b""

    def test_a_race_of_all_members_ends_with_just_enough(self, rounds: Rounds) -> None:
        rounds.exchanged()
        ids = rounds.members().ids
        told = rounds.shared.together(
            [
                rounds.state.share_secrets(
                    N, one, {other: Share(place, 0, b"x") for other in ids if other != one}, completes=2
                )
                for place, one in enumerate(ids)
            ]
        )
        assert sorted(one.outcome for one in told) == [Outcome.COUNTED, Outcome.COUNTED, Outcome.FULL]

    def test_have_the_lifetime_of_the_iteration(self, rounds: Rounds) -> None:
        rounds.secret()
        names = rounds.shared.state.keys
        for name in (
            names.shares(N, client_key("a")),
            names.shares(N, client_key("c")),
            names.cipher_round(N, "exchangeKeys"),
            names.cipher_round(N, "getSecrets"),
            names.rounds(N),
        ):
            assert 0 < rounds.shared.ttl(name) <= keys.iteration_ttl(WINDOW_MS), name

    def test_no_id_stands_beyond_the_entries(self, rounds: Rounds) -> None:
        rounds.secret()
        assert not [name for name in rounds.shared.names() if name.endswith((":a:String", ":b:String"))]


class TestGetSecrets:
    def test_comes_too_early_before_enough_have_shared(self, rounds: Rounds) -> None:
        rounds.exchanged()
        rounds.share("a")
        assert rounds.get_secrets("a").outcome is Outcome.EARLY

    def test_is_for_sharers_only_and_repeats(self, rounds: Rounds) -> None:
        rounds.secret()
        assert rounds.get_secrets("c").outcome is Outcome.STRANGER
        assert rounds.get_secrets("a").outcome is Outcome.REPEATED
        assert rounds.counts()["getSecrets"] == 2


class TestMaskedUpdates:
    def test_are_only_of_those_who_have_their_secrets(self, rounds: Rounds) -> None:
        rounds.exchanged()
        rounds.share("a")
        rounds.share("b")
        assert rounds.upload("a")[0] is Acceptance.UNPREPARED
        rounds.get_secrets("a")
        assert rounds.upload("a")[0] is Acceptance.ACCEPTED

    def test_that_is_the_last_check(self, rounds: Rounds) -> None:
        rounds.exchanged()
        assert rounds.upload("stranger")[0] is Acceptance.UNKNOWN_CLIENT
        assert rounds.upload("a", fit=False)[0] is Acceptance.UNFIT

    def test_come_again_only_as_they_were(self, rounds: Rounds) -> None:
        rounds.secret()
        rounds.upload("a")
        assert rounds.upload("a")[0] is Acceptance.ACCEPTED  # the same ledger, after a lost answer
        assert rounds.upload("a", b"e" * 16)[0] is Acceptance.CHANGED
        rounds.shared.reopen("L1")
        rounds.shared.select("a", places=9)
        asked = {"quorum": 2, "ledger_id": "L2", "node_id": "node-1", "fit": True}
        rounds.shared.serve("L2", "node-1")
        for digest, expected in ((b"e" * 16, Acceptance.CHANGED), (b"d" * 16, Acceptance.ACCEPTED)):
            accepting = rounds.shared.state.accept_upload(
                N, 2, N, "a", masked=MaskedUpdate("getSecrets", digest), **asked
            )
            assert rounds.run(accepting)[0] is expected

    def test_keep_an_evaluation_vector_as_others_do(self, rounds: Rounds) -> None:
        rounds.secret()
        rounds.shared.serve("L1", "node-1")
        for fl_id, vector in (("a", b"12345678"), ("b", b"")):
            accepting = rounds.shared.state.accept_upload(
                N,
                1,
                N,
                fl_id,
                quorum=2,
                ledger_id="L1",
                node_id="node-1",
                fit=True,
                vector=vector,
                kept=3,
                masked=MaskedUpdate("getSecrets", b"d" * 16),
            )
            assert rounds.run(accepting)[0] is Acceptance.ACCEPTED
        assert rounds.run(rounds.shared.state.vectors()) == [b"12345678"]


class TestClientList:
    def test_is_not_told_before_it_is_final(self, rounds: Rounds) -> None:
        rounds.secret()
        rounds.upload("a")
        assert rounds.listed("a") == (Told(Outcome.EARLY, 0), [])
        rounds.upload("b")
        token = rounds.shared.claimed()
        assert rounds.listed("a") == (Told(Outcome.EARLY, 0), [])
        assert rounds.shared.record(token, phase=Phase.UNMASKING)
        told, clients = rounds.listed("a")
        assert told == Told(Outcome.COUNTED, 1)
        assert rounds.members().of_clients(clients) == ["a", "b"]

    def test_is_for_uploaders_only_and_repeats(self, rounds: Rounds) -> None:
        rounds.unmasking()
        first = rounds.listed("a")
        assert rounds.listed("c") == (Told(Outcome.STRANGER, 0), [])
        assert rounds.listed("a") == (Told(Outcome.REPEATED, 0), first[1])
        assert rounds.counts()["getClientList"] == 1

    def test_is_told_of_an_ended_iteration_if_it_was_told_before(self, rounds: Rounds) -> None:
        rounds.unmasking()
        _, clients = rounds.listed("a")
        rounds.advance()
        assert rounds.run(rounds.state.release(N))
        assert rounds.listed("b") == (Told(Outcome.REPEATED, 0), clients)
        assert rounds.listed("c")[0].outcome is Outcome.OTHER

    def test_asks_for_updates_again_that_were_lost(self, rounds: Rounds) -> None:
        shared, again = rounds.shared, {"number": N, "attempt": 2}
        rounds.secret()
        rounds.upload("a")
        rounds.upload("b", ledger_id="L2")
        assert shared.reopen("L2", phase=Phase.REDUCING, token=shared.claimed()) == 1
        assert rounds.listed("b") == (Told(Outcome.LOST, 0), [])
        assert rounds.listed("a") == (Told(Outcome.EARLY, 0), [])
        assert rounds.listed("stranger") == (Told(Outcome.EARLY, 0), [])
        assert shared.select("e", places=4)[0] is Selection.FULL, "nobody can have the place of a member"
        assert shared.select("b", places=4)[0] is Selection.KNOWN
        assert shared.seal(**again)
        token, *_ = shared.claim(**again) or ("",)
        assert rounds.listed("b") == (Told(Outcome.EARLY, 0), [])
        assert shared.record(token, phase=Phase.UNMASKING, **again)
        assert rounds.listed("b") == (Told(Outcome.LATE, 0), [])
        assert rounds.listed("stranger") == (Told(Outcome.STRANGER, 0), [])
        assert rounds.members().of_clients(rounds.listed("a")[1]) == ["a"]

    def test_is_not_told_of_an_ended_iteration_if_it_never_was(self, rounds: Rounds) -> None:
        rounds.unmasking()
        rounds.advance()
        assert rounds.listed("b")[0].outcome is Outcome.OTHER


class TestSignatures:
    def test_are_kept_up_to_the_threshold(self, rounds: Rounds) -> None:
        rounds.unmasking()
        assert rounds.sign("a") == Told(Outcome.STRANGER, 0, True)
        assert rounds.sign("c") == Told(Outcome.STRANGER, 0, False)
        for fl_id in "ab":
            rounds.listed(fl_id)
        assert rounds.sign("a", None).outcome is Outcome.UNFIT
        assert rounds.sign("a", b"of a") == Told(Outcome.COUNTED, 1, True)
        assert rounds.sign("a", b"another").outcome is Outcome.REPEATED
        assert rounds.get_signs("a").outcome is Outcome.EARLY
        assert rounds.sign("b", b"of b").outcome is Outcome.COUNTED
        assert rounds.sign("c") == Told(Outcome.FULL, 2, False)
        assert rounds.get_signs("c") == Told(Outcome.STRANGER, 0, False)
        assert rounds.get_signs("a").outcome is Outcome.COUNTED
        assert rounds.get_signs("a").outcome is Outcome.REPEATED
        assert rounds.run(rounds.state.signatures(N)) == {client_key("a"): b"of a", client_key("b"): b"of b"}

    def test_late_ones_are_told_that_it_is_enough(self, rounds: Rounds) -> None:
        rounds.unmasking()
        for fl_id in "ab":
            rounds.listed(fl_id)
        rounds.sign("a")
        rounds.sign("b")
        rounds.advance()
        assert rounds.sign("a").outcome is Outcome.REPEATED
        assert rounds.get_signs("b") == Told(Outcome.REPEATED, 0, True)
        assert rounds.counts() == {}


class TestReports:
    def test_are_kept_beyond_what_is_needed(self, rounds: Rounds) -> None:
        rounds.unmasking()
        assert rounds.report("a", {"b": b"1"}) == Told(Outcome.STRANGER, 0, True)
        for fl_id in "ab":
            rounds.listed(fl_id)
        assert rounds.report("a").outcome is Outcome.UNFIT
        assert rounds.report("a", {"b": b"1"}) == Told(Outcome.COUNTED, 1, True)
        assert rounds.report("a", {"b": b"2"}).outcome is Outcome.REPEATED
        assert rounds.report("b", {"a": b"3"}) == Told(Outcome.COUNTED, 2, True)
        exchanged = rounds.run(rounds.state.material(N)).read()
        assert exchanged.reports == {"a": {"b": (b"1", 1)}, "b": {"a": (b"3", 1)}}
        assert exchanged.sharers == {"a", "b"}
        assert list(exchanged.members) == ["a", "b", "c"]
        assert exchanged.members["a"] == keys_of("a")
        assert exchanged.of_clients([client_key("b"), client_key("a"), client_key("x")]) == ["a", "b"]

    def test_end_with_the_candidate(self, rounds: Rounds) -> None:
        rounds.unmasking()
        for fl_id in "ab":
            rounds.listed(fl_id)
        assert rounds.shared.record(rounds.shared.status()["token"], phase=Phase.CANDIDATE)
        assert rounds.report("a", {"b": b"1"}) == Told(Outcome.FULL, 0, True)
        assert rounds.report("c", {"b": b"1"}) == Told(Outcome.FULL, 0, False)
        assert rounds.run(rounds.state.material(N)).reports == {}

    def test_of_an_ended_iteration_are_dropped(self, rounds: Rounds) -> None:
        rounds.unmasking()
        for fl_id in "ab":
            rounds.listed(fl_id)
        rounds.advance()
        assert rounds.report("b", {"a": b"1"}) == Told(Outcome.FULL, 0, True)
        assert rounds.run(rounds.state.material(N)).reports == {}


class TestTheEnd:
    def test_secrets_go_at_once_and_the_rest_soon(self, rounds: Rounds) -> None:
        rounds.unmasking()
        for fl_id in "ab":
            rounds.listed(fl_id)
        rounds.report("a", {"b": b"1"})
        assert not rounds.run(rounds.state.release(N))
        assert rounds.run(rounds.state.shares_for(N, "c")) != b""
        rounds.advance()
        assert rounds.run(rounds.state.release(N))
        names = rounds.shared.state.keys
        for fl_id in "abc":
            assert rounds.run(rounds.state.shares_for(N, fl_id)) == b""
        assert rounds.run(rounds.state.material(N)).reports == {}
        for name in ("exchangeKeys", "getKeys", "shareSecrets", "getSecrets", "getClientList"):
            assert 0 < rounds.shared.ttl(names.cipher_round(N, name)) <= keys.RELEASE_TTL_S

    def test_the_next_iteration_begins_with_nothing(self, rounds: Rounds) -> None:
        rounds.secret()
        rounds.advance()
        assert rounds.shared.read().rounds == ()
        rounds.shared.select("a", number=N + 1)
        assert rounds.get_keys("a", number=N + 1).outcome is Outcome.EARLY


ASKING: list[Callable[[Rounds], Any]] = [
    lambda rounds: rounds.exchange("a"),
    lambda rounds: rounds.get_keys("a"),
    lambda rounds: rounds.share("a"),
    lambda rounds: rounds.get_secrets("a"),
    lambda rounds: rounds.listed("a"),
    lambda rounds: rounds.sign("a"),
    lambda rounds: rounds.get_signs("a"),
    lambda rounds: rounds.report("a", {"b": b"1"}),
]
NAMES = ("exchange", "getKeys", "share", "getSecrets", "list", "sign", "getSigns", "report")


@pytest.mark.parametrize("ask", ASKING, ids=NAMES)
class TestElsewhere:
    def test_no_state(self, loop: ReactorThread, redis: Redis, ask: Callable[[Rounds], Any]) -> None:
        shared = fresh(loop, redis)
        with pytest.raises(StateMissing):
            ask(Rounds(shared) if ask is not ASKING[-1] else _without_members(shared))

    def test_another_instance(self, rounds: Rounds, ask: Callable[[Rounds], Any]) -> None:
        rounds.unmasking()
        rounds.shared.name("i_other")
        with pytest.raises(StateMissing):
            ask(rounds)

    def test_another_iteration(self, rounds: Rounds, ask: Callable[[Rounds], Any]) -> None:
        rounds.unmasking()
        rounds.shared.set_status(iterationNum=N + 1)
        told = ask(rounds)
        assert (told[0] if isinstance(told[0], Told) else told).outcome is Outcome.OTHER

    @pytest.mark.parametrize("change", [{"runningState": 1}, {"run": "another"}])
    def test_a_disabled_job_or_a_redis_that_may_have_lost_a_part(
        self, rounds: Rounds, ask: Callable[[Rounds], Any], change: dict[str, Any]
    ) -> None:
        rounds.unmasking()
        before = rounds.counts()
        rounds.shared.set_status(**change)
        with pytest.raises(IterationMoved):
            ask(rounds)
        rounds.shared.set_status(runningState=0)
        assert rounds.counts() == before


def _without_members(shared: Shared) -> Rounds:
    """Rounds whose report names a member although there is none."""

    class Unlisted(Rounds):
        def members(self) -> Any:
            return type("Listed", (), {"places": {"b": 0}})

    return Unlisted(shared)


def test_a_list_from_before_a_fail_over_is_not_told_late(rounds: Rounds) -> None:
    rounds.unmasking()
    rounds.listed("a")
    rounds.advance()
    rounds.shared.command("HSET", rounds.shared.state.keys.rounds(N), "list:run", "another")
    assert rounds.listed("b")[0].outcome is Outcome.OTHER


def test_others_hear_of_the_first_and_the_last(
    loop: ReactorThread, shared_server: PrivateRedis, rounds: Rounds
) -> None:
    from twisted.internet.endpoints import TCP4ClientEndpoint

    heard: list[bytes] = []
    endpoint = TCP4ClientEndpoint(loop.reactor, "127.0.0.1", shared_server.port)
    notices = Notices(endpoint, "redis", heard.append, reply_timeout=5.0, reactor=loop.reactor)
    loop.call(notices.startService)
    try:
        loop.call(lambda: notices.follow(keys.changes(rounds.shared.state.keys.fl_name)))
        wait_until(lambda: heard == [b""], "subscribed")
        rounds.select("a", "b", "c")
        for fl_id in "abc":
            rounds.exchange(fl_id)
        rounds.shared.command("PUBLISH", keys.changes(rounds.shared.state.keys.fl_name), "end")
        wait_until(lambda: heard[-1] == b"end", "all heard")
        assert heard == [b"", b"exchangeKeys", b"exchangeKeys", b"end"]
    finally:
        loop.call(notices.stopService)


def test_shares_survive_packing() -> None:
    shares = [Share(0, -1, b""), Share(70_000, 2**31 - 1, bytes(33))]
    assert unpack_shares(pack_shares(shares)) == shares
    assert unpack_shares(pack_shares(shares[:1]) + pack_shares(shares[1:])) == shares
