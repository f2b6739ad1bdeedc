"""Judges a run by what its clients saw: who was promised what, and which models came out.

Nothing here reads a socket, a file or a clock: a Journal and the outcomes of the iterations go in, a Report or an
AssertionError with every fault comes out.

Every client trains a weight of its own (see ``update_of``), so a model tells whose updates are in it; all values are
small integers, so float64 sums are exact in any order and ``mean_of`` is what any correct server computes, to the bit.

What is checked:

* The model of a valid iteration is the exact mean of a set of updates that were sent for this iteration, each once.
* The set holds every acknowledged update, but for as many as are reported as lost.
* A failed iteration has a name, is allowed to fail, and keeps the bytes of the model before.
* All servers give the same bytes for the same iteration, in startFLJob and in getModel, and none gives any too early.
* No server goes back to an earlier iteration while its process lives; no place is given in an earlier iteration than
  one that had been given before the question was asked.
"""

from __future__ import annotations

import copy
import hashlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

CLIENTS = 24  # most that a test may have
MODEL = {"whose": np.zeros(CLIENTS, np.float32), "all": np.zeros((2, 3), np.float32)}
Weights = Mapping[str, npt.NDArray[np.float32]]


# ---- what clients train


def value_of(iteration: int) -> int:
    """Return what a client puts at its place: another number in neighbouring iterations, never 0."""
    return 1 + iteration % 100


def data_size_of(client: int) -> int:
    """Return a client's data size: every one another."""
    return 3 + 7 * client


def update_of(client: int, iteration: int) -> dict[str, npt.NDArray[np.float32]]:
    """Return what a client trains: its place in one weight, and its number everywhere in the other."""
    whose = np.zeros(CLIENTS, np.float32)
    whose[client] = value_of(iteration)
    return {"whose": whose, "all": np.full(6, client + 1, np.float32)}


def mean_of(clients: Iterable[int], iteration: int) -> dict[str, npt.NDArray[np.float32]]:
    """Return the exact mean of these clients' updates, each weighted by its data size; a client may occur twice."""
    members = list(clients)
    total = sum(data_size_of(client) for client in members)
    sums = {name: np.zeros(values.size) for name, values in MODEL.items()}
    for client in members:
        for name, values in update_of(client, iteration).items():
            sums[name] += np.float64(values) * data_size_of(client)
    return {name: np.float32(values / total) for name, values in sums.items()}


def members_of(weights: Weights) -> frozenset[int]:
    """Return whose updates are in a model."""
    return frozenset(int(client) for client in np.flatnonzero(weights["whose"]))


def digest_of(weights: Weights) -> str:
    """Return a digest of a model's names and bytes."""
    total = hashlib.sha256()
    for name in sorted(weights):
        total.update(name.encode() + b"\0" + np.ascontiguousarray(weights[name], np.float32).tobytes())
    return total.hexdigest()[:16]


# ---- what was seen


@dataclass(frozen=True)
class Acknowledged:
    """An updateModel that was answered 200."""

    iteration: int
    client: int
    server: int
    at: float


@dataclass(frozen=True)
class Received:
    """A model that came with an answer.

    Attributes:
        iteration: whose result it is; what a getModel asked for, one less than what a startFLJob named.
        serving: the iteration that the answer named.
        server: who answered.
        digest: of the weights.
        at: monotonic seconds.
    """

    iteration: int
    serving: int
    server: int
    digest: str
    at: float


@dataclass(frozen=True)
class Answered:
    """An answer that named an iteration.

    Attributes:
        server: who answered.
        life: which process of that server, counted from 0.
        asked: monotonic seconds.
        at: monotonic seconds.
        serving: the iteration it named.
        placed: whether it gave a place in that iteration, which only the shared state can.
    """

    server: int
    life: int
    asked: float
    at: float
    serving: int
    placed: bool


