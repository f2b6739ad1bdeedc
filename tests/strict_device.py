"""The original device client, modelled without mercy.

``StrictDevice`` behaves as the unmodified Java client of MindSpore Federated 0.1 does: same requests, same patience,
and every answer that ends its job, or the thread of its job, raises ``Fatal``. A server under test passes if the
devices that train with it never raise. Nothing is shared with fedclient; only the codec is common ground. What it does
to its weights before they leave it is in ``strict_cipher``.

Its loop, with ``tries`` and ``last`` as the original keeps them::

    tries > 1                        -> Fatal(TRIES)
    startFLJob  RESTART              -> tries + 1, wait, callback 300
                SUCCESS              -> tries = 1, or tries + 1 if the iteration is that of the last success
    evaluate, PW_ENCRYPT: exchangeKeys, getKeys, shareSecrets, getSecrets
    train, updateModel, PW_ENCRYPT: getClientList, [pushListSign, getListSign,] reconstructSecrets
    getModel    RESTART              -> wait, callback 300
                all SUCCESS          -> callback 200, tries = 0
    again while iteration < iterations, after a RESTART too

So two refusals in a row end it, a refusal in the last iteration ends it quietly (result RESTART), and no I/O
error is ever retried, except that a kept connection found closed is opened again once.
"""

from __future__ import annotations

import gzip
import http.client
import io
import random
import re
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import strict_cipher
from strict_cipher import Broken, KeyStore, Pairwise

from fedcore.errors import MalformedRequest
from fedcore.wire.codec import decode, encode
from fedcore.wire.messages import (
    CipherPublicParams,
    CompressFeatureMap,
    FeatureMap,
    FLPlan,
    PWParams,
    ReconstructSecret,
    RequestFLJob,
    RequestGetModel,
    RequestUpdateModel,
    ResponseClientListSign,
    ResponseExchangeKeys,
    ResponseFLJob,
    ResponseGetModel,
    ResponseShareSecrets,
    ResponseUpdateModel,
    ReturnAllClientListSign,
    ReturnClientList,
    ReturnExchangeKeys,
    ReturnShareSecrets,
)

NOT_READY = ("The cluster is in safemode.", "The server's training job is not ready.")
OVER = "The server's training job is disabled or finished."
SLEEP_TIME = 10.0  # seconds between polls, and after a "not ready" text
SIGNING_PAUSE = 5.0  # seconds before the keys are made, where devices sign
FIRST_CLIP = 0.05  # of DP_ENCRYPT, until the first iteration's model is known
MAX_WAIT_MS = 1_800_000  # longest single wait for a next_req_time
MAX_REPEATS = 18  # of a getModel that answers 201
CONNECT_TIMEOUT = 30.0  # seconds; also for writing
READ_TIMEOUT = 90.0  # seconds
MODES = ("FEDERATED_LEARNING", "HYBRID_TRAINING")
CIPHERS = ("PW_ENCRYPT", "DP_ENCRYPT", "SIGNDS")
COMPRESS_TYPES = np.array([0, 2], np.int8)

R = TypeVar("R")
Array = npt.NDArray[np.float32]
Train = Callable[[dict[str, Array], FLPlan], tuple[Mapping[str, Array], float]]


class Step(NamedTuple):
    """A cipher round: how its request is made of a time stamp, and what takes its answer with 200 and the time."""

    round: str
    request: Callable[[str], Any]
    reply: type[Any]
    take: Callable[[Any, int], None] | None = None
    polls: bool = False


class Why(Enum):
    """What ended the device."""

    TRIES = "refused twice in a row"
    STOPPED = "stopFLJob was called"
    NO_DATA = "no training data"
    IO = "I/O error or time-out"
    HTTP_STATUS = "HTTP status is not 2xx"
    JOB_OVER = "the server says that the job is disabled or finished"
    TEXT_WITH_COLON = "a text body has a colon and no iteration number behind it"
    NOT_A_TABLE = "the body is no FlatBuffer of this round"
    NO_PLAN = "ResponseFLJob without fl_plan_config"
    CODE_201 = "retcode 201 outside the polling rounds"
    CODE = "retcode 400, 500 or unknown"
    NEXT_REQ_TIME = "the next request time is missing, no number or not in the future"
    PATIENCE = "201 came once too often"
    PLAN = "the plan cannot be followed"
    CIPHER = "the cipher block is missing or unknown"
    SECRETS = "a cipher round's answer cannot be used"
    NO_WEIGHTS = "no weights, or packed in another way than announced"
    UNKNOWN_WEIGHT = "a weight is not in the model, or has another size"
    LOSS = "loss or accuracy is not a number"


