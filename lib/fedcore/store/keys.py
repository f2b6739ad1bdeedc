"""Every Redis key: its name, type, lifetime and writer.

    key                                             type    lifetime   content, writer
    ms_fl:{fl}:InstanceName:String                  string  job        instance name; first server, scheduler,
                                                                       raise_status after a loss of data
    P status:Hash                                   hash    job        state of job and iteration; scripts
    P hyperParams:String                            string  job        JSON of the hyper-parameters; first server
    P server:Hash                                   hash    job        node id -> ip:port; each server
    P server:heartbeat:{node}:String                string  10 s       ip:port; each server, every second
    P worker:Hash, P worker:heartbeat:{id}:String   as server           each worker
    ms_fl:{fl}:ModelInfo:String                     string  job        names and sizes of the weights; first server
    P waiting:ZSet                                  zset    as needed  refused client, of startFLJob or updateModel,
                                                                       -> when it is told to return (ms)
    P ledgers:Hash                                  hash    job        ledger id -> node id of its owner, or "revoked"
    P evaluation:Hash                               hash    evaluation client -> its newest evaluation vector, float32
    P evaluated:ZSet                                zset    evaluation client -> when that was kept (microseconds)
    P revoked:Hash                                  hash    job        ledger that was given up -> in which iteration
    I clients:Hash                                  hash    iteration  client -> "data_size,eval_data_size,start_ms",
                                                                       and where devices must sign ",key"
    I uploads:Hash                                  hash    iteration  client -> id of the ledger that holds its update
    I rounds:Hash                                   hash    iteration  cipher round -> requests counted; "{round}:ms" ->
                                                                       when the first was, by Redis' clock;
                                                                       "list:run" -> run id of the Redis that first told
                                                                       whose updates count
    I {cipher round}:Hash                           hash    iteration  client -> what it has brought to the round: keys,
                                                                       signature, report; or "1"
    I shares:{client}:String                        string  iteration  sealed shares of others' secrets for this client
    I masked:Hash                                   hash    iteration  client -> digest of the masked update it has sent
    P {run}:awaited:Hash                            hash    1 h        node id -> since when (ms) it may bring back what
                                                                       the Redis of this run id has lost, or "back"
    P listed:String                                 string  job        since when (ms) servers have been on the list
    ms_fl:{fl}:signatures:{client}:String           string  see below  signatures that a client has used, where devices
                                                                       must sign; use_signature.lua
    ms_fl:{fl}:changes                              channel -          a word when others should look; scripts

with P = ms_fl:{fl}:{instance}: and I = P{iteration}:. The names down to worker:Hash, and ModelInfo, are those that
the workers and schedulers of MindSpore Federated 0.1 read; the others are fedcore's own. A client is named by its key
(core/client_key.py), which a ledger knows too: so what Redis forgets can be brought back from the ledgers. Used
signatures live until the time stamps under them are too old to be taken.

Fields of status:Hash. Theirs: iterationNum, lastIterationSuccess ("0"/"1"), lastIterationResult, runningState. Ours:
attempt, phase, token (of the finaliser, see claim_reduction.lua), fence (number of the last token), digest (of the
candidate model, or of what a worker has trained), updates (in it), aggregate (digest of what a worker is to train
further, or devices help to take masks off), loss and accuracy (as the worker tells them), base (digest of the model
that devices train from), lost (updates of this iteration that were counted and then lost), disabled ("1" once a
disabled job's iteration was ended), epoch (how many instances the job had before), run (run id of the Redis that has
had all of this iteration since its first place; "" or none if it may have lost some), startedMs, firstUploadMs,
sealedMs and filledMs (of this iteration, by Redis' clock; the last: when its last place was taken), and typicalMs (how
long the last valid iteration took from its filledMs to its end). A status that was written by the original lacks ours,
and runningState may be missing: it then counts as running, collecting, in its first attempt.
"""

from __future__ import annotations

from dataclasses import dataclass

HEARTBEAT_TTL_S = 10
DOUBT_S = 10.0  # how long after a loss of data others may still bring back what they hold
HOLD_OFF_S = 1.5  # for so long nobody is served meanwhile; they need less, unless they stand still
AWAITED_TTL_S = 3_600
ANYBODY = (
    ""  # stands for servers that one has never seen on the list, as it has not watched it for long enough
)
FOUNDERS = "?"  # stands for servers of an older instance that a Redis without data does not name; updates wait for them
REVOKED = "revoked"  # owner of a ledger whose updates were given up
RELEASE_TTL_S = 60  # an ended iteration's clients and uploads still answer late repeats for this long
SIGNATURES_KEPT = (
    512  # of one client, the newest: 23 KB, far more than it sends while its time stamps are taken
)
_WEEK_S = 604_800
_DAY_S = 86_400
_ITERATION_SLACK_S = 1_800


