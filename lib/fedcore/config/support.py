"""What of the protocol's configuration this version cannot serve yet, in one table that is to get shorter."""

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

MOST_COMPARED = 20_000  # clients whose silhouette takes less than ten seconds of one core, at ten values each
# path -> the values that are served. A scheduler only reads and writes Redis, so all values are good for it.
SERVED: dict[str, tuple[object, ...]] = {
    "server_mode": tuple(ServerMode),
    "encrypt.encrypt_type": (EncryptType.NOT_ENCRYPT,),
    "compression.upload_compress_type": (UploadCompressType.NO_COMPRESS,),
    "compression.download_compress_type": (DownloadCompressType.NO_COMPRESS,),
}


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
    return faults


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
