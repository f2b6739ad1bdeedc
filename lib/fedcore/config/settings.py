"""The settings: a tree of frozen dataclasses that mirrors the YAML file, key names included.

Each field carries its own description (type, range, default, unit, help), see `fedcore.config.keys`; KEYS
and SECTIONS are those descriptions as one table, in the order in which MindSpore Federated 0.1 reads the
file, our own section `fedcore` last. The default of a *required* key is what a scheduler sees, which does not
read the server's sections; a server never starts on it.
"""
# ruff: noqa: RUF009 - option() and section() return dataclasses.field(...)

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_network

from fedcore.config.address import (
    Address,
    UnixAddress,
    parse_address,
    parse_addresses,
    parse_host,
    parse_redis_address,
)
from fedcore.config.keys import (
    SERVER_ROLES,
    U32_MAX,
    Condition,
    Key,
    Kind,
    Limits,
    Section,
    keys_of,
    option,
    parse_size,
    section,
    sections_of,
)
from fedcore.errors import ConfigError
from fedcore.pki.clients import ClientCertificates

_U32 = Limits(1, U32_MAX)
_POSITIVE = Limits(0.0, low_open=True)
_SHARE = Limits(0.0, 1.0, low_open=True)
_AT_LEAST_ONE = Limits(1)
_PORT = Limits(1, 65535)

_URL_PREFIX = re.compile(r"/[A-Za-z0-9/._~!$&'()*+,;=:@%-]*")
_LEVEL = re.compile(r"[0-9]{1,4}")
_TRAINING_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?")


class ServerMode(StrEnum):
    """Who trains: devices, devices and a cloud worker, or cloud workers alone."""

    FEDERATED_LEARNING = "FEDERATED_LEARNING"
    HYBRID_TRAINING = "HYBRID_TRAINING"
    CLOUD_TRAINING = "CLOUD_TRAINING"


class AggregationType(StrEnum):
    """How uploads become the next model."""

    FEDAVG = "FedAvg"
    FEDPROX = "FedProx"
    SCAFFOLD = "Scaffold"
    FEDNOVA = "FedNova"


class EvalType(StrEnum):
    """Score of the unsupervised evaluation."""

    NOT_EVAL = "NOT_EVAL"
    SILHOUETTE_SCORE = "SILHOUETTE_SCORE"
    CALINSKI_HARABASZ_SCORE = "CALINSKI_HARABASZ_SCORE"
    DAVIES_BOULDIN_SCORE = "DAVIES_BOULDIN_SCORE"


class EncryptType(StrEnum):
    """How devices protect their uploads."""

    NOT_ENCRYPT = "NOT_ENCRYPT"
    PW_ENCRYPT = "PW_ENCRYPT"
    STABLE_PW_ENCRYPT = "STABLE_PW_ENCRYPT"
    DP_ENCRYPT = "DP_ENCRYPT"
    SIGNDS = "SIGNDS"


class UploadCompressType(StrEnum):
    """Compression of weights on their way to the server."""

    NO_COMPRESS = "NO_COMPRESS"
    DIFF_SPARSE_QUANT = "DIFF_SPARSE_QUANT"


class DownloadCompressType(StrEnum):
    """Compression of weights on their way to devices."""

    NO_COMPRESS = "NO_COMPRESS"
    QUANT = "QUANT"


class RedisTls(StrEnum):
    """Whether the link to Redis is encrypted."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class SumDevice(StrEnum):
    """What adds the sums of servers and computes models."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class MaskLayout(StrEnum):
    """Which value of a mask goes with which value of the model."""

    CONTIGUOUS = "contiguous"
    PER_LAYER = "per_layer"


class NormAction(StrEnum):
    """What becomes of an update beyond the bound."""

    REFUSE = "refuse"
    CLIP = "clip"
    COUNT = "count"


