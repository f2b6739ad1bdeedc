"""Rules about several keys at once.

MindSpore Federated 0.1 checks none, so a broken one is a warning; it is a fault only where going on would be less safe
than the operator has asked for.
"""

from __future__ import annotations

from dataclasses import replace

from fedcore.config.address import UnixAddress
from fedcore.config.keys import SERVER_ROLES, Role
from fedcore.config.settings import (
    AggregationType,
    EncryptType,
    RedisTls,
    ServerMode,
    Settings,
    UploadCompressType,
)
from fedcore.core.quorum import update_threshold
from fedcore.pki.clients import ClientCertificates
from fedcore.secagg import thresholds

_MASK_TYPES = (EncryptType.PW_ENCRYPT, EncryptType.STABLE_PW_ENCRYPT)
# exchangeKeys getKeys shareSecrets getSecrets getClientList reconstructSecrets, and the stable kind's two
_CIPHER_ROUNDS = {EncryptType.PW_ENCRYPT: 6, EncryptType.STABLE_PW_ENCRYPT: 2}
_WORKER_TYPES = (EncryptType.NOT_ENCRYPT, EncryptType.STABLE_PW_ENCRYPT)  # all that a cloud worker knows
_DEVICE_NOISE = (EncryptType.DP_ENCRYPT, EncryptType.SIGNDS)
_UNCOMPRESSED = (EncryptType.SIGNDS, EncryptType.PW_ENCRYPT, ServerMode.CLOUD_TRAINING)
_WORKER_RULES = (AggregationType.SCAFFOLD, AggregationType.FEDNOVA)  # no device uploads what they add up
_WILDCARDS = ("0.0.0.0", "::")


def redis_has_tls(settings: Settings) -> bool:
    """Tell whether the link to Redis is encrypted."""
    own = settings.fedcore.redis
    if isinstance(settings.distributed_cache.address, UnixAddress) and not own.sentinels:
        return False
    return own.tls is RedisTls.ON or (own.tls is RedisTls.AUTO and settings.enable_ssl)


def in_force(settings: Settings) -> Settings:
    """Return settings without what cannot be had together: uploads are then not compressed, see ``forced``."""
    if not forced(settings):
        return settings
    plain = replace(settings.compression, upload_compress_type=UploadCompressType.NO_COMPRESS)
    return replace(settings, compression=plain)


def forced(settings: Settings) -> list[str]:
    """What ``in_force`` changes: one warning each.

    Masked and signed uploads cannot be compressed, and the original forces the type as well; cloud workers know of no
    compression.
    """
    if settings.compression.upload_compress_type is UploadCompressType.NO_COMPRESS:
        return []
    protection, mode = settings.encrypt.encrypt_type, settings.server_mode
    reason = protection if protection in _UNCOMPRESSED else mode if mode in _UNCOMPRESSED else None
    if reason is None:
        return []
    return [f"compression.upload_compress_type is set to NO_COMPRESS, as {reason} needs it"]


def cross_faults(settings: Settings) -> list[str]:
    """Combinations that no role can start on.

    Returns:
        One sentence per fault.
    """
    return [
        *_client_certificates(settings),
        *(_redis_files(settings) if redis_has_tls(settings) else []),
        *protection_faults(settings),
    ]


def protection_faults(settings: Settings) -> list[str]:
    """Combinations that would promise devices or operators a protection that they do not get.

    They are judged again for what the cluster's hyper-parameters put in place of a file's.

    Returns:
        One sentence per fault.
    """
    protection, faults = settings.encrypt.encrypt_type, []
    if protection is EncryptType.SIGNDS and settings.fedcore.update.norm_bound:
        faults.append(
            "fedcore.update.norm_bound measures updates, but with encrypt.encrypt_type SIGNDS each moves the model "
            "equally far, by sign_global_lr in every dimension sent: set it to 0"
        )
    if protection in _DEVICE_NOISE and settings.server_mode is ServerMode.CLOUD_TRAINING:
        faults.append(
            f"encrypt.encrypt_type {protection} is applied by devices, and with server_mode {settings.server_mode} "
            f"cloud workers send their updates without it: set it to {EncryptType.NOT_ENCRYPT} or "
            f"{EncryptType.STABLE_PW_ENCRYPT}"
        )
    return faults


def _client_certificates(settings: Settings) -> list[str]:
    """Whoever asks for certificates must not end up with a listener that cannot."""
    if settings.enable_ssl:
        return []
    own = settings.fedcore
    return [
        f"fedcore.{name}.client_certificates is {section.client_certificates}, which needs TLS: set enable_ssl to true"
        for name, section in (("scheduler", own.scheduler), ("device", own.device))
        if section.client_certificates is not ClientCertificates.NONE
    ]


def _redis_files(settings: Settings) -> list[str]:
    cache, faults = settings.distributed_cache, []
    if not cache.cacert_filename and not cache.capath:
        switch = "enable_ssl" if settings.fedcore.redis.tls is RedisTls.AUTO else "fedcore.redis.tls"
        faults.append(
            f"{switch} asks for TLS to Redis, whose certificate could not be verified: give "
            "distributed_cache.cacert_filename (or capath), or set fedcore.redis.tls to off"
        )
    if bool(cache.cert_filename) != bool(cache.private_key_filename):
        faults.append(
            "distributed_cache.cert_filename and distributed_cache.private_key_filename belong together: give both "
            "or neither"
        )
    return faults


def cross_checks(settings: Settings, role: Role) -> list[str]:
    """Warnings about values that are good alone and doubtful together.

    Args:
        settings: a file's settings.
        role: which program asks; a scheduler uses only Redis.

    Returns:
        One sentence per finding.
    """
    if role not in SERVER_ROLES:
        return _redis(settings)
    return [
        *_windows(settings),
        *_quorums(settings),
        *_rules(settings),
        *_bounds(settings),
        *_addresses(settings),
        *_redis(settings),
    ]


