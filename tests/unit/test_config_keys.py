"""Every key of the file: type, range, default, need and exact messages, against a table typed by hand."""

from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedcore.config import KEYS, Address, LoadedSettings, Role, load_settings
from fedcore.config.settings import LogLevel, MaskLayout, NormAction, RedisTls, SumDevice
from fedcore.errors import ConfigError
from fedcore.pki.clients import ClientCertificates

U32 = "[1,4294967295]"
POSITIVE = ">0.000000"
SHARE = "(0.000000,1.000000]"
REQUIRED = object()
FILES = "not empty"  # a required string

# path, type in the file, range as messages print it or list of choices, default
TABLE: list[tuple[str, str, Any, Any]] = [
    ("fl_name", "str", FILES, REQUIRED),
    ("fl_iteration_num", "int", U32, REQUIRED),
    ("server_mode", "str", ["FEDERATED_LEARNING", "HYBRID_TRAINING", "CLOUD_TRAINING"], REQUIRED),
    ("enable_ssl", "bool", None, REQUIRED),
    ("aggregation.aggregation_type", "str", ["FedAvg", "FedProx", "Scaffold", "FedNova"], "FedAvg"),
    ("aggregation.iid_rate", "float", SHARE, 0.0),
    ("aggregation.total_client_num", "int", U32, 1),
    ("distributed_cache.type", "str", None, ""),
    ("distributed_cache.address", "str", "address", REQUIRED),
    ("distributed_cache.plugin_lib_path", "str", None, ""),
    ("distributed_cache.cacert_filename", "str", None, ""),
    ("distributed_cache.capath", "str", None, ""),
    ("distributed_cache.cert_filename", "str", None, ""),
    ("distributed_cache.private_key_filename", "str", None, ""),
    ("distributed_cache.server_name", "str", None, ""),
    ("ssl.server_cert_path", "str", FILES, REQUIRED),
    ("ssl.client_cert_path", "str", FILES, REQUIRED),
    ("ssl.ca_cert_path", "str", FILES, REQUIRED),
    ("ssl.crl_path", "str", None, ""),
    ("ssl.cipher_list", "str", FILES, REQUIRED),
    ("ssl.cert_expire_warning_time_in_day", "int", "[7,180]", 90),
    ("round.start_fl_job_threshold", "int", U32, REQUIRED),
    ("round.start_fl_job_time_window", "int", U32, REQUIRED),
    ("round.update_model_ratio", "float", SHARE, REQUIRED),
    ("round.update_model_time_window", "int", U32, REQUIRED),
    ("round.global_iteration_time_window", "int", U32, REQUIRED),
    ("summary.participation_time_level", "str", "levels", (5, 15)),
    ("summary.continuous_failure_times", "int", ">=1", 10),
    ("summary.metrics_file", "str", FILES, REQUIRED),
    ("summary.failure_event_file", "str", FILES, REQUIRED),
    ("summary.data_rate_dir", "str", None, ""),
    ("unsupervised.cluster_client_num", "int", ">=1", 0),
    (
        "unsupervised.eval_type",
        "str",
        ["NOT_EVAL", "SILHOUETTE_SCORE", "CALINSKI_HARABASZ_SCORE", "DAVIES_BOULDIN_SCORE"],
        "NOT_EVAL",
    ),
    (
        "encrypt.encrypt_type",
        "str",
        ["NOT_ENCRYPT", "PW_ENCRYPT", "STABLE_PW_ENCRYPT", "DP_ENCRYPT", "SIGNDS"],
        "NOT_ENCRYPT",
    ),
    ("encrypt.pw_encrypt.share_secrets_ratio", "float", SHARE, REQUIRED),
    ("encrypt.pw_encrypt.cipher_time_window", "int", U32, REQUIRED),
    ("encrypt.pw_encrypt.reconstruct_secrets_threshold", "int", U32, REQUIRED),
    ("encrypt.dp_encrypt.dp_eps", "float", POSITIVE, 50.0),
    ("encrypt.dp_encrypt.dp_delta", "float", "(0.000000,1.000000)", 0.01),
    ("encrypt.dp_encrypt.dp_norm_clip", "float", POSITIVE, 1.0),
    ("encrypt.signds.sign_k", "float", "(0.000000,0.250000]", 0.01),
    ("encrypt.signds.sign_eps", "float", "(0.000000,100.000000]", 100.0),
    ("encrypt.signds.sign_thr_ratio", "float", "[0.500000,1.000000]", 0.6),
    ("encrypt.signds.sign_global_lr", "float", POSITIVE, 0.1),
    ("encrypt.signds.sign_dim_out", "int", "[0,50]", 0),
    ("compression.upload_compress_type", "str", ["NO_COMPRESS", "DIFF_SPARSE_QUANT"], "NO_COMPRESS"),
    ("compression.upload_sparse_rate", "float", SHARE, 0.4),
    ("compression.download_compress_type", "str", ["NO_COMPRESS", "QUANT"], "NO_COMPRESS"),
    ("client_verify.pki_verify", "bool", None, False),
    ("client_verify.root_first_ca_path", "str", None, ""),
    ("client_verify.root_second_ca_path", "str", None, ""),
    ("client_verify.equip_crl_path", "str", None, ""),
    ("client_verify.replay_attack_time_diff", "int", ">=0", 600000),
    ("client.http_url_prefix", "str", "url", ""),
    ("client.client_epoch_num", "int", ">=1", 25),
    ("client.client_batch_size", "int", ">=1", 32),
    ("client.client_learning_rate", "float", POSITIVE, 0.001),
    ("client.connection_num", "int", ">=1", 10000),
    ("fedcore.redis.username", "str", None, ""),
    ("fedcore.redis.password_file", "str", None, ""),
    ("fedcore.redis.database", "int", "[0,65535]", 0),
    ("fedcore.redis.sentinels", "str", "addresses", ()),
    ("fedcore.redis.sentinel_master", "str", None, "fl"),
    ("fedcore.redis.sentinel_username", "str", None, ""),
    ("fedcore.redis.sentinel_password_file", "str", None, ""),
    ("fedcore.redis.tls", "switch", ["auto", "on", "off"], RedisTls.AUTO),
    ("fedcore.redis.connect_timeout", "float", "(0.000000,60.000000]", 3.0),
    ("fedcore.redis.reply_timeout", "float", "(0.000000,60.000000]", 5.0),
    ("fedcore.scheduler.manage_address", "str", "address", Address("127.0.0.1", 11202)),
    ("fedcore.scheduler.admin_address", "str", "address", Address("127.0.0.1", 11302)),
    ("fedcore.scheduler.integer_code", "bool", None, False),
    ("fedcore.scheduler.token_file", "str", None, ""),
    ("fedcore.scheduler.unauthenticated", "bool", None, False),
    (
        "fedcore.scheduler.client_certificates",
        "str",
        ["none", "asked", "required"],
        ClientCertificates.NONE,
    ),
    ("fedcore.scheduler.client_ca_path", "str", None, ""),
    ("fedcore.server.http_address", "str", "address", Address("127.0.0.1", 6666)),
    ("fedcore.server.tcp_ip", "str", "host", ""),
    ("fedcore.server.tcp_port", "int", "[1,65535]", 6766),
    ("fedcore.server.admin_address", "str", "address", Address("127.0.0.1", 6866)),
    ("fedcore.server.checkpoint_dir", "str", None, "./fl_ckpt"),
    ("fedcore.server.model", "str", None, ""),
    ("fedcore.server.ledger_dir", "str", None, ""),
    ("fedcore.worker.trainer", "str", None, ""),
    ("fedcore.worker.options", "str", None, ()),
    ("fedcore.worker.sync_frequency", "int", "[1,4294967295]", 10),
    ("fedcore.worker.device", "str", None, "auto"),
    ("fedcore.worker.reply_timeout", "float", "(0.000000,600.000000]", 30.0),
    ("fedcore.worker.admin_address", "str", "address", Address("127.0.0.1", 6966)),
    ("fedcore.node.tls", "bool", None, True),
    ("fedcore.node.tls_names", "str", None, ()),
    ("fedcore.node.allow", "str", None, ("127.0.0.0/8", "::1/128")),
    ("fedcore.node.worker_http", "bool", None, False),
    ("fedcore.device.hold_time", "float", "[0.000000,60.000000]", 8.0),
    ("fedcore.device.header_timeout", "float", "(0.000000,600.000000]", 10.0),
    ("fedcore.device.body_timeout", "float", "(0.000000,3600.000000]", 60.0),
    ("fedcore.device.min_body_rate", "int", "[0,1000000000]", 1024),
    ("fedcore.device.idle_timeout", "float", "(0.000000,3600.000000]", 50.0),
    ("fedcore.device.max_connections", "int", "[1,1000000]", 20000),
    ("fedcore.device.connections_per_address", "int", "[0,1000000]", 0),
    ("fedcore.device.request_rate", "float", "[0.000000,1000000.000000]", 0.0),
    ("fedcore.device.request_burst", "int", "[1,1000000]", 20),
    ("fedcore.device.retry_margin", "float", "[0.100000,3600.000000]", 5.0),
    ("fedcore.device.proxies", "str", None, ()),
    (
        "fedcore.device.client_certificates",
        "str",
        ["none", "asked", "required"],
        ClientCertificates.NONE,
    ),
    ("fedcore.device.client_ca_path", "str", None, ""),
    ("fedcore.device.crl_required", "bool", None, False),
    ("fedcore.update.norm_bound", "float", ">=0.000000", 0.0),
    ("fedcore.update.norm_action", "str", ["refuse", "clip", "count"], NormAction.REFUSE),
    ("fedcore.update.max_data_size", "int", "[1,65535]", 65535),
    ("fedcore.update.unsigned_signds", "bool", None, True),
    ("fedcore.ledger.memory_budget", "size", "[1048576,1125899906842624]", 1 << 30),
    ("fedcore.ledger.fsync", "bool", None, False),
    ("fedcore.aggregation.device", "str", ["auto", "cpu", "cuda"], SumDevice.CPU),
    ("fedcore.secure_aggregation.mask_layout", "str", ["contiguous", "per_layer"], MaskLayout.CONTIGUOUS),
    ("fedcore.log.level", "str", ["debug", "info", "warn", "error"], LogLevel.INFO),
]
SERVER_ONLY = ("round.", "summary.", "unsupervised.", "encrypt.", "compression.", "client_verify.", "client.")
EXAMPLES: dict[str, Any] = {
    "fl_name": "lenet",
    "fl_iteration_num": 25,
    "server_mode": "FEDERATED_LEARNING",
    "enable_ssl": False,
    "distributed_cache.address": "127.0.0.1:6379",
    "round.start_fl_job_threshold": 2,
    "round.start_fl_job_time_window": 30000,
    "round.update_model_ratio": 1.0,
    "round.update_model_time_window": 30000,
    "round.global_iteration_time_window": 600000,
    "summary.metrics_file": "metrics.json",
    "summary.failure_event_file": "event.txt",
}
TLS_EXAMPLES = {
    f"ssl.{name}": name for name in ("server_cert_path", "client_cert_path", "ca_cert_path", "cipher_list")
} | {"fedcore.redis.tls": "off"}
MASK_EXAMPLES = {
    "encrypt.pw_encrypt.share_secrets_ratio": 1.0,
    "encrypt.pw_encrypt.cipher_time_window": 3000,
    "encrypt.pw_encrypt.reconstruct_secrets_threshold": 1,
}
OF_TYPE: dict[str, Any] = {"int": 7, "float": 0.75, "bool": True, "str": "text", "dict": {"a": 1}}
ACCEPTED = {
    "int": {"int"},
    "float": {"int", "float"},
    "bool": {"bool"},
    "str": {"str"},
    "size": {"int", "str"},
    "switch": {"str", "bool"},
}