class LogLevel(StrEnum):
    """Least severity that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARN = "warn"
    ERROR = "error"


_CLIENT_CERTIFICATES = (
    "Certificates of {}, with enable_ssl. none: not asked for. asked: one that is shown must be signed by an authority "
    "of client_ca_path, in force, for clients and not revoked. required: and one must be shown."
)
_CLIENT_CA = "PEM file of the authorities of {}' certificates; empty: ssl.ca_cert_path."

_WITH_TLS = Condition("enable_ssl", (True,))
_WITH_MASKS = Condition("encrypt.encrypt_type", (EncryptType.PW_ENCRYPT, EncryptType.STABLE_PW_ENCRYPT))


def parse_url_prefix(text: str) -> str:
    """Check a prefix of URL paths: it starts with a slash and holds only characters of a path.

    Raises:
        ConfigError: anything else, in the protocol's words.
    """
    if not _URL_PREFIX.fullmatch(text):
        raise ConfigError(f"The http url:{text} is illegal!")
    return text


def parse_levels(text: str) -> tuple[int, int]:
    """Read "a,b", two whole numbers of minutes with 1 <= a < b <= 2880.

    Raises:
        ConfigError: anything else.
    """
    parts = text.split(",")
    if len(parts) == 2 and all(_LEVEL.fullmatch(part) for part in parts):
        first, second = int(parts[0]), int(parts[1])
        if 1 <= first < second <= 2880:
            return first, second
    raise ConfigError(f"value is expected to be minutes a,b with 1 <= a < b <= 2880, but got {text}")


def parse_pairs(text: str) -> tuple[str, ...]:
    """Read "key=value,key=value" into its pairs; a key is a Python identifier and comes once.

    Raises:
        ConfigError: anything else.
    """
    pairs = tuple(part.strip() for part in text.split(",") if part.strip())
    names = [pair.partition("=")[0] for pair in pairs]
    for pair, name in zip(pairs, names, strict=True):
        if "=" not in pair or not name.isidentifier():
            raise ConfigError(f"{pair} is not written as key=value")
        if names.count(name) > 1:
            raise ConfigError(f"{name} is given twice")
    return pairs


def parse_training_device(text: str) -> str:
    """Check the name of a computing device: auto, cpu, cuda or cuda:N.

    Raises:
        ConfigError: anything else.
    """
    if not _TRAINING_DEVICE.fullmatch(text):
        raise ConfigError(f"value is expected to be auto, cpu, cuda or cuda:N, but got {text}")
    return text


def parse_names(text: str) -> tuple[str, ...]:
    """Read "a,b", host names or addresses, into lower case.

    Raises:
        ConfigError: a part is neither.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return tuple(parse_host(part, "{} is no host name and no address").lower() for part in parts)


def parse_networks(text: str) -> tuple[str, ...]:
    """Read "a,b", networks in CIDR form or single addresses.

    Raises:
        ConfigError: anything else.
    """
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    for part in parts:
        try:
            ip_network(part)
        except ValueError as fault:
            raise ConfigError(f"{part} is no network: {fault}", hint="write 10.0.0.0/24") from fault
    return parts


@dataclass(frozen=True, slots=True)
class AggregationSettings:
    """The rule that turns uploads into the next model."""

    aggregation_type: AggregationType = option(AggregationType.FEDAVG, "Rule of aggregation.")
    iid_rate: float = option(
        0.0,
        "FedProx weight, used by workers only; without it FedProx is FedAvg.",
        example=1.0,
        limits=_SHARE,
    )
    total_client_num: int = option(1, "Clients in the whole population; Scaffold divides by it.", limits=_U32)


@dataclass(frozen=True, slots=True)
class DistributedCacheSettings:
    """Redis, the only state that servers share."""

    type: str = option("", "Accepted and ignored: only redis exists.")
    address: Address | UnixAddress = option(
        Address("127.0.0.1", 6379),
        "Redis: host:port, [IPv6]:port or unix:/path.",
        kind=Kind.STR,
        required=True,
        example="127.0.0.1:6379",
        parse=parse_redis_address,
    )
    plugin_lib_path: str = option("", "Accepted and ignored.")
    cacert_filename: str = option(
        "", "PEM file of the CA certificates that Redis' one must lead to; used if the link has TLS."
    )
    capath: str = option("", "Folder of such PEM files, named by their hashes (openssl rehash).")
    cert_filename: str = option(
        "", "PEM file of the certificate, and its chain, that this node shows to Redis."
    )
    private_key_filename: str = option("", "PEM file of that certificate's key, without a password.")
    server_name: str = option(
        "", "Name that Redis' certificate must bear, also sent as SNI; empty: the host of its address."
    )