def _windows(settings: Settings) -> list[str]:
    cipher = settings.encrypt.pw_encrypt.cipher_time_window
    windows = {
        "round.start_fl_job_time_window": settings.round.start_fl_job_time_window,
        "round.update_model_time_window": settings.round.update_model_time_window,
        "round.global_iteration_time_window": settings.round.global_iteration_time_window,
    }
    rounds = _CIPHER_ROUNDS.get(settings.encrypt.encrypt_type, 0)
    if rounds:
        windows["encrypt.pw_encrypt.cipher_time_window"] = cipher
    found = [
        f"{path} is {window} ms: MindSpore Federated rounds it down to 0 s, here it is kept"
        for path, window in windows.items()
        if window < 1000
    ]
    whole = settings.round.global_iteration_time_window
    total = (
        settings.round.start_fl_job_time_window + settings.round.update_model_time_window + rounds * cipher
    )
    if whole < total:
        found.append(
            f"round.global_iteration_time_window is {whole} ms, shorter than its rounds' windows together, "
            f"{total} ms: an iteration may end before its rounds may"
        )
    return found


def _quorums(settings: Settings) -> list[str]:
    selected = settings.round.start_fl_job_threshold
    needed = update_threshold(selected, settings.round.update_model_ratio)
    found = []
    if needed > selected:
        found.append(
            f"round.start_fl_job_threshold {selected} and round.update_model_ratio "
            f"{settings.round.update_model_ratio} need {needed} uploads in single precision, more than are "
            "selected: no iteration can complete"
        )
    helpers = settings.encrypt.pw_encrypt.reconstruct_secrets_threshold + 1
    if settings.encrypt.encrypt_type in _MASK_TYPES and helpers > needed:
        found.append(
            f"encrypt.pw_encrypt.reconstruct_secrets_threshold {helpers - 1} needs {helpers} clients, but "
            f"{needed} uploads complete an iteration: masks could not be removed"
        )
    return [*found, *_secrecy(settings)]


def _secrecy(settings: Settings) -> list[str]:
    """A server that told two halves of the clients two lists would learn both secrets of somebody."""
    if settings.encrypt.encrypt_type is not EncryptType.PW_ENCRYPT:
        return []
    asked, places = settings.encrypt.pw_encrypt, settings.round.start_fl_job_threshold
    needed = update_threshold(places, settings.round.update_model_ratio)
    threshold = asked.reconstruct_secrets_threshold
    members = thresholds.of(places, needed, asked.share_secrets_ratio, threshold, signed=False).exchange_keys
    if 2 * threshold > members:
        return []
    return [
        f"encrypt.pw_encrypt.reconstruct_secrets_threshold {threshold} is not more than half of the {members} clients "
        f"that exchange keys: whoever has two groups of {threshold} of them on his side can unmask single updates"
    ]


def _rules(settings: Settings) -> list[str]:
    """Compare the rule of aggregation with who trains."""
    rule, places = settings.aggregation, settings.round.start_fl_job_threshold
    kind, cipher = rule.aggregation_type, settings.encrypt.encrypt_type
    workers = settings.server_mode is ServerMode.CLOUD_TRAINING
    found = []
    if kind in _WORKER_RULES and not workers:
        found.append(
            f"aggregation.aggregation_type {kind} adds up what only cloud workers upload, but server_mode is "
            f"{settings.server_mode}: set it to {ServerMode.CLOUD_TRAINING}, or the rule to FedAvg"
        )
    if kind is AggregationType.SCAFFOLD and rule.total_client_num < places:
        found.append(
            f"aggregation.total_client_num {rule.total_client_num} is below round.start_fl_job_threshold {places}: "
            "Scaffold's control moves further than its clients' do"
        )
    if kind is AggregationType.FEDPROX and workers and not rule.iid_rate:
        found.append("aggregation.iid_rate is 0, which makes FedProx the same as FedAvg")
    if workers and settings.client_verify.pki_verify:
        found.append(
            f"client_verify.pki_verify asks for signatures, and cloud workers sign nothing: with server_mode "
            f"{settings.server_mode} nobody can take part"
        )
    if workers and cipher not in _WORKER_TYPES:
        found.append(
            f"encrypt.encrypt_type {cipher} is for devices: cloud workers know " + " and ".join(_WORKER_TYPES)
        )
    return found


def _bounds(settings: Settings) -> list[str]:
    cipher = settings.encrypt.encrypt_type
    if settings.fedcore.update.norm_bound and cipher in _MASK_TYPES:
        return [
            f"fedcore.update.norm_bound measures weights, but with encrypt.encrypt_type {cipher} servers see only "
            "masked ones, whose norm says nothing: set it to 0"
        ]
    return []


def _addresses(settings: Settings) -> list[str]:
    ip = settings.fedcore.server.tcp_ip
    if ip in _WILDCARDS:
        return [f"fedcore.server.tcp_ip {ip} is announced to other nodes, which cannot connect to it"]
    return []


def _redis(settings: Settings) -> list[str]:
    own, address = settings.fedcore.redis, settings.distributed_cache.address
    found = []
    if own.tls is RedisTls.ON and not redis_has_tls(settings):
        found.append(
            f"fedcore.redis.tls is on, but Redis at {address} is a unix socket, which is never encrypted"
        )
    if not own.sentinels and (own.sentinel_username or own.sentinel_password_file):
        found.append(
            "fedcore.redis.sentinel_username and sentinel_password_file have no effect without fedcore.redis.sentinels"
        )
    return found