Load = Callable[..., LoadedSettings]


def in_force(path: str) -> dict[str, Any]:
    """A good configuration in which the key at path is read."""
    flat = dict(EXAMPLES)
    if path.startswith("ssl.") or path.endswith(".client_certificates"):
        flat |= {"enable_ssl": True, **TLS_EXAMPLES}
    if path.startswith("encrypt.pw_encrypt."):
        flat |= {"encrypt.encrypt_type": "PW_ENCRYPT", **MASK_EXAMPLES}
    if path.startswith("encrypt.dp_encrypt."):
        flat["encrypt.encrypt_type"] = "DP_ENCRYPT"
    if path.startswith("encrypt.signds."):
        flat["encrypt.encrypt_type"] = "SIGNDS"
    if path == "fedcore.redis.tls":
        flat["distributed_cache.cacert_filename"] = "ca.crt"
    if path == "unsupervised.eval_type":
        flat["unsupervised.cluster_client_num"] = 10
    return flat


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "fl.yaml"


@pytest.fixture
def load(file: Path) -> Load:
    """Loads a flat configuration; its dotted keys are written as nested mappings."""

    def do(flat: dict[str, Any], role: Role = Role.SERVER) -> LoadedSettings:
        tree: dict[str, Any] = {}
        for path, value in flat.items():
            *parents, last = path.split(".")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        file.write_text(yaml.safe_dump(tree, sort_keys=False))
        return load_settings(file, role)

    return do