class Fatal(Exception):
    """The device has ended; ``why`` says at which of its fatal reactions."""

    def __init__(self, why: Why, detail: object = "") -> None:
        super().__init__(f"{why.value}: {detail}" if detail else why.value)
        self.why = why


class NotModelled(Exception):
    """The server asks for something that the original can do and this model cannot."""


class Status(Enum):
    """What one round means, and what ``run`` returns."""

    SUCCESS = 200
    WAIT = 201
    RESTART = 300


@dataclass(frozen=True)
class Exchange:
    """One request and its reply."""

    round: str
    request: bytes = field(repr=False)
    status: int
    reply: bytes = field(repr=False)
    at: int  # ms since the epoch, when sent
    seconds: float


class Http(Protocol):
    """What carries the requests; raises OSError."""

    def post(self, round_: str, body: bytes) -> tuple[int, bytes]: ...


class OkHttp:
    """One kept connection with the headers, time-outs and the one silent repeat of OkHttp 3.

    Args:
        url: ``domainName``, taken verbatim as the prefix of the paths.
        elb_servers: with ``useElb``: number of consecutive ports, one of which is drawn for every request.
        connect_timeout: seconds, also for writing.
        read_timeout: seconds.
        tls: None: certificates are not checked, as in the original's x86 mode.
        seed: of the draws.
    """

    def __init__(
        self,
        url: str,
        *,
        elb_servers: int = 0,
        connect_timeout: float = CONNECT_TIMEOUT,
        read_timeout: float = READ_TIMEOUT,
        tls: ssl.SSLContext | None = None,
        seed: int = 0,
    ) -> None:
        if not url.startswith(("http:", "https:")):
            raise ValueError(f"domainName {url!r} must start with http: or https:")
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        self.path = parts.path
        self.tls = (tls or _unchecked_tls()) if parts.scheme == "https" else None
        self.elb_servers = elb_servers
        self.connect_timeout, self.read_timeout = connect_timeout, read_timeout
        self.repeats = 0  # silent ones, after a kept connection was found closed
        self._kept: dict[int, http.client.HTTPConnection] = {}
        self._random = random.Random(seed)

    def post(self, round_: str, body: bytes) -> tuple[int, bytes]:
        port = self.port + (self._random.randrange(100_000) % self.elb_servers if self.elb_servers else 0)
        try:
            response = self._ask(port, round_, body)
            content = response.read()
            packed = response.headers.get("Content-Encoding", "").lower() == "gzip"
            return response.status, gzip.decompress(content) if packed else content
        except (OSError, EOFError, zlib.error, http.client.HTTPException) as error:
            self._drop(port)
            raise OSError(repr(error)) from error

    def _ask(self, port: int, round_: str, body: bytes) -> http.client.HTTPResponse:
        """Send a request and read its reply's head; once more if a kept connection was closed meanwhile."""
        kept = self._kept.get(port)
        if kept is not None and kept.sock is not None:
            try:
                return self._write(kept, round_, body)
            except ConnectionError:
                kept.close()
                self.repeats += 1
        self._kept[port] = self._connect(port)
        return self._write(self._kept[port], round_, body)

    def _connect(self, port: int) -> http.client.HTTPConnection:
        if self.tls is None:
            return http.client.HTTPConnection(self.host, port, timeout=self.connect_timeout)
        return http.client.HTTPSConnection(self.host, port, timeout=self.connect_timeout, context=self.tls)

    def _write(
        self, connection: http.client.HTTPConnection, round_: str, body: bytes
    ) -> http.client.HTTPResponse:
        connection.putrequest("POST", f"{self.path}/{round_}", skip_host=True, skip_accept_encoding=True)
        for name, value in (
            ("Content-Type", "applicatiom/json;charset=utf-8"),  # misspelt by the original
            ("Content-Length", str(len(body))),
            ("Host", f"{self.host}:{connection.port}"),
            ("Connection", "Keep-Alive"),
            ("Accept-Encoding", "gzip"),
            ("User-Agent", "okhttp/3.14.9"),
        ):
            connection.putheader(name, value)
        if connection.sock is not None:
            connection.sock.settimeout(self.connect_timeout)
        connection.endheaders(io.BytesIO(body))  # in blocks: the time-out is that of one write
        if connection.sock is not None:
            connection.sock.settimeout(self.read_timeout)
        return connection.getresponse()

    def _drop(self, port: int) -> None:
        kept = self._kept.pop(port, None)
        if kept is not None:
            kept.close()

    def close(self) -> None:
        """Close the kept connections."""
        for port in list(self._kept):
            self._drop(port)