@dataclass(frozen=True, slots=True)
class SslSettings:
    """Certificates of listeners and nodes, and whom they trust."""

    server_cert_path: str = option(
        "",
        "PKCS#12 file of the listeners. Its subjectAltName must hold what devices and nodes connect to.",
        required=True,
        example="/etc/fl/server.p12",
    )
    client_cert_path: str = option(
        "",
        "PKCS#12 file shown to the servers that this node connects to. A server's subjectAltName must hold its "
        "fedcore.server.tcp_ip.",
        required=True,
        example="/etc/fl/client.p12",
    )
    ca_cert_path: str = option(
        "",
        "PEM file of the authorities that must have signed nodes' certificates; several while one takes the place of "
        "another.",
        required=True,
        example="/etc/fl/ca.crt",
    )
    crl_path: str = option(
        "",
        "PEM file of the revocation lists of these authorities, empty for none. It is read again when it changes.",
    )
    cipher_list: str = option(
        "",
        "TLS 1.2 cipher suites, separated by colons.",
        required=True,
        example="ECDHE-RSA-AES128-GCM-SHA256:ECDHE-RSA-AES256-GCM-SHA384:ECDHE-RSA-CHACHA20-POLY1305",
    )
    cert_expire_warning_time_in_day: int = option(
        90, "Warn when a certificate expires within this time.", unit="days", limits=Limits(7, 180)
    )


@dataclass(frozen=True, slots=True)
class RoundSettings:
    """Quorums and time windows of one iteration."""

    start_fl_job_threshold: int = option(
        1, "Clients that startFLJob selects for one iteration.", required=True, example=2, limits=_U32
    )
    start_fl_job_time_window: int = option(
        300000,
        "Time from the first startFLJob until that many must have come.",
        unit="ms",
        required=True,
        example=30000,
        limits=_U32,
    )
    update_model_ratio: float = option(
        1.0, "Share of the selected clients that must upload.", required=True, example=1.0, limits=_SHARE
    )
    update_model_time_window: int = option(
        300000,
        "Time from the first updateModel until the quorum must be complete.",
        unit="ms",
        required=True,
        example=30000,
        limits=_U32,
    )
    global_iteration_time_window: int = option(
        300000,
        "Time that a whole iteration may take; also part of the life time of keys in Redis.",
        unit="ms",
        required=True,
        example=60000,
        limits=_U32,
    )


@dataclass(frozen=True, slots=True)
class SummarySettings:
    """Files that tell about each iteration."""

    participation_time_level: tuple[int, int] = option(
        (5, 15),
        "Two limits a,b of the time from startFLJob to updateModel, 1 <= a < b <= 2880; a bad value gives a "
        "warning and the default.",
        unit="minutes",
        parse=parse_levels,
        forgiving=True,
    )
    continuous_failure_times: int = option(
        10, "Failed iterations in a row that are reported as an event.", limits=_AT_LEAST_ONE
    )
    metrics_file: str = option(
        "", "One JSON line per iteration; not written by this version.", required=True, example="metrics.json"
    )
    failure_event_file: str = option("", "Events are appended here.", required=True, example="event.txt")
    data_rate_dir: str = option(
        "", "Folder of the data rate files, empty for none; not written by this version."
    )


@dataclass(frozen=True, slots=True)
class UnsupervisedSettings:
    """Evaluation without labels."""

    cluster_client_num: int = option(
        0,
        "Clients whose vectors are clustered; needed if eval_type is not NOT_EVAL.",
        example=1000,
        limits=_AT_LEAST_ONE,
    )
    eval_type: EvalType = option(EvalType.NOT_EVAL, "Score to compute.")