def refusal(load: Load, flat: dict[str, Any], role: Role = Role.SERVER) -> str:
    with pytest.raises(ConfigError) as caught:
        load(flat, role)
    return str(caught.value)


def rows(*kinds: str) -> list[Any]:
    return [pytest.param(*row, id=row[0]) for row in TABLE if not kinds or row[1] in kinds]


def numbers(limits: str) -> tuple[list[float], list[float]]:
    """Values just inside and just outside of a range, at both ends."""
    if limits.startswith(">"):
        open_end, low, high, high_open = limits[1] != "=", limits.lstrip(">="), None, False
    else:
        open_end, high_open = limits[0] == "(", limits[-1] == ")"
        low, high = limits[1:-1].split(",")
    step = 0.001 if "." in low else 1
    number = float if "." in low else int
    inside = [number(low) + step] if open_end else [number(low), number(low) + step]
    outside = [number(low)] if open_end else []
    outside.append(number(low) - step)
    if high is not None:
        inside += [number(high) - step] if high_open else [number(high), number(high) - step]
        outside += [number(high) + step] + ([number(high)] if high_open else [])
    return inside, outside


def range_message(path: str, limits: str, value: float, file: Path) -> str:
    if limits.startswith(">"):
        words = f"value is expected {limits}"
    elif limits.endswith(")"):
        words = f"expect value to be range of {limits}"
    elif limits.startswith("("):
        words = f"value is expected value to be range of {limits}"
    else:
        words = f"value is expected to be range of {limits}"
    got = f"{value:.6f}" if isinstance(value, float) else str(value)
    return f"Failed to check value of parameter '{path}': {words}, but got {got}, yaml config file: {file}"