@dataclass(frozen=True)
class Asked:
    """A question of a client, from its first try to the answer.

    Attributes:
        round: its route.
        client: who asked.
        began: monotonic seconds.
        at: monotonic seconds.
        repeats: tries in vain before the answer.
        texts: "not ready" texts before or as the answer.
        code: of the answer, None for a text.
        told: seconds after which the answer asks to come again, None if it does not.
    """

    round: str
    client: int
    began: float
    at: float
    repeats: int
    texts: int
    code: int | None
    told: float | None = None


class Journal:
    """What the clients of a run did and saw; may be written from many threads."""

    def __init__(self) -> None:
        self.sent: set[tuple[int, int]] = set()  # (iteration, client) of every updateModel begun
        self.acknowledged: list[Acknowledged] = []
        self.received: list[Received] = []
        self.answered: list[Answered] = []
        self.asked: list[Asked] = []
        self.models: dict[str, Weights] = {}  # digest -> weights
        self.refused = 0
        self.repeated = 0  # requests that had to be sent again after a broken connection
        self._newest = self._serving = 0
        self._lock = threading.Lock()

    def send(self, iteration: int, client: int) -> None:
        """Note an upload before it leaves."""
        with self._lock:
            self.sent.add((iteration, client))

    def acknowledge(self, *entry: Acknowledged) -> None:
        """Note a promise."""
        with self._lock:
            self.acknowledged.extend(entry)

    def receive(self, iteration: int, serving: int, server: int, weights: Weights, at: float) -> None:
        """Note a model."""
        digest = digest_of(weights)
        with self._lock:
            self.models.setdefault(digest, weights)
            self._newest = max(self._newest, iteration)
            self.received.append(Received(iteration, serving, server, digest, at))

    def answer(self, entry: Answered) -> None:
        """Note which iteration an answer named."""
        with self._lock:
            self.answered.append(entry)
            self._serving = max(self._serving, entry.serving)

    def ask(self, entry: Asked) -> None:
        """Note a question that was answered."""
        with self._lock:
            self.asked.append(entry)

    def count(self, *, refused: int = 0, repeated: int = 0) -> None:
        """Count what is no promise."""
        with self._lock:
            self.refused += refused
            self.repeated += repeated

    def promised(self, iteration: int) -> frozenset[int]:
        """Return the clients whose update of an iteration was acknowledged."""
        with self._lock:
            return frozenset(entry.client for entry in self.acknowledged if entry.iteration == iteration)

    def newest(self) -> int:
        """Return the newest iteration whose model somebody got, 0 for none but the initial one."""
        with self._lock:
            return self._newest

    def serving(self) -> int:
        """Return the latest iteration that an answer has named."""
        with self._lock:
            return self._serving

    def first_seen(self) -> dict[int, float]:
        """Return when somebody got the model of each iteration first, monotonic seconds."""
        with self._lock:
            seen: dict[int, float] = {}
            for entry in self.received:
                seen[entry.iteration] = min(entry.at, seen.get(entry.iteration, entry.at))
            return seen

    def copy(self) -> Journal:
        """Return what is in it by now, for a judgement while the run goes on."""
        other = Journal()
        with self._lock:
            other.__dict__ |= {
                name: copy.copy(value) for name, value in self.__dict__.items() if name != "_lock"
            }
        return other


@dataclass(frozen=True)
class Outcome:
    """How an iteration ended, as its servers or Redis told it."""

    valid: bool
    reason: str


Outcomes = Mapping[int, Outcome]


# ---- the judgement


@dataclass(frozen=True)
class Report:
    """What a run that is right came to.

    Attributes:
        members: of each valid iteration whose model somebody got.
        failed: iteration -> its reason.
        missing: (iteration, client) of the acknowledged updates that are in no model, of valid iterations only.
        acknowledged: how many updates were acknowledged.
        models: how many answers with a model were compared.
    """

    members: dict[int, frozenset[int]]
    failed: dict[int, str]
    missing: frozenset[tuple[int, int]]
    acknowledged: int
    models: int


