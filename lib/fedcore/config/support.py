"""What of the protocol's configuration this version cannot serve yet, in one table that is to get shorter."""

from __future__ import annotations

from operator import attrgetter

from fedcore.config.keys import SERVER_ROLES, Role, plain_text
from fedcore.config.settings import (
    AggregationType,
    DownloadCompressType,
    EncryptType,
    EvalType,
    ServerMode,
    Settings,
    UploadCompressType,
)

# path -> the values that are served. A scheduler only reads and writes Redis, so all values are good for it.
SERVED: dict[str, tuple[object, ...]] = {
    "server_mode": (ServerMode.FEDERATED_LEARNING,),
    "aggregation.aggregation_type": (AggregationType.FEDAVG, AggregationType.FEDPROX),
    "encrypt.encrypt_type": (EncryptType.NOT_ENCRYPT,),
    "compression.upload_compress_type": (UploadCompressType.NO_COMPRESS,),
    "compression.download_compress_type": (DownloadCompressType.NO_COMPRESS,),
    "client_verify.pki_verify": (False,),
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
    if role in SERVER_ROLES and settings.unsupervised.eval_type is not EvalType.NOT_EVAL:
        return [
            f"unsupervised.eval_type is {settings.unsupervised.eval_type}, but unsupervised evaluation is "
            "not computed by this version; devices are not asked for it"
        ]
    return []