def test_the_table_lists_all_keys_in_reading_order() -> None:
    assert [row[0] for row in TABLE] == [key.path for key in KEYS]


def test_defaults(load: Load) -> None:
    loaded = load(EXAMPLES)
    assert loaded.warnings == ()
    for path, _, _, default in TABLE:
        if default is not REQUIRED:
            assert attrgetter(path)(loaded.settings) == default, path


@pytest.mark.parametrize(("path", "kind", "limits", "default"), rows())
def test_wrong_types(path: str, kind: str, limits: Any, default: Any, load: Load, file: Path) -> None:
    for given, value in OF_TYPE.items():
        if given not in ACCEPTED[kind]:
            wanted = {"size": "int", "switch": "str"}.get(kind, kind)
            stray = "<< " if wanted == "str" else ""
            message = (
                f"The parameter '{path}' is expected to be type {wanted}, "
                f"actually {stray}{given}, yaml config file: {file}"
            )
            if limits == "levels":
                assert load(in_force(path) | {path: value}).warnings == (f"{message}; 5,15 is used",)
            else:
                assert refusal(load, in_force(path) | {path: value}) == message


@pytest.mark.parametrize(("path", "kind", "limits", "default"), rows("int", "float", "size"))
def test_ranges(path: str, kind: str, limits: Any, default: Any, load: Load, file: Path) -> None:
    inside, outside = numbers(limits)
    for value in inside:
        assert attrgetter(path)(load(in_force(path) | {path: value}).settings) == value
    for value in outside:
        assert refusal(load, in_force(path) | {path: value}) == range_message(path, limits, value, file)