@dataclass(frozen=True, slots=True)
class PwEncryptSettings:
    """Secure aggregation with pairwise masks."""

    share_secrets_ratio: float = option(
        1.0,
        "Share of the clients of one cipher round that the next one needs.",
        required=True,
        example=1.0,
        limits=_SHARE,
    )
    cipher_time_window: int = option(
        1, "Time window of each cipher round.", unit="ms", required=True, example=3000, limits=_U32
    )
    reconstruct_secrets_threshold: int = option(
        1,
        "Shares that recover a secret, less one: r + 1 clients must help.",
        required=True,
        example=1,
        limits=_U32,
    )


@dataclass(frozen=True, slots=True)
class DpEncryptSettings:
    """Local differential privacy with Gaussian noise."""

    dp_eps: float = option(50.0, "Privacy budget epsilon.", limits=_POSITIVE)
    dp_delta: float = option(
        0.01,
        "Probability delta that epsilon does not hold.",
        limits=Limits(0.0, 1.0, low_open=True, high_open=True),
    )
    dp_norm_clip: float = option(1.0, "Factor of the norm that updates are clipped to.", limits=_POSITIVE)


@dataclass(frozen=True, slots=True)
class SigndsSettings:
    """Local differential privacy with signs of selected dimensions."""

    sign_k: float = option(
        0.01, "Share of the dimensions that count as top.", limits=Limits(0.0, 0.25, low_open=True)
    )
    sign_eps: float = option(100.0, "Privacy budget epsilon.", limits=Limits(0.0, 100.0, low_open=True))
    sign_thr_ratio: float = option(
        0.6, "Least share of top dimensions among the sent ones.", limits=Limits(0.5, 1.0)
    )
    sign_global_lr: float = option(0.1, "Step of the global model.", limits=_POSITIVE)
    sign_dim_out: int = option(0, "Dimensions sent, 0 for automatic.", limits=Limits(0, 50))


@dataclass(frozen=True, slots=True)
class EncryptSettings:
    """How devices protect their uploads."""

    encrypt_type: EncryptType = option(EncryptType.NOT_ENCRYPT, "Protection of the uploads.")
    pw_encrypt: PwEncryptSettings = section(
        PwEncryptSettings, "Secure aggregation with pairwise masks.", condition=_WITH_MASKS
    )
    dp_encrypt: DpEncryptSettings = section(
        DpEncryptSettings,
        "Local differential privacy, Gaussian noise.",
        condition=Condition("encrypt.encrypt_type", (EncryptType.DP_ENCRYPT,)),
    )
    signds: SigndsSettings = section(
        SigndsSettings,
        "Local differential privacy, signs of selected dimensions.",
        condition=Condition("encrypt.encrypt_type", (EncryptType.SIGNDS,)),
    )


@dataclass(frozen=True, slots=True)
class CompressionSettings:
    """Compression of weights."""

    upload_compress_type: UploadCompressType = option(
        UploadCompressType.NO_COMPRESS, "Of uploads; NO_COMPRESS is forced with PW_ENCRYPT and SIGNDS."
    )
    upload_sparse_rate: float = option(0.4, "Share of the weights that a sparse upload keeps.", limits=_SHARE)
    download_compress_type: DownloadCompressType = option(DownloadCompressType.NO_COMPRESS, "Of downloads.")