def instance_name(fl_name: str) -> str:
    """Key of the name of the job's current instance."""
    return f"ms_fl:{fl_name}:InstanceName:String"


def model_info(fl_name: str) -> str:
    """Key of the names and sizes of the job's weights."""
    return f"ms_fl:{fl_name}:ModelInfo:String"


def signatures(fl_name: str, client: str) -> str:
    """Key of the signatures that a client has used lately; they outlive instances, as time stamps do."""
    return f"ms_fl:{fl_name}:signatures:{client}:String"


def changes(fl_name: str) -> str:
    """Channel that tells of every change of the job's status."""
    return f"ms_fl:{fl_name}:changes"


def job_ttl(global_window_ms: int) -> int:
    """Seconds that the keys of a job outlive their last renewal."""
    return global_window_ms // 1000 + _WEEK_S


def iteration_ttl(global_window_ms: int) -> int:
    """Seconds that the keys of an iteration outlive their first write."""
    return global_window_ms // 1000 + _ITERATION_SLACK_S


def evaluation_ttl(global_window_ms: int) -> int:
    """Seconds that the evaluation vectors outlive the last one that was kept."""
    return global_window_ms // 1000 + _DAY_S


@dataclass(frozen=True, slots=True)
class InstanceKeys:
    """The keys of one instance of a job."""

    fl_name: str
    instance: str

    @property
    def prefix(self) -> str:
        """Start of every key of the instance."""
        return f"ms_fl:{self.fl_name}:{self.instance}:"

    @property
    def status(self) -> str:
        """State of job and iteration."""
        return f"{self.prefix}status:Hash"

    @property
    def hyper_params(self) -> str:
        """The hyper-parameters that all servers share."""
        return f"{self.prefix}hyperParams:String"

    @property
    def waiting(self) -> str:
        """Places reserved for refused clients."""
        return f"{self.prefix}waiting:ZSet"

    @property
    def ledgers(self) -> str:
        """Owners of the ledgers."""
        return f"{self.prefix}ledgers:Hash"

    @property
    def evaluation(self) -> str:
        """The clients' evaluation vectors."""
        return f"{self.prefix}evaluation:Hash"

    @property
    def evaluated(self) -> str:
        """When each of these was kept."""
        return f"{self.prefix}evaluated:ZSet"

    @property
    def revoked(self) -> str:
        """Ledgers that were given up, with all their updates."""
        return f"{self.prefix}revoked:Hash"

    def awaited(self, run_id: str) -> str:
        """Servers that may bring back what the Redis with this run id has forgotten."""
        return f"{self.prefix}{run_id}:awaited:Hash"

    @property
    def listed(self) -> str:
        """Since when servers have been on the list of the living: it goes with them when Redis is emptied."""
        return f"{self.prefix}listed:String"

    def nodes(self, role: str) -> str:
        """Nodes of a role (``server`` or ``worker``)."""
        return f"{self.prefix}{role}:Hash"

    def heartbeat(self, role: str, node_id: str) -> str:
        """Life sign of a node."""
        return f"{self.prefix}{role}:heartbeat:{node_id}:String"

    def clients(self, iteration: int) -> str:
        """Clients that hold a place in an iteration."""
        return f"{self.prefix}{iteration}:clients:Hash"

    def rounds(self, iteration: int) -> str:
        """How far the cipher rounds of an iteration have come."""
        return f"{self.prefix}{iteration}:rounds:Hash"

    def cipher_round(self, iteration: int, round_name: str) -> str:
        """What clients have brought to one cipher round of an iteration."""
        return f"{self.prefix}{iteration}:{round_name}:Hash"

    def shares(self, iteration: int, client: str) -> str:
        """Shares of others' secrets that are for one client."""
        return f"{self.prefix}{iteration}:shares:{client}:String"

    def masked(self, iteration: int) -> str:
        """Digests of the masked updates that were counted."""
        return f"{self.prefix}{iteration}:masked:Hash"

    def uploads(self, iteration: int) -> str:
        """Accepted updates of an iteration."""
        return f"{self.prefix}{iteration}:uploads:Hash"