@pytest.mark.parametrize(("path", "kind", "limits", "default"), rows("float"))
def test_floats_take_ints_and_exponents_but_nothing_endless(
    path: str, kind: str, limits: Any, default: Any, load: Load, file: Path
) -> None:
    flat = in_force(path)
    for value in (float("nan"), float("inf"), float("-inf")):
        assert refusal(load, flat | {path: value}) == range_message(path, limits, value, file)
    inside, _ = numbers(limits)
    load(flat | {path: inside[-1]})
    text = file.read_text()
    shown = f"{path.rpartition('.')[2]}: {inside[-1]}\n"
    assert shown in text
    file.write_text(text.replace(shown, f"{shown.rstrip()}e0\n"))
    value = attrgetter(path)(load_settings(file, Role.SERVER).settings)
    assert (type(value), value) == (float, inside[-1])


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("1E-3", 1e-3), ("+5.e-1", 0.5), (".5e+0", 0.5), ("1e0", 1.0)]
)
def test_exponents(text: str, value: float, load: Load, file: Path) -> None:
    load(EXAMPLES)
    file.write_text(file.read_text().replace("update_model_ratio: 1.0", f"update_model_ratio: {text}"))
    assert load_settings(file, Role.SERVER).settings.round.update_model_ratio == value


def test_a_quoted_exponent_is_a_string(load: Load, file: Path) -> None:
    load(EXAMPLES)
    file.write_text(file.read_text().replace("update_model_ratio: 1.0", "update_model_ratio: '1e-3'"))
    with pytest.raises(ConfigError) as caught:
        load_settings(file, Role.SERVER)
    assert str(caught.value) == (
        f"The parameter 'round.update_model_ratio' is expected to be type float, actually str, yaml config file: {file}"
    )


def test_ints_are_good_floats(load: Load) -> None:
    value = load(EXAMPLES | {"round.update_model_ratio": 1}).settings.round.update_model_ratio
    assert (type(value), value) == (float, 1.0)


@pytest.mark.parametrize("value", [1e-50, 1e39])
def test_numbers_beyond_single_precision_are_out_of_range(load: Load, value: float) -> None:
    assert "value is expected >0.000000, but got" in refusal(
        load, EXAMPLES | {"client.client_learning_rate": value}
    )


def required_rows() -> list[Any]:
    return [pytest.param(path, kind, id=path) for path, kind, _, default in TABLE if default is REQUIRED]


@pytest.mark.parametrize(("path", "kind"), required_rows())
def test_missing(path: str, kind: str, load: Load, file: Path) -> None:
    flat = in_force(path)
    message = f"The parameter '{path}' is missing, yaml config file: {file}"
    assert refusal(load, {key: value for key, value in flat.items() if key != path}) == message
    if kind == "str":
        assert refusal(load, flat | {path: ""}) == message
    if not path.startswith(SERVER_ONLY):
        assert (
            refusal(load, {key: value for key, value in flat.items() if key != path}, Role.SCHEDULER)
            == message
        )


@pytest.mark.parametrize("nothing", [None, [], [1], {}])
@pytest.mark.parametrize("path", ["fl_name", "round.update_model_ratio"])
def test_nulls_and_lists_count_as_missing(path: str, nothing: Any, load: Load, file: Path) -> None:
    first, *others = refusal(load, EXAMPLES | {path: nothing}).splitlines()
    if nothing == {}:
        assert "actually" in first and "dict" in first
    else:
        kind = "null" if nothing is None else "list"
        assert first == f"The parameter '{path}' is missing, yaml config file: {file}"
        assert len(others) == 1
        assert others[0].startswith(f"warning: The parameter '{path}' in line ")
        assert others[0].endswith(f" is a {kind} and counts as missing, yaml config file: {file}")


@pytest.mark.parametrize("path", [row[0] for row in TABLE if row[3] is not REQUIRED])
def test_optional_nulls_give_the_default_and_a_warning(path: str, load: Load) -> None:
    loaded = load(in_force(path) | {path: None})
    assert attrgetter(path)(loaded.settings) == next(row[3] for row in TABLE if row[0] == path)
    assert [w for w in loaded.warnings if f"'{path}'" in w and "is a null and counts as missing" in w]