@dataclass(frozen=True)
class _Iteration:
    """What is known of one iteration: the clients that sent an update and those that were promised, and its end."""

    number: int
    sent: set[int]
    promised: set[int]
    outcome: Outcome | None


@dataclass
class _Findings:
    """What comes together while a run is judged."""

    faults: list[str] = field(default_factory=list)
    members: dict[int, frozenset[int]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    missing: set[tuple[int, int]] = field(default_factory=set)


def judge(
    journal: Journal,
    outcomes: Outcomes,
    *,
    lost: int = 0,
    may_fail: Callable[[str], bool] = lambda reason: False,
    quorum: int | None = None,
    after: int = 0,
) -> Report:
    """Judge a run that is over.

    Args:
        journal: what its clients saw.
        outcomes: of the iterations that ended; none needs to be there whose model tells it.
        lost: how many accepted updates of valid iterations the servers reported as lost.
        may_fail: whether an iteration may fail for this reason.
        quorum: how many updates every model must hold, None for any number.
        after: the iterations up to this one are not judged; others had clients in them.

    Raises:
        AssertionError: with every fault found.
    """
    found = _Findings()
    digests = _inherited(_digests(journal, found), outcomes)
    sent = _by_iteration(journal.sent)
    promised = _by_iteration((entry.iteration, entry.client) for entry in journal.acknowledged)
    for iteration in range(after + 1, max([0, *digests, *outcomes, *promised]) + 1):
        seen = _Iteration(iteration, sent[iteration], promised[iteration], outcomes.get(iteration))
        _judge_iteration(seen, journal.models, digests, may_fail, quorum, found)
    if len(found.missing) > lost:
        found.faults.append(
            f"{len(found.missing)} acknowledged updates are in no model, {lost} are reported as lost: "
            f"(iteration, client) {sorted(found.missing)}"
        )
    found.faults += steps_back(journal.answered)
    if found.faults:
        raise AssertionError("\n".join(found.faults))
    return Report(
        found.members,
        found.failed,
        frozenset(found.missing),
        len(journal.acknowledged),
        len(journal.received),
    )


def _digests(journal: Journal, found: _Findings) -> dict[int, str]:
    """Return the one digest of each iteration's model; two of them are a fault."""
    seen: defaultdict[int, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for entry in journal.received:
        if entry.serving == entry.iteration + 1:
            seen[entry.iteration][entry.digest].add(entry.server)
    for iteration, digests in sorted(seen.items()):
        if len(digests) > 1:
            told = {digest: sorted(servers) for digest, servers in digests.items()}
            found.faults.append(f"iteration {iteration} has several models, digest -> servers: {told}")
    sole = {iteration: next(iter(digests)) for iteration, digests in seen.items()}
    found.faults += [
        f"server {entry.server} answered for iteration {entry.iteration} while it served {entry.serving}"
        for entry in journal.received
        if entry.serving <= entry.iteration
    ]
    for entry in journal.received:  # who asks late may get the newest model instead of the one asked for
        known = {sole.get(entry.iteration), sole.get(entry.serving - 1)} - {None}
        if len(known) == 2 and entry.digest not in known:
            found.faults.append(f"server {entry.server} gave {entry.digest} for iteration {entry.iteration}")
    return sole


def _inherited(digests: Mapping[int, str], outcomes: Outcomes) -> dict[int, str]:
    """Return the digests with those that only a failed iteration after theirs has shown.

    A failed iteration leaves the model as it was; an operator who disables the job right after a publication
    keeps everybody from that model until the iteration after the failed one.
    """
    known = dict(digests)
    for iteration in sorted(outcomes, reverse=True):
        if not outcomes[iteration].valid and iteration in known:
            known.setdefault(iteration - 1, known[iteration])
    return known


def _by_iteration(updates: Iterable[tuple[int, int]]) -> defaultdict[int, set[int]]:
    """Return iteration -> clients of (iteration, client)."""
    groups: defaultdict[int, set[int]] = defaultdict(set)
    for iteration, client in updates:
        groups[iteration].add(client)
    return groups


def _judge_iteration(
    seen: _Iteration,
    models: Mapping[str, Weights],
    digests: Mapping[int, str],
    may_fail: Callable[[str], bool],
    quorum: int | None,
    found: _Findings,
) -> None:
    iteration, outcome = seen.number, seen.outcome
    digest = digests.get(iteration)
    if outcome is not None and not outcome.valid:
        found.failed[iteration] = outcome.reason
        if not outcome.reason or not may_fail(outcome.reason):
            found.faults.append(f"iteration {iteration} failed: {outcome.reason or 'without a reason'}")
        if digest is not None and digest != digests.get(iteration - 1, digest):
            found.faults.append(f"iteration {iteration} failed and yet has another model than the one before")
        return
    if digest is None:
        if seen.promised and outcome is not None:
            found.faults.append(f"nobody ever saw the model of iteration {iteration}")
        return
    weights = models[digest]
    members = members_of(weights)
    unsent = sorted(members - seen.sent)
    fault = _wrong(weights, members, iteration) or (f"updates of {unsent} that nobody sent" if unsent else "")
    if quorum is not None and len(members) != quorum:
        found.faults.append(f"iteration {iteration} was made of {len(members)} updates instead of {quorum}")
    if fault:
        found.faults.append(f"the model of iteration {iteration} ({outcome or 'outcome unknown'}): {fault}")
        return
    found.members[iteration] = members
    found.missing |= {(iteration, client) for client in seen.promised - members}


def _wrong(weights: Weights, members: frozenset[int], iteration: int) -> str:
    """Return what is wrong with a model, "" if it is the exact mean of its members' updates."""
    if not members:
        return "no update is in it"
    right = mean_of(members, iteration)
    if all(np.array_equal(weights[name], values) for name, values in right.items()):
        return ""
    for client in sorted(members):
        twice = mean_of([*members, client], iteration)
        if all(np.array_equal(weights[name], values) for name, values in twice.items()):
            return f"client {client} is counted twice"
    return f"it is not the mean of the updates of {sorted(members)}: {dict(weights)}"


def steps_back(answered: Sequence[Answered]) -> list[str]:
    """Return each answer that named an earlier iteration than one known before its question was asked."""
    faults = []
    for (server, life), entries in _grouped(answered, lambda entry: (entry.server, entry.life)).items():
        for entry, highest in _behind(entries):
            faults.append(
                f"server {server} (process {life}) went back to iteration {entry.serving} after {highest}"
            )
    for entry, highest in _behind([entry for entry in answered if entry.placed]):
        faults.append(f"server {entry.server} gave a place in iteration {entry.serving} after {highest}")
    return faults


def _grouped(
    answered: Iterable[Answered], key: Callable[[Answered], tuple[int, int]]
) -> dict[tuple[int, int], list[Answered]]:
    groups: defaultdict[tuple[int, int], list[Answered]] = defaultdict(list)
    for entry in answered:
        groups[key(entry)].append(entry)
    return groups


def _behind(entries: Sequence[Answered]) -> list[tuple[Answered, int]]:
    """Return the entries that name a lower iteration than an answer that came before they were asked."""
    arrived = sorted(entries, key=lambda entry: entry.at)
    behind, highest, next_ = [], 0, 0
    for entry in sorted(entries, key=lambda entry: entry.asked):
        while next_ < len(arrived) and arrived[next_].at < entry.asked:
            highest = max(highest, arrived[next_].serving)
            next_ += 1
        if entry.serving < highest:
            behind.append((entry, highest))
    return behind


def longest_gap(moments: Iterable[float], since: float, until: float) -> float:
    """Return the longest time between two neighbouring moments of a span, its ends counted as moments; seconds."""
    inside = [since, *sorted(moment for moment in moments if since < moment < until), until]
    return max(after - before for before, after in pairwise(inside))