class StrictDevice:
    """One original device in one job.

    Args:
        server_url: ``domainName``.
        train: (name -> float32[n] copies, the plan) -> (trained weights of all these names, last loss).
        data_size: training samples.
        fl_id: clientID.
        fl_name: name of the job.
        evaluate: accuracy of the global weights; None: no evaluation data.
        eval_data_size: evaluation samples.
        model: name -> number of elements of the device's own model; None: whatever the first answer holds.
        sleep: waits so many seconds; None: until ``stop`` at most.
        time_scale: factor on the fixed sleeps of 10 s.
        wait_scale: factor on the waits for a next_req_time, which is judged unscaled on arrival.
        http: replaces the HTTP client; else it is made of ``server_url`` and these options:
        connect_timeout: seconds, also for writing.
        read_timeout: seconds.
        elb_servers: see OkHttp.
        keystore: key and four certificates, for ``pkiVerify``; ``fl_id`` is then that of the second certificate.

    Attributes:
        exchanges: everything sent and received.
        callbacks: (iteration, 200 or 300) of iterationFinished.
        waits: (milliseconds until next_req_time, on arrival), before the cut to 30 minutes.
        weights: the newest global weights.
        plans: the plans of the startFLJob answers with 200.
        clip: bound of the update's norm, for DP_ENCRYPT.
    """

    def __init__(
        self,
        server_url: str,
        train: Train,
        data_size: int,
        fl_id: str = "strict-device",
        fl_name: str = "strict.Device",
        *,
        evaluate: Callable[[dict[str, Array]], float] | None = None,
        eval_data_size: int = 0,
        model: Mapping[str, int] | None = None,
        sleep: Callable[[float], Any] | None = None,
        clock: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        time_scale: float = 1.0,
        wait_scale: float = 1.0,
        http: Http | None = None,
        connect_timeout: float = CONNECT_TIMEOUT,
        read_timeout: float = READ_TIMEOUT,
        elb_servers: int = 0,
        keystore: KeyStore | None = None,
    ) -> None:
        self.http = http or OkHttp(
            server_url,
            elb_servers=elb_servers,
            connect_timeout=connect_timeout,
            read_timeout=read_timeout,
        )
        self.train, self.evaluate = train, evaluate
        self.data_size, self.eval_data_size = data_size, eval_data_size
        self.fl_id, self.fl_name = fl_id if keystore is None else keystore.fl_id(), fl_name
        self.keystore = keystore
        self.model = dict(model) if model is not None else None
        self.clock = clock
        self.time_scale, self.wait_scale = time_scale, wait_scale
        self.iteration = 0
        self.iterations = 1
        self.weights: dict[str, Array] = {}
        self.exchanges: list[Exchange] = []
        self.callbacks: list[tuple[int, int]] = []
        self.waits: list[int] = []
        self.plans: list[FLPlan] = []
        self.clip = FIRST_CLIP
        self._chance = random.SystemRandom()
        self._learning_rate = 0.1
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait

    def stop(self) -> None:
        """stopFLJob: ends the device at the next place where the original looks."""
        self._stopped.set()

    def run(self) -> Status:
        """Take part until the job ends.

        Returns:
            SUCCESS, or RESTART if a refusal in the last iteration ended the job.

        Raises:
            Fatal: the device has ended otherwise.
        """
        try:
            return self._loop()
        finally:
            if isinstance(self.http, OkHttp):
                self.http.close()

    def _loop(self) -> Status:
        tries, last = 0, -1
        while True:
            if tries > 1:
                raise Fatal(Why.TRIES, f"iteration {self.iteration}")
            self._check_stop()
            if self.data_size <= 0:
                raise Fatal(Why.NO_DATA)
            status, reply = self._start_job()
            if status is Status.RESTART:
                tries += 1
            else:
                tries = tries + 1 if last == self.iteration else 1
                last = self.iteration
                status = self._take_part(reply)
                if status is Status.SUCCESS:
                    tries = 0
            self.callbacks.append((self.iteration, status.value))
            if self.iteration >= self.iterations:
                return status

    # ---- rounds

    def _start_job(self) -> tuple[Status, ResponseFLJob | None]:
        timestamp = str(self.clock())
        request = RequestFLJob(
            fl_name=self.fl_name,
            fl_id=self.fl_id,
            iteration=self.iteration,
            data_size=self.data_size,
            timestamp=timestamp,
            download_compress_types=COMPRESS_TYPES,
            eval_data_size=self.eval_data_size,
        )
        if self.keystore is not None:
            signature = self.keystore.sign(f"{self.fl_id} {timestamp}")
            names = ("key_attestation", "equip_cert", "equip_ca_cert", "root_cert")
            shown = dict(zip(names, self.keystore.chain, strict=True))
            request = replace(request, sign_data=signature, **shown)
        reply = self._ask("startFLJob", request, ResponseFLJob)
        if reply is None:
            return self._restart(str(self.clock() + round(SLEEP_TIME * 1000)), self.time_scale), None
        if reply.fl_plan_config is None:
            raise Fatal(Why.NO_PLAN, f"retcode {reply.retcode}")
        status = _status(reply.retcode, reply.reason)
        self.iteration, self.iterations = reply.iteration, reply.fl_plan_config.iterations
        if status is Status.RESTART:
            self._restart(reply.next_req_time)
        return status, reply

    def _take_part(self, reply: ResponseFLJob | None) -> Status:
        assert reply is not None and reply.fl_plan_config is not None
        plan = self._checked(reply.fl_plan_config)
        assert plan.cipher is not None
        names = self._take_weights(reply)
        base = _copy(self.weights)
        accuracy = self.evaluate(_copy(base)) if self.evaluate else 0.0
        if np.isnan(accuracy):
            raise Fatal(Why.LOSS, f"accuracy {accuracy}")
        pairwise, mask = None, None
        if plan.cipher.encrypt_type == "PW_ENCRYPT":
            pairwise = self._pairwise(plan.cipher.pw_params, reply)
            if self.keystore is not None:
                self._sleep(SIGNING_PAUSE * self.time_scale)
            if self._cipher_rounds(_before_training(pairwise)) is Status.RESTART:
                return Status.RESTART
            mask = self._unbroken(pairwise.mask, sum(base[name].size for name in names))
        self.plans.append(plan)
        trained, loss = self.train(_copy(base), plan)
        if not np.isfinite(loss):
            raise Fatal(Why.LOSS, f"loss {loss}")
        layers = {name: trained[name].astype(np.float32).reshape(-1) for name in names}
        hidden = self._hidden(layers, base, plan.cipher, mask, reply)
        if self._upload(hidden, loss, accuracy) is Status.RESTART:
            return Status.RESTART
        if pairwise and self._cipher_rounds(_after_upload(pairwise)) is Status.RESTART:
            return Status.RESTART
        status = self._get_model()
        if status is Status.SUCCESS and plan.cipher.encrypt_type == "DP_ENCRYPT":
            self._renew_clip(names, base, plan.cipher)
        return status

    def _pairwise(self, params: PWParams | None, reply: ResponseFLJob) -> Pairwise:
        assert params is not None
        if reply.upload_compress_type != 0:
            raise NotModelled("compressed uploads with PW_ENCRYPT")
        return Pairwise(self.fl_id, self.iteration, params, self.keystore)

    def _cipher_rounds(self, steps: Sequence[Step]) -> Status:
        for step in steps:
            self._check_stop()
            if self._cipher_round(step) is Status.RESTART:
                return Status.RESTART
        return Status.SUCCESS

    def _cipher_round(self, step: Step) -> Status:
        for _ in range(1 + MAX_REPEATS if step.polls else 1):
            request = self._unbroken(step.request, str(self.clock()))
            reply = self._ask(step.round, request, step.reply)
            if reply is None:
                return self._restart(str(self.clock() + round(SLEEP_TIME * 1000)), self.time_scale)
            status = _status(reply.retcode, getattr(reply, "reason", step.round), polling=step.polls)
            if status is Status.RESTART:
                return self._restart(reply.next_req_time)
            if status is Status.SUCCESS:
                if step.take is not None:
                    self._unbroken(step.take, reply, self.clock())
                return status
            self._sleep(SLEEP_TIME * self.time_scale)
            self._check_stop()
        raise Fatal(Why.PATIENCE, f"{step.round} of iteration {self.iteration}")

    @staticmethod
    def _unbroken(work: Callable[..., R], *arguments: Any) -> R:
        try:
            return work(*arguments)
        except Broken as error:
            raise Fatal(Why.SECRETS, error) from error

    def _hidden(
        self,
        layers: Mapping[str, Array],
        base: Mapping[str, Array],
        cipher: CipherPublicParams,
        mask: Array | None,
        reply: ResponseFLJob,
    ) -> dict[str, Any]:
        """Return the fields of an updateModel that hold the weights."""
        if cipher.encrypt_type == "SIGNDS":
            return self._signed_positions(layers, base, cipher)
        if mask is not None:
            values = strict_cipher.masked(layers, self.data_size, mask)
        elif cipher.encrypt_type == "DP_ENCRYPT":
            assert cipher.dp_params is not None
            epsilon, delta = (
                float(np.float32(one)) for one in (cipher.dp_params.dp_eps, cipher.dp_params.dp_delta)
            )
            deviation = strict_cipher.sigma(epsilon, delta, self.clip)
            values = strict_cipher.noisy(layers, base, self.data_size, self.clip, deviation, self._normal)
        else:
            values = {name: one * np.float32(self.data_size) for name, one in layers.items()}
        if reply.upload_compress_type == 0:
            return {"feature_map": tuple(FeatureMap(*item) for item in values.items())}
        if reply.upload_compress_type != 1:
            raise NotModelled(f"upload_compress_type {reply.upload_compress_type}")
        count, rate = sum(one.size for one in values.values()), reply.upload_sparse_rate
        chosen = strict_cipher.sparse_mask(self.iteration, count, rate)
        return {
            "compress_feature_map": strict_cipher.packed_update(values, base, self.data_size, chosen),
            "upload_compress_type": 1,
            "upload_sparse_rate": rate,
            "name_vec": tuple(values),
        }

    def _signed_positions(
        self, layers: Mapping[str, Array], base: Mapping[str, Array], cipher: CipherPublicParams
    ) -> dict[str, Any]:
        assert cipher.ds_params is not None
        difference = np.concatenate([values - base[name] for name, values in layers.items()])
        sign, draws = self._chance.choice((-1, 1)), (self._chance.random, self._chance.randrange)
        told = self._unbroken(strict_cipher.positions, difference, sign, cipher.ds_params, *draws)
        empty = tuple(FeatureMap(name, np.zeros(0, np.float32)) for name in layers)
        return {"feature_map": empty, "sign": sign, "index_array": told}

    def _normal(self, count: int) -> list[float]:
        return [self._chance.gauss() for _ in range(count)]

    def _renew_clip(
        self, names: Sequence[str], base: Mapping[str, Array], cipher: CipherPublicParams
    ) -> None:
        """After the first iteration take what the global model has moved, times a factor; later only less."""
        assert cipher.dp_params is not None
        moved = strict_cipher.norm_of_step({name: base[name] for name in names}, self.weights)
        clip = float(np.float32(cipher.dp_params.dp_norm_clip) * np.float32(moved))
        if self.iteration == 1 or clip < self.clip:
            self.clip = clip

    def _upload(self, weights: Mapping[str, Any], loss: float, accuracy: float) -> Status:
        """Return RESTART, or SUCCESS if the upload counts."""
        timestamp = str(self.clock())
        request = RequestUpdateModel(
            fl_name=self.fl_name,
            fl_id=self.fl_id,
            timestamp=timestamp,
            signature=self.keystore.sign(f"{timestamp}{self.iteration}") if self.keystore else None,
            iteration=self.iteration,
            upload_loss=loss,
            upload_accuracy=accuracy,
            **weights,
        )
        reply = self._ask("updateModel", request, ResponseUpdateModel)
        if reply is None:
            return self._restart(str(self.clock() + round(SLEEP_TIME * 1000)), self.time_scale)
        if _status(reply.retcode, reply.reason) is Status.RESTART:
            return self._restart(reply.next_req_time)
        return Status.SUCCESS

    def _get_model(self) -> Status:
        for _ in range(1 + MAX_REPEATS):
            request = RequestGetModel(self.fl_name, self.iteration, str(self.clock()), COMPRESS_TYPES)
            reply = self._ask("getModel", request, ResponseGetModel)
            status = Status.WAIT if reply is None else _status(reply.retcode, reply.reason, polling=True)
            if reply is not None and status is Status.RESTART:
                return self._restart(reply.timestamp)
            if reply is not None and status is Status.SUCCESS:
                self._take_weights(reply)
                return status
            self._sleep(SLEEP_TIME * self.time_scale)
            self._check_stop()
        raise Fatal(Why.PATIENCE, f"iteration {self.iteration}")

    # ---- what every round shares

    def _ask(self, round_: str, request: Any, reply_type: type[R]) -> R | None:
        """Return the reply's table, None for a "not ready" text."""
        body = encode(request)
        at, began = self.clock(), time.perf_counter()
        try:
            status, reply = self.http.post(round_, body)
        except OSError as error:
            raise Fatal(Why.IO, f"{round_}: {type(error).__name__}: {error}") from error
        self.exchanges.append(Exchange(round_, body, status, reply, at, time.perf_counter() - began))
        if not 200 <= status < 300:
            raise Fatal(Why.HTTP_STATUS, f"{round_}: {status}")
        if self._is_text(reply):
            return None
        try:
            return decode(reply_type, reply)
        except MalformedRequest as error:
            raise Fatal(Why.NOT_A_TABLE, f"{round_}: {error}: {reply[:80]!r}") from error

    def _is_text(self, body: bytes) -> bool:
        """Look for the three texts anywhere in the body, as the original does."""
        text = body.decode("utf-8", "replace")
        if OVER not in text and not any(sentence in text for sentence in NOT_READY):
            return False
        parts = re.sub(":+$", "", text).split(":")  # Java's split drops empty parts at the end
        if len(parts) == 2:
            self.iteration = _java_int(parts[1])
        if OVER in text:
            raise Fatal(Why.JOB_OVER)
        return True

    def _restart(self, next_req_time: str | None, scale: float | None = None) -> Status:
        """Wait as a refusal asks."""
        if next_req_time is None or not re.fullmatch(r"[+-]?[0-9]{1,18}", next_req_time):
            raise Fatal(Why.NEXT_REQ_TIME, repr(next_req_time))
        wait = int(next_req_time) - self.clock()
        if wait <= 0:
            raise Fatal(Why.NEXT_REQ_TIME, f"{next_req_time} is {-wait} ms ago")
        self.waits.append(wait)
        self._sleep(min(wait, MAX_WAIT_MS) / 1000 * (self.wait_scale if scale is None else scale))
        return Status.RESTART

    def _check_stop(self) -> None:
        if self._stopped.is_set():
            raise Fatal(Why.STOPPED)

    def _checked(self, plan: FLPlan) -> FLPlan:
        if plan.server_mode not in MODES:
            raise Fatal(Why.PLAN, f"server_mode {plan.server_mode!r}")
        if plan.epochs <= 0 or plan.mini_batch <= 0:
            raise Fatal(Why.PLAN, f"{plan.epochs} epochs, batches of {plan.mini_batch}")
        if plan.cipher is None:
            raise Fatal(Why.CIPHER, "absent")
        if plan.cipher.encrypt_type not in (None, "", "NOT_ENCRYPT", *CIPHERS):
            raise Fatal(Why.CIPHER, repr(plan.cipher.encrypt_type))
        params = {
            "PW_ENCRYPT": plan.cipher.pw_params,
            "DP_ENCRYPT": plan.cipher.dp_params,
            "SIGNDS": plan.cipher.ds_params,
        }
        if params.get(plan.cipher.encrypt_type or "", plan.cipher) is None:
            raise Fatal(Why.CIPHER, f"no parameters of {plan.cipher.encrypt_type}")
        self._learning_rate = plan.lr or self._learning_rate
        return replace(plan, lr=self._learning_rate)

    def _take_weights(self, reply: ResponseFLJob | ResponseGetModel) -> list[str]:
        """Copy a reply's weights into the model; return their names in the order received."""
        received = _unpacked(reply)
        if self.model is None:
            self.model = {name: values.size for name, values in received}
        for name, values in received:
            if self.model.get(name) != values.size:
                raise Fatal(Why.UNKNOWN_WEIGHT, f"{name!r} of {values.size} elements")
            self.weights[name] = values
        return [name for name, _ in received]