@dataclass(frozen=True, slots=True)
class ClientVerifySettings:
    """Certificates of devices."""

    pki_verify: bool = option(False, "Devices must sign their requests with a certified key.")
    root_first_ca_path: str = option("", "First root certificate of the devices.")
    root_second_ca_path: str = option("", "Second root certificate of the devices.")
    equip_crl_path: str = option("", "Revocation list of device certificates.")
    replay_attack_time_diff: int = option(
        600000, "Signed requests older or newer than this are refused.", unit="ms", limits=Limits(0)
    )


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """What devices are told, and their addresses."""

    http_url_prefix: str = option(
        "",
        "Put before the name of each route as it is, so it begins and normally ends with a slash; empty: a "
        "single slash.",
        parse=parse_url_prefix,
    )
    client_epoch_num: int = option(25, "Epochs of local training.", limits=_AT_LEAST_ONE)
    client_batch_size: int = option(32, "Batch size of local training.", limits=_AT_LEAST_ONE)
    client_learning_rate: float = option(0.001, "Learning rate of local training.", limits=_POSITIVE)
    connection_num: int = option(10000, "Greatest number of node connections (TCP).", limits=_AT_LEAST_ONE)


@dataclass(frozen=True, slots=True)
class RedisSettings:
    """How Redis is found, who we are there, and patience with it."""

    username: str = option("", "ACL user at Redis, empty for the default user.")
    password_file: str = option(
        "",
        "File whose first line is the password at Redis; only its owner should be able to read it. Empty: systemd's "
        "credential redis-password.",
    )
    database: int = option(0, "Number of the database.", limits=Limits(0, 65535))
    sentinels: tuple[Address, ...] = option(
        (),
        "Sentinels that know the address of Redis, host:port,host:port; distributed_cache.address is then not used.",
        kind=Kind.STR,
        parse=parse_addresses,
    )
    sentinel_master: str = option("fl", "Name under which the Sentinels know our Redis.")
    sentinel_username: str = option("", "ACL user at the Sentinels, empty for the default user.")
    sentinel_password_file: str = option(
        "",
        "File whose first line is the password at the Sentinels; empty: systemd's credential sentinel-password.",
    )
    tls: RedisTls = option(
        RedisTls.AUTO,
        "Encrypt the link to Redis and the Sentinels, with the files of distributed_cache; auto: as enable_ssl. A "
        "unix socket is never encrypted.",
    )
    connect_timeout: float = option(
        3.0, "Time to connect.", unit="s", limits=Limits(0.0, 60.0, low_open=True)
    )
    reply_timeout: float = option(
        5.0,
        "Time to answer a command; then the connection is given up.",
        unit="s",
        limits=Limits(0.0, 60.0, low_open=True),
    )


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """Listeners of fl-schedulerd, and how it answers."""

    manage_address: Address = option(
        Address("127.0.0.1", 11202), "Operator API.", kind=Kind.STR, parse=parse_address
    )
    admin_address: Address = option(
        Address("127.0.0.1", 11302), "Metrics and health.", kind=Kind.STR, parse=parse_address
    )
    integer_code: bool = option(
        False,
        'Answer with "code":0 or 1, as the published guide shows it, instead of the "0" or "1" of MindSpore '
        "Federated 0.1.",
    )
    token_file: str = option(
        "",
        "File whose first line is the bearer token that requests must carry which change the job; nobody but its owner "
        "may be able to read it. Empty: systemd's credential operator-token.",
    )
    unauthenticated: bool = option(
        False,
        "Let anybody who reaches the operator API change the job, as MindSpore Federated 0.1 does. Without it, and "
        "without a token, only a listener on a loopback address takes changes, or one with TLS from clients with an "
        "operator's certificate.",
    )
    client_certificates: ClientCertificates = option(
        ClientCertificates.NONE, _CLIENT_CERTIFICATES.format("operators")
    )
    client_ca_path: str = option("", _CLIENT_CA.format("operators"))


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Listeners and files of fl-serverd; instance N listens on each port + N."""

    http_address: Address = option(
        Address("127.0.0.1", 6666),
        "Device API; instance N takes port + N.",
        kind=Kind.STR,
        parse=parse_address,
    )
    tcp_ip: str = option(
        "",
        "Address under which other nodes reach this one; empty: this host's address on the way to Redis.",
        parse=parse_host,
    )
    tcp_port: int = option(6766, "Node channel; instance N takes port + N.", limits=_PORT)
    admin_address: Address = option(
        Address("127.0.0.1", 6866),
        "Metrics and health; instance N takes port + N.",
        kind=Kind.STR,
        parse=parse_address,
    )
    checkpoint_dir: str = option("./fl_ckpt", "Folder of the published models.")
    model: str = option("", "File of the initial model, empty for none.")
    ledger_dir: str = option(
        "",
        "Folder of the update ledgers, shared by the servers of a host; empty: ledgers/ in checkpoint_dir.",
    )


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What fl-workerd trains, and how."""

    trainer: str = option(
        "",
        "Who trains, as module:Class; see fedcore.services.worker_trainer.",
        example="fedexamples.lenet_worker_numpy:NumpyLeNetWorker",
    )
    options: tuple[str, ...] = option(
        (),
        "What the trainer is told, as key=value,key=value; a value is JSON if it can be read as such, else text.",
        kind=Kind.STR,
        example="data=digits,learning_rate=0.02",
        parse=parse_pairs,
    )
    sync_frequency: int = option(
        10, "Training steps between pulling the aggregate and pushing the trained weights.", limits=_U32
    )
    device: str = option(
        "auto",
        "Where the trainer computes: cpu, cuda or cuda:N; auto: cuda if there is one.",
        parse=parse_training_device,
    )
    reply_timeout: float = option(
        30.0,
        "Time for a server to answer; then another one is asked.",
        unit="s",
        limits=Limits(0.0, 600.0, low_open=True),
    )
    admin_address: Address = option(
        Address("127.0.0.1", 6966),
        "Metrics and health; instance N takes port + N.",
        kind=Kind.STR,
        parse=parse_address,
    )


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """Who may use the node channel, and how it is protected."""

    tls: bool = option(
        True,
        "With enable_ssl, nodes show each other certificates (mutual TLS). false: the plain channel of earlier "
        "versions, for the time of an upgrade. It must be the same on all nodes.",
    )
    tls_names: tuple[str, ...] = option(
        (),
        "Names, as a,b: a certificate with one of them in its subjectAltName is taken for any node. For certificates "
        "that were made once for all nodes.",
        kind=Kind.STR,
        example="MindSporeFederated",
        parse=parse_names,
    )

    allow: tuple[str, ...] = option(
        ("127.0.0.0/8", "::1/128"),
        "Networks of workers, as a,b in CIDR form. Without TLS this is all that keeps others out of worker rounds; "
        "with it they need a certificate as well. Servers are known by their registration in Redis.",
        kind=Kind.STR,
        example="127.0.0.0/8,10.0.0.0/24",
        parse=parse_networks,
    )
    worker_http: bool = option(
        False,
        "Serve the rounds of hybrid training's workers on the devices' port as well, to the networks of allow.",
    )