@pytest.mark.parametrize(("path", "kind", "limits", "default"), rows("str"))
def test_optional_empty_strings_mean_the_default(
    path: str, kind: str, limits: Any, default: Any, load: Load
) -> None:
    if default is not REQUIRED:
        assert attrgetter(path)(load(in_force(path) | {path: ""}).settings) == default


@pytest.mark.parametrize(
    ("path", "choices"),
    [pytest.param(row[0], row[2], id=row[0]) for row in TABLE if isinstance(row[2], list)],
)
def test_choices(path: str, choices: list[str], load: Load, file: Path) -> None:
    flat = in_force(path) | MASK_EXAMPLES
    for choice in choices:
        assert attrgetter(path)(load(flat | {path: choice}).settings).value == choice
    for value in ("text", choices[0].swapcase(), choices[0] + " "):
        message = (
            f"The value of parameter '{path}' can be only one of [const vector][{', '.join(choices)}], "
            f"but got {value}, yaml config file: {file}"
        )
        if path == "server_mode":
            message = (
                f"{value} is invalid. Server mode must be FEDERATED_LEARNING, HYBRID_TRAINING, CLOUD_TRAINING"
            )
        assert refusal(load, flat | {path: value}) == message


@pytest.mark.parametrize(("path", "kind", "limits", "default"), rows("str"))
def test_addresses(path: str, kind: str, limits: Any, default: Any, load: Load, file: Path) -> None:
    if limits != "address":
        return
    good = load(EXAMPLES | {path: "[::1]:80"}).settings
    assert attrgetter(path)(good) == Address("::1", 80)
    message = refusal(load, EXAMPLES | {path: "300.1.1.1:80"})
    if path.startswith("fedcore."):
        assert message == (
            f"Failed to check value of parameter '{path}': The format of http server address '300.1.1.1:80' is "
            f"invalid, yaml config file: {file}"
        )
    else:
        assert message == "The format of distributed cache address '300.1.1.1:80' is invalid"


def test_several_addresses(load: Load, file: Path) -> None:
    def sentinels(text: str) -> Any:
        return load(EXAMPLES | {"fedcore.redis.sentinels": text}).settings.fedcore.redis.sentinels

    assert sentinels("s1:26379") == (Address("s1", 26379),)
    assert sentinels("s1:26379, [::1]:26380") == (Address("s1", 26379), Address("::1", 26380))
    for bad in ("s1", "s1:1,", "s1:1;s2:2", "s1:1,unix:/run/s"):
        assert refusal(load, EXAMPLES | {"fedcore.redis.sentinels": bad}).startswith(
            "Failed to check value of parameter 'fedcore.redis.sentinels': The format of distributed cache address "
        )


@pytest.mark.parametrize(
    ("written", "meant"),
    [("on", "on"), ("off", "off"), ("auto", "auto"), ("'on'", "on"), ("Yes", "on"), ("false", "off")],
)
def test_a_bare_on_is_no_truth_value(written: str, meant: str, load: Load, file: Path) -> None:
    load(EXAMPLES | {"distributed_cache.cacert_filename": "ca", "fedcore.redis.tls": "auto"})
    file.write_text(file.read_text().replace("tls: auto", f"tls: {written}"))
    assert load_settings(file, Role.SERVER).settings.fedcore.redis.tls.value == meant


def test_tcp_ip(load: Load, file: Path) -> None:
    assert load(EXAMPLES | {"fedcore.server.tcp_ip": "[fd00::1]"}).settings.fedcore.server.tcp_ip == "fd00::1"
    assert refusal(load, EXAMPLES | {"fedcore.server.tcp_ip": "10.0.0.1:80"}) == (
        "Failed to check value of parameter 'fedcore.server.tcp_ip': The tcp server ip:10.0.0.1:80 is illegal!, "
        f"yaml config file: {file}"
    )


@pytest.mark.parametrize("prefix", ["/", "/fl/", "/a-b/c.d/~x/%20", "/fl"])
def test_url_prefix(prefix: str, load: Load) -> None:
    assert load(EXAMPLES | {"client.http_url_prefix": prefix}).settings.client.http_url_prefix == prefix