def _before_training(pairwise: Pairwise) -> tuple[Step, ...]:
    return (
        Step("exchangeKeys", pairwise.exchange_keys, ResponseExchangeKeys),
        Step("getKeys", pairwise.get_keys, ReturnExchangeKeys, pairwise.take_keys, polls=True),
        Step("shareSecrets", pairwise.share_secrets, ResponseShareSecrets),
        Step("getSecrets", pairwise.get_secrets, ReturnShareSecrets, pairwise.take_shares, polls=True),
    )


def _after_upload(pairwise: Pairwise) -> tuple[Step, ...]:
    lists = Step("getClientList", pairwise.get_client_list, ReturnClientList, pairwise.take_list, polls=True)
    report = Step("reconstructSecrets", pairwise.reconstruct_secrets, ReconstructSecret)
    if pairwise.keystore is None:
        return lists, report
    push = Step("pushListSign", pairwise.push_list_sign, ResponseClientListSign)
    signs = Step(
        "getListSign", pairwise.get_list_sign, ReturnAllClientListSign, pairwise.take_list_signs, polls=True
    )
    return lists, push, signs, report


def _status(code: int, reason: str | None, *, polling: bool = False) -> Status:
    if code == 201 and not polling:
        raise Fatal(Why.CODE_201, reason)
    if code not in (200, 201, 300):
        raise Fatal(Why.CODE, f"{code} {reason}")
    return Status(code)