@dataclass(frozen=True, slots=True)
class DeviceSettings:
    """Limits of device connections."""

    hold_time: float = option(
        8.0,
        "Longest time that a request waits at an iteration change; 0: it is answered at once.",
        unit="s",
        limits=Limits(0.0, 60.0),
    )
    header_timeout: float = option(
        10.0, "Time for the head of a request.", unit="s", limits=Limits(0.0, 600.0, low_open=True)
    )
    body_timeout: float = option(
        60.0,
        "Longest time that a body may stay below min_body_rate.",
        unit="s",
        limits=Limits(0.0, 3600.0, low_open=True),
    )
    min_body_rate: int = option(
        1024, "Least rate of a body, 0 for any.", unit="bytes/s", limits=Limits(0, 1000000000)
    )
    idle_timeout: float = option(
        50.0,
        "Time that a connection may rest between requests.",
        unit="s",
        limits=Limits(0.0, 3600.0, low_open=True),
    )
    max_connections: int = option(
        20000,
        "Greatest number of device connections. Beyond it a new one takes the place of one that waits for a request.",
        limits=Limits(1, 1000000),
    )
    connections_per_address: int = option(
        0,
        "Greatest number of connections of one IPv4 address or IPv6 /64, 0 for any. Many devices may share an address: "
        "behind a carrier's address translation, or behind a load balancer that is not among proxies.",
        example=1000,
        limits=Limits(0, 1000000),
    )
    request_rate: float = option(
        0.0,
        "Requests that one such address may send on average, 0 for any number. With more it is told what makes devices "
        "wait: that the cluster is in safemode.",
        unit="1/s",
        example=50.0,
        limits=Limits(0.0, 1000000.0),
    )
    request_burst: int = option(
        20, "Requests that may come at once in spite of request_rate.", limits=Limits(1, 1000000)
    )
    retry_margin: float = option(
        5.0,
        "A next_req_time lies at least this far in the future; old devices die of one that does not.",
        unit="s",
        limits=Limits(0.1, 3600.0),
    )
    proxies: tuple[str, ...] = option(
        (),
        "Networks of load balancers, as a,b in CIDR form. Their connections must begin with a header of the PROXY "
        "protocol (version 1 or 2), and the address in it counts as the device's, also for fedcore.node.allow; from "
        "elsewhere no such header is taken. HAProxy sends it with send-proxy or send-proxy-v2.",
        kind=Kind.STR,
        example="10.0.0.10/32",
        parse=parse_networks,
    )
    client_certificates: ClientCertificates = option(
        ClientCertificates.NONE, _CLIENT_CERTIFICATES.format("devices")
    )
    client_ca_path: str = option("", _CLIENT_CA.format("devices"))
    crl_required: bool = option(
        False,
        "With client_verify.pki_verify: refuse devices whose equipment CA has no list in force in "
        "client_verify.equip_crl_path. false: without a list nobody is refused as revoked, and one past its date goes "
        "on being used.",
    )


