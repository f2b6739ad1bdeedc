"""What servers refuse to serve: what this version cannot yet, in one table, and masks that could not be taken off."""

from __future__ import annotations

from operator import attrgetter

from fedcore.config.keys import SERVER_ROLES, Role, plain_text
from fedcore.config.settings import (
    DownloadCompressType,
    EncryptType,
    EvalType,
    ServerMode,
    Settings,
    UploadCompressType,
)
from fedcore.core.quorum import update_threshold
from fedcore.secagg import thresholds

MOST_COMPARED = 20_000  # clients whose silhouette takes less than ten seconds of one core, at ten values each
# path -> the values that are served. A scheduler only reads and writes Redis, so all values are good for it.
SERVED: dict[str, tuple[object, ...]] = {
    "server_mode": tuple(ServerMode),
    "encrypt.encrypt_type": tuple(EncryptType),
    "compression.upload_compress_type": tuple(UploadCompressType),
    "compression.download_compress_type": tuple(DownloadCompressType),
}

# Kind of masks -> the mode in which they are used, and by whom.
_MASKED_MODES = {
    EncryptType.PW_ENCRYPT: ServerMode.FEDERATED_LEARNING,
    EncryptType.STABLE_PW_ENCRYPT: ServerMode.CLOUD_TRAINING,
}
_MASKED_WHO = {EncryptType.PW_ENCRYPT: "devices", EncryptType.STABLE_PW_ENCRYPT: "cloud workers"}


def unsupported(settings: Settings, role: Role) -> list[str]:
    """Why this version must refuse to serve a configuration that is good in itself.

    Returns:
        One sentence per fault, empty if the configuration can be served.
    """
    if role not in SERVER_ROLES:
        return []
    faults = []
    for path, served in SERVED.items():
        value = attrgetter(path)(settings)
        if value not in served:
            good = " or ".join(plain_text(choice) for choice in served)
            faults.append(
                f"{path} is {plain_text(value)}, which this version cannot serve yet; it serves {good}"
            )
    return [*faults, *_masks(settings)]


def _masks(settings: Settings) -> list[str]:
    """Why the masks of updates could not be taken off, or would spoil the sum; one sentence per fault."""
    kind = settings.encrypt.encrypt_type
    mode = _MASKED_MODES.get(kind)
    if mode is None:
        return []
    faults = []
    if settings.server_mode is not mode:
        faults.append(
            f"encrypt.encrypt_type {kind} masks what {_MASKED_WHO[kind]} upload, all weights in one row, which "
            f"server_mode {settings.server_mode} has not: set server_mode to {mode}, or another encrypt_type"
        )
    if settings.fedcore.update.norm_bound:
        faults.append(
            f"fedcore.update.norm_bound would refuse every update, as encrypt.encrypt_type {kind} masks them: set it "
            "to 0"
        )
    if kind is EncryptType.PW_ENCRYPT:
        faults += _reports(settings)
    return faults


def _reports(settings: Settings) -> list[str]:
    """Why there could never be enough reports to take the masks off."""
    asked, places = settings.encrypt.pw_encrypt, settings.round.start_fl_job_threshold
    updates = update_threshold(places, settings.round.update_model_ratio)
    threshold = asked.reconstruct_secrets_threshold
    sharers = thresholds.of(places, updates, asked.share_secrets_ratio, threshold, signed=False).share_secrets
    if sharers > threshold:
        return []
    return [
        f"cipher init fail. encrypt.pw_encrypt.reconstruct_secrets_threshold {threshold} needs the reports of "
        f"{threshold + 1} clients, but {sharers} are to share their secrets: set it lower, or "
        "round.start_fl_job_threshold higher"
    ]


def reduced(settings: Settings, role: Role) -> list[str]:
    """What this version serves with less than the configuration asks for: one warning each."""
    clients = settings.unsupervised.cluster_client_num
    pairs = settings.unsupervised.eval_type is EvalType.SILHOUETTE_SCORE
    if role in SERVER_ROLES and pairs and clients > MOST_COMPARED:
        return [
            f"unsupervised.cluster_client_num is {clients}: {EvalType.SILHOUETTE_SCORE} compares every pair of "
            f"clients, and with more than {MOST_COMPARED} an iteration may end before the score of the one before is "
            "ready; it then has none"
        ]
    return []