def _unpacked(reply: ResponseFLJob | ResponseGetModel) -> list[tuple[str, Array]]:
    items: tuple[FeatureMap, ...] | tuple[CompressFeatureMap, ...] | None
    if reply.download_compress_type == 0:
        items = reply.feature_map
    elif reply.download_compress_type == 2:
        items = reply.compress_feature_map
    else:
        raise Fatal(Why.NO_WEIGHTS, f"download_compress_type {reply.download_compress_type}")
    if not items:
        raise Fatal(Why.NO_WEIGHTS, "empty")
    received = []
    for item in items:
        values = _plain(item)
        if item.weight_fullname is None or values is None:
            raise Fatal(Why.NO_WEIGHTS, "a weight without name or values")
        received.append((item.weight_fullname, values))
    return received


def _plain(item: FeatureMap | CompressFeatureMap) -> Array | None:
    if isinstance(item, FeatureMap):
        return None if item.data is None else item.data.copy()
    return None if item.compress_data is None else strict_cipher.restored(item)


def _copy(weights: Mapping[str, Array]) -> dict[str, Array]:
    return {name: values.copy() for name, values in weights.items()}


def _java_int(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,10}", text) or not -(2**31) <= int(text) < 2**31:
        raise Fatal(Why.TEXT_WITH_COLON, repr(text))
    return int(text)


def _unchecked_tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context