@dataclass(frozen=True, slots=True)
class UpdateSettings:
    """How much one client may move the model."""

    norm_bound: float = option(
        0.0,
        "Greatest distance of an update to the model that it was trained from: the L2 norm of the difference, over all "
        "weights that are aggregated. 0: none. All servers of a job should have the same.",
        example=5.0,
        limits=Limits(0.0),
    )
    norm_action: NormAction = option(
        NormAction.REFUSE,
        "What becomes of an update beyond norm_bound. refuse: it does not count, and its device is told to come back. "
        "clip: it counts, brought nearer until it is at the bound. count: it counts as it is, and the metrics show it; "
        "to find a good bound.",
    )
    max_data_size: int = option(
        65535,
        "Greatest data size that a device may declare, and so the greatest weight of its update in the mean; with more "
        "it gets no place.",
        limits=Limits(1, 65535),
    )
    unsigned_signds: bool = option(
        True,
        "With SIGNDS, count updates whose sign is 0, as MindSpore Federated does: they carry all weights, unprotected. "
        "false: they are refused. All servers of a job should have the same.",
    )


@dataclass(frozen=True, slots=True)
class LedgerSettings:
    """Where accepted uploads wait for their merge."""

    memory_budget: int = option(
        1 << 30,
        "Size of a server's ledger; a number or a string such as 512MiB (B, KiB, MiB, GiB, TiB).",
        kind=Kind.SIZE,
        unit="bytes",
        limits=Limits(1 << 20, 1 << 50),
        parse=parse_size,
    )
    fsync: bool = option(
        False,
        "Wait until an update has reached the disk before it is answered: it then survives a power cut of the host, "
        "not only the end of the process. Useless on tmpfs.",
    )


@dataclass(frozen=True, slots=True)
class SumSettings:
    """Where the sums of servers become a model."""

    device: SumDevice = option(
        SumDevice.CPU,
        "What adds the servers' sums and computes the model; the results are the same to the last bit. cpu: NumPy. "
        "cuda: PyTorch on a CUDA device; where there is none, or it has no memory left, a warning and the CPU. auto: "
        "cuda if there is one.",
    )


