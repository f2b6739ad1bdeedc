"""What follows from the settings in force: they are the file's, with the values that the cluster shares."""

from __future__ import annotations

from fedcore.config import Settings
from fedcore.config.settings import EncryptType, ServerMode, UploadCompressType
from fedcore.core.iteration import EXCHANGE_ROUNDS, REPORTS_ROUND, Policy
from fedcore.core.quorum import update_threshold
from fedcore.ledger.layout import Shape
from fedcore.secagg import thresholds
from fedcore.wire.arrays import Layout

LEAST_SLOTS = 8
MOST_SLOTS = 64  # bodies received at a time; more would only wait for the same network
PLAIN_MASK_S = (
    0.2e-6  # per value of the model, on a slow core without the C extension; with it a fiftieth of that
)
UNNOTICED_VALUES = 1_000_000  # of a model whose mask nobody waits for either way


def policy_of(settings: Settings) -> Policy:
    """Return the numbers that rule an iteration.

    With STABLE_PW_ENCRYPT it needs the update of every client on the list of keys: its masks are those of all pairs.
    """
    windows = settings.round
    updates = update_threshold(windows.start_fl_job_threshold, windows.update_model_ratio)
    kind = settings.encrypt.encrypt_type
    rounds = _cipher_rounds(settings, updates)
    return Policy(
        start_threshold=windows.start_fl_job_threshold,
        update_threshold=rounds[EXCHANGE_ROUNDS[0]] if kind is EncryptType.STABLE_PW_ENCRYPT else updates,
        start_window=windows.start_fl_job_time_window / 1000,
        update_window=windows.update_model_time_window / 1000,
        global_window=windows.global_iteration_time_window / 1000,
        last_iteration=settings.fl_iteration_num,
        hybrid=settings.server_mode is ServerMode.HYBRID_TRAINING,
        unmask=kind is EncryptType.PW_ENCRYPT,
        cipher_window=float(settings.encrypt.pw_encrypt.cipher_time_window // 1000) if rounds else 0.0,
        cipher_rounds=tuple(rounds.items()),
    )


def _cipher_rounds(settings: Settings, updates: int) -> dict[str, int]:
    """Return the cipher rounds that there are, and how many requests complete each."""
    encrypt, signed = settings.encrypt, settings.client_verify.pki_verify
    if encrypt.encrypt_type not in (EncryptType.PW_ENCRYPT, EncryptType.STABLE_PW_ENCRYPT):
        return {}
    needed = thresholds.of(
        settings.round.start_fl_job_threshold,
        updates,
        encrypt.pw_encrypt.share_secrets_ratio,
        encrypt.pw_encrypt.reconstruct_secrets_threshold,
        signed=signed,
    )
    rounds = {"exchangeKeys": needed.exchange_keys, "getKeys": needed.get_keys}
    if encrypt.encrypt_type is EncryptType.STABLE_PW_ENCRYPT:
        return rounds
    rounds |= {"shareSecrets": needed.share_secrets, "getSecrets": needed.get_secrets}
    rounds |= {"getClientList": needed.client_list}
    if signed:
        rounds |= {"pushListSign": needed.push_sign, "getListSign": needed.get_sign}
    return {**rounds, REPORTS_ROUND: needed.reconstruct}


def ledger_shape(settings: Settings, layout: Layout) -> Shape:
    """Measure the ledger: as many slots as the budget allows and the clients can use.

    It lists as many clients as there are places: more than the quorum can be counted after Redis has lost data.
    """
    places = settings.round.start_fl_job_threshold
    slot_size = update_limit(layout)
    wanted = min(MOST_SLOTS, 2 * places)
    slots = max(LEAST_SLOTS, min(wanted, settings.fedcore.ledger.memory_budget // slot_size))
    return Shape.of(layout, settings.fl_name, places, slots, slot_size)


def update_limit(layout: Layout) -> int:
    """Return the longest body of an updateModel: all weights, their names, and room for everything else."""
    names = sum(2 * len(weight.name.encode()) + 128 for weight in layout)
    return 4 * layout.total_floats + names + 256 * 1024


def slow_masks(settings: Settings, layout: Layout, compiled: bool) -> str | None:
    """Return what an operator should know of sparse uploads if the C extension is missing, None for nothing.

    Args:
        settings: those in force.
        layout: the model's.
        compiled: whether the extension is there.
    """
    sparse = settings.compression.upload_compress_type is UploadCompressType.DIFF_SPARSE_QUANT
    values = layout.total_floats
    if compiled or not sparse or values <= UNNOTICED_VALUES:
        return None
    return (
        f"the mask of sparse uploads takes about {values * PLAIN_MASK_S:.1f} s of each iteration, as this installation "
        "has no C extension: use a wheel that was built on a machine like this one, with gcc and python3-dev"
    )
