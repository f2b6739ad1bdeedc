"""The hyper-parameters that servers of one job share through Redis and operators see in /queryInstance."""

from __future__ import annotations

from fedcore.config.settings import Settings
from fedcore.core.quorum import to_float32


def hyper_parameters(settings: Settings) -> dict[str, object]:
    """The 30 shared values of MindSpore Federated 0.1, in its order.

    Fractions are float32 widened to double, as devices see them: 0.8 becomes 0.800000011920929. Those of a
    protection that is not selected are the defaults.

    Args:
        settings: settings of a server.

    Returns:
        Name to int, float, bool or str, ready for JSON.
    """
    encrypt, compression = settings.encrypt, settings.compression
    values: dict[str, object] = {
        "global_iteration_time_window": settings.round.global_iteration_time_window,
        "start_fl_job_threshold": settings.round.start_fl_job_threshold,
        "start_fl_job_time_window": settings.round.start_fl_job_time_window,
        "update_model_ratio": settings.round.update_model_ratio,
        "update_model_time_window": settings.round.update_model_time_window,
        "client_epoch_num": settings.client.client_epoch_num,
        "client_batch_size": settings.client.client_batch_size,
        "client_learning_rate": settings.client.client_learning_rate,
        "fl_iteration_num": settings.fl_iteration_num,
        "aggregation_type": settings.aggregation.aggregation_type.value,
        "iid_rate": settings.aggregation.iid_rate,
        "total_client_num": settings.aggregation.total_client_num,
        "secure_aggregation": False,  # no key of the file sets it
        "encrypt_type": encrypt.encrypt_type.value,
        "share_secrets_ratio": encrypt.pw_encrypt.share_secrets_ratio,
        "cipher_time_window": encrypt.pw_encrypt.cipher_time_window,
        "reconstruct_secrets_threshold": encrypt.pw_encrypt.reconstruct_secrets_threshold,
        "dp_eps": encrypt.dp_encrypt.dp_eps,
        "dp_delta": encrypt.dp_encrypt.dp_delta,
        "dp_norm_clip": encrypt.dp_encrypt.dp_norm_clip,
        "sign_k": encrypt.signds.sign_k,
        "sign_eps": encrypt.signds.sign_eps,
        "sign_thr_ratio": encrypt.signds.sign_thr_ratio,
        "sign_global_lr": encrypt.signds.sign_global_lr,
        "sign_dim_out": encrypt.signds.sign_dim_out,
        "upload_compress_type": compression.upload_compress_type.value,
        "upload_sparse_rate": compression.upload_sparse_rate,
        "download_compress_type": compression.download_compress_type.value,
        "enable_ssl": settings.enable_ssl,
        "pki_verify": settings.client_verify.pki_verify,
    }
    return {name: to_float32(value) if isinstance(value, float) else value for name, value in values.items()}