@pytest.mark.parametrize("prefix", ["fl", "http://a/", "/a b", "/a?b", "/é"])
def test_bad_url_prefix(prefix: str, load: Load) -> None:
    assert (
        refusal(load, EXAMPLES | {"client.http_url_prefix": prefix}) == f"The http url:{prefix} is illegal!"
    )


@pytest.mark.parametrize(("text", "levels"), [("1,2", (1, 2)), ("5,2880", (5, 2880)), ("30,60", (30, 60))])
def test_participation_levels(text: str, levels: tuple[int, int], load: Load) -> None:
    loaded = load(EXAMPLES | {"summary.participation_time_level": text})
    assert loaded.settings.summary.participation_time_level == levels
    assert loaded.warnings == ()


@pytest.mark.parametrize(
    "text", ["5", "5,", ",5", "0,5", "5,5", "6,5", "5,2881", "1,2,3", "a,b", "1.5,2", "-1,5"]
)
def test_bad_participation_levels_warn(text: str, load: Load, file: Path) -> None:
    loaded = load(EXAMPLES | {"summary.participation_time_level": text})
    assert loaded.settings.summary.participation_time_level == (5, 15)
    assert loaded.warnings == (
        "Failed to check value of parameter 'summary.participation_time_level': value is expected to be minutes "
        f"a,b with 1 <= a < b <= 2880, but got {text}, yaml config file: {file}; 5,15 is used",
    )


@pytest.mark.parametrize(
    ("text", "size"), [("512MiB", 512 << 20), ("1 GiB", 1 << 30), ("2048KiB", 2 << 20), ("1TiB", 1 << 40),
                       ("1048576", 1 << 20), ("1048576B", 1 << 20)]
)  # fmt: skip
def test_sizes(text: str, size: int, load: Load) -> None:
    assert (
        load(EXAMPLES | {"fedcore.ledger.memory_budget": text}).settings.fedcore.ledger.memory_budget == size
    )


@pytest.mark.parametrize("text", ["", "MiB", "512MB", "512mib", "1.5GiB", "-1GiB", "1" * 13 + "B", "١GiB"])
def test_bad_sizes(text: str, load: Load, file: Path) -> None:
    assert refusal(load, EXAMPLES | {"fedcore.ledger.memory_budget": text}) == (
        "Failed to check value of parameter 'fedcore.ledger.memory_budget': value is expected to be bytes, such as "
        f"536870912 or 512MiB, but got {text}, yaml config file: {file}"
    )


def test_a_size_out_of_range(load: Load, file: Path) -> None:
    assert refusal(load, EXAMPLES | {"fedcore.ledger.memory_budget": "1KiB"}) == (
        "Failed to check value of parameter 'fedcore.ledger.memory_budget': value is expected to be range of "
        f"[1048576,1125899906842624], but got 1024, yaml config file: {file}"
    )


def test_unsupervised_evaluation_needs_a_number_of_clients(load: Load) -> None:
    message = refusal(load, EXAMPLES | {"unsupervised.eval_type": "SILHOUETTE_SCORE"})
    assert message == "Cluster client num is <= 0 when unsupervised eval mode is opened."


@pytest.mark.parametrize("section", ["scheduler", "device"])
def test_certificates_of_clients_need_tls(load: Load, section: str) -> None:
    path = f"fedcore.{section}.client_certificates"
    assert refusal(load, EXAMPLES | {path: "asked"}).startswith(f"{path} is asked, which needs TLS")
    assert load(EXAMPLES | {path: "none"})


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ()),
        ("MindSporeFederated", ("mindsporefederated",)),
        ("a.example , [fd00::1]", ("a.example", "fd00::1")),
    ],
)
def test_names_for_all_nodes(load: Load, text: str, names: tuple[str, ...]) -> None:
    assert load(EXAMPLES | {"fedcore.node.tls_names": text}).settings.fedcore.node.tls_names == names
    assert "a b is no host name" in refusal(load, EXAMPLES | {"fedcore.node.tls_names": "x,a b"})