@dataclass(frozen=True, slots=True)
class SecureAggregationSettings:
    """How masks lie over the model, with encrypt_type PW_ENCRYPT."""

    mask_layout: MaskLayout = option(
        MaskLayout.CONTIGUOUS,
        "Which values of a mask go with a weight; the same on all servers and devices of a job. contiguous: each "
        "weight takes the values after those of the weight before it. per_layer: each weight takes a mask's first "
        "values, as the Java client of MindSpore Federated 0.1 does; that tells how two weights of one device differ.",
    )


@dataclass(frozen=True, slots=True)
class LogSettings:
    """The log."""

    level: LogLevel = option(LogLevel.INFO, "Least severity that is logged.")


@dataclass(frozen=True, slots=True)
class FedcoreSettings:
    """What MindSpore Federated does not know; an unknown key in here is an error."""

    redis: RedisSettings = section(
        RedisSettings, "How Redis is found, who we are there, and patience with it."
    )
    scheduler: SchedulerSettings = section(SchedulerSettings, "Listeners of fl-schedulerd.")
    server: ServerSettings = section(ServerSettings, "Listeners and files of fl-serverd.")
    worker: WorkerSettings = section(WorkerSettings, "What fl-workerd trains, and how.")
    node: NodeSettings = section(NodeSettings, "Who may use the node channel, and how it is protected.")
    device: DeviceSettings = section(DeviceSettings, "Limits of device connections.")
    update: UpdateSettings = section(UpdateSettings, "How much one client may move the model.")
    ledger: LedgerSettings = section(LedgerSettings, "Where accepted uploads wait for their merge.")
    aggregation: SumSettings = section(SumSettings, "Where the sums of servers become a model.")
    secure_aggregation: SecureAggregationSettings = section(
        SecureAggregationSettings, "How masks lie over the model, with encrypt_type PW_ENCRYPT."
    )
    log: LogSettings = section(LogSettings, "The log.")


@dataclass(frozen=True, slots=True)
class Settings:
    """One configuration file."""

    fl_name: str = option("", "Name of the job; part of its keys in Redis.", required=True, example="lenet")
    fl_iteration_num: int = option(1, "Number of the last iteration.", required=True, example=25, limits=_U32)
    server_mode: ServerMode = option(
        ServerMode.FEDERATED_LEARNING,
        "Who trains.",
        required=True,
        example=ServerMode.FEDERATED_LEARNING,
        choice_fault="{} is invalid. Server mode must be " + ", ".join(ServerMode),
    )
    enable_ssl: bool = option(
        False,
        "TLS for devices, operators, nodes and Redis.",
        required=True,
        example=False,
    )
    aggregation: AggregationSettings = section(
        AggregationSettings, "The rule that turns uploads into the next model."
    )
    distributed_cache: DistributedCacheSettings = section(
        DistributedCacheSettings, "Redis, the only state that servers share."
    )
    ssl: SslSettings = section(SslSettings, "Certificates.", condition=_WITH_TLS)
    round: RoundSettings = section(
        RoundSettings, "Quorums and time windows of one iteration.", roles=SERVER_ROLES
    )
    summary: SummarySettings = section(
        SummarySettings, "Files that tell about each iteration.", roles=SERVER_ROLES
    )
    unsupervised: UnsupervisedSettings = section(
        UnsupervisedSettings, "Evaluation without labels.", roles=SERVER_ROLES
    )
    encrypt: EncryptSettings = section(
        EncryptSettings, "How devices protect their uploads.", roles=SERVER_ROLES
    )
    compression: CompressionSettings = section(
        CompressionSettings, "Compression of weights.", roles=SERVER_ROLES
    )
    client_verify: ClientVerifySettings = section(
        ClientVerifySettings, "Certificates of devices.", roles=SERVER_ROLES
    )
    client: ClientSettings = section(
        ClientSettings, "What devices are told, and their addresses.", roles=SERVER_ROLES
    )
    fedcore: FedcoreSettings = section(
        FedcoreSettings,
        "What MindSpore Federated does not know. An unknown key in here is an error, elsewhere a warning.",
    )


KEYS: tuple[Key, ...] = tuple(keys_of(Settings))
SECTIONS: dict[str, Section] = dict(sections_of(Settings))
