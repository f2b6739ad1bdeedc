"""Whole files: the published guide, the sample, all faults at once, warnings, broken and random YAML."""
# ruff: noqa: E501 - messages are easier to compare unbroken

import re
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.config import (
    KEYS,
    Address,
    AggregationType,
    EncryptType,
    EvalType,
    LoadedSettings,
    Role,
    ServerMode,
    Settings,
    UnixAddress,
    UploadCompressType,
    hyper_parameters,
    load_settings,
    unsupported,
)
from fedcore.config.crosscheck import redis_has_tls
from fedcore.config.sample import render_sample, value_text
from fedcore.config.settings import SECTIONS, UnsupervisedSettings
from fedcore.config.support import MOST_COMPARED, SERVED, reduced
from fedcore.errors import ConfigError

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "tests/data/guide.yaml"
SAMPLE = ROOT / "etc/fl.yaml.sample"

Load = Callable[..., LoadedSettings]
CA = ('plugin_lib_path: ""', 'plugin_lib_path: ""\n  cacert_filename: ca.crt')


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "fl.yaml"


@pytest.fixture
def load(file: Path) -> Load:
    """Loads the guide's file after replacements of text."""

    def do(*changes: tuple[str, str], role: Role = Role.SERVER) -> LoadedSettings:
        text = GUIDE.read_text()
        for old, new in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        file.write_text(text)
        return load_settings(file, role)

    return do


def refusal(file: Path, text: str | bytes | None, role: Role = Role.SERVER) -> str:
    if text is not None:
        file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as caught:
        load_settings(file, role)
    return str(caught.value)


def refusal_of(load: Load, *changes: tuple[str, str], role: Role = Role.SERVER) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*changes, role=role)
    return str(caught.value)


# --- the guide's file and the sample ---


@pytest.mark.parametrize("role", [Role.SERVER, Role.WORKER])
def test_the_guides_file_serves(role: Role) -> None:
    loaded = load_settings(GUIDE, role)
    config = loaded.settings
    assert (config.fl_name, config.fl_iteration_num) == ("Lenet", 25)
    assert config.server_mode is ServerMode.FEDERATED_LEARNING
    assert config.distributed_cache.address == Address("127.0.0.1", 23456)
    assert config.round.start_fl_job_threshold == 2
    assert config.round.global_iteration_time_window == 60000
    assert config.client.client_epoch_num == 20
    assert config.summary.data_rate_dir == ".."
    assert loaded.warnings == ()
    assert unsupported(config, role) == []


@pytest.mark.parametrize("kind", EvalType)
@pytest.mark.parametrize("clients", [MOST_COMPARED, MOST_COMPARED + 1])
def test_comparing_every_pair_of_too_many_clients_is_a_warning(kind: EvalType, clients: int) -> None:
    config = Settings(unsupervised=UnsupervisedSettings(clients, kind))
    warned = kind is EvalType.SILHOUETTE_SCORE and clients > MOST_COMPARED
    found = reduced(config, Role.SERVER)
    assert len(found) == int(warned)
    assert not warned or "unsupervised.cluster_client_num" in found[0]
    assert reduced(config, Role.SCHEDULER) == []


def test_a_scheduler_reads_only_what_concerns_it() -> None:
    loaded = load_settings(GUIDE, Role.SCHEDULER)
    assert loaded.settings.fl_name == "Lenet"
    assert loaded.settings.round == Settings().round
    assert loaded.settings.summary == Settings().summary
    assert loaded.warnings == ()


def test_a_scheduler_does_not_mind_the_servers_sections(file: Path) -> None:
    text = GUIDE.read_text().partition("round:")[0] + "round: {start_fl_job_threshold: many}\n"
    file.write_text(text)
    assert load_settings(file, Role.SCHEDULER).warnings == ()


@pytest.mark.parametrize("role", Role)
def test_the_sample_loads(role: Role) -> None:
    assert load_settings(SAMPLE, role).warnings == ()
    assert unsupported(load_settings(SAMPLE, role).settings, role) == []


def test_the_sample_is_up_to_date() -> None:
    assert SAMPLE.read_text() == render_sample(), "renew it as fedcore/config/sample.py says"


def test_the_sample_tells_no_default_that_may_not_be_given() -> None:
    text = render_sample()
    assert "# float, (0, 1], default none\n  #iid_rate: 1.0" in text
    assert "(0, 1], default 0.0" not in text


def test_the_sample_sets_nothing_but_what_is_required() -> None:
    lines = [line for line in SAMPLE.read_text().splitlines() if re.match(r" *[a-z_]+: ", line)]
    names = {key.path.rpartition(".")[2] for key in KEYS if key.option.required and not key.condition}
    assert {line.split(":")[0].strip() for line in lines} == names


def test_the_sample_shows_every_option_and_its_default(file: Path) -> None:
    text = re.sub(r"(?m)^( *)#(\w+: )", r"\1\2", SAMPLE.read_text())
    tree = yaml.safe_load(text)
    config = Settings()
    for key in KEYS:
        node: Any = tree
        for part in key.path.split("."):
            node = node[part]
        if key.option.example is None:
            shown = node if key.option.kind.value != "size" else int(node.removesuffix("MiB")) << 20
            default = attrgetter(key.path)(config)
            assert shown == (default if isinstance(default, int | float | str) else yaml.safe_load(
                value_text(key.option, default)
            )), key.path  # fmt: skip
    file.write_text(text.replace("enable_ssl: false", "enable_ssl: true").replace("tls: auto", "tls: off"))
    loaded = load_settings(file, Role.SERVER)
    assert loaded.warnings == ()
    assert loaded.settings.ssl.server_cert_path == "/etc/fl/server.p12"


def test_every_key_is_explained() -> None:
    for key in KEYS:
        assert key.option.help.endswith("."), key.path
        in_time = key.path.endswith(("window", "timeout", "hold_time", "time_diff"))
        assert key.option.unit or not in_time, key.path


# --- faults and warnings ---


def test_all_faults_at_once_in_reading_order(file: Path) -> None:
    faults = refusal(
        file, "server_mode: x\nfl_iteration_num: 0\nenable_ssl: 1\nfedcore: {log: {level: loud}}\n"
    )
    lines = faults.splitlines()
    assert lines[:5] == [
        f"The parameter 'fl_name' is missing, yaml config file: {file}",
        f"Failed to check value of parameter 'fl_iteration_num': value is expected to be range of [1,4294967295], "
        f"but got 0, yaml config file: {file}",
        "x is invalid. Server mode must be FEDERATED_LEARNING, HYBRID_TRAINING, CLOUD_TRAINING",
        f"The parameter 'enable_ssl' is expected to be type bool, actually int, yaml config file: {file}",
        f"The parameter 'distributed_cache.address' is missing, yaml config file: {file}",
    ]
    assert lines[-1] == (
        f"The value of parameter 'fedcore.log.level' can be only one of [const vector][debug, info, warn, error], "
        f"but got loud, yaml config file: {file}"
    )
    assert len(lines) == 13


def test_one_fault_is_one_line(file: Path) -> None:
    text = GUIDE.read_text().replace("server_mode: FEDERATED_LEARNING", 'server_mode: "a\\nb\\u2028\\e[1m"')
    assert refusal(file, text).splitlines() == [
        r"a\nb\u2028\x1b[1m is invalid. Server mode must be FEDERATED_LEARNING, HYBRID_TRAINING, CLOUD_TRAINING"
    ]


@pytest.mark.parametrize(
    ("old", "new", "name", "nearest"),
    [
        ("  data_rate_dir:", "  data_rate_dri:", "summary.data_rate_dri", "summary.data_rate_dir"),
        ("unsupervised:", "unsupervized:", "unsupervized", "unsupervised"),
        (
            "enable_ssl: False",
            "enable_ssl: False\neval_type: NOT_EVAL",
            "eval_type",
            "unsupervised.eval_type",
        ),
        ("  sign_k: 0.01", "  sig_k: 0.01", "encrypt.signds.sig_k", "encrypt.signds.sign_k"),
        ("compression:", "compression:\n  ssl: {crl_path: a}", "compression.ssl", "ssl"),
        (
            "    dp_eps: 50.0",
            "    dp_epsilon: 50.0",
            "encrypt.dp_encrypt.dp_epsilon",
            "encrypt.dp_encrypt.dp_eps",
        ),
        (
            "fl_name: Lenet",
            "fl_name: Lenet\nclient_epoch_mum: 3",
            "client_epoch_mum",
            "client.client_epoch_num",
        ),
    ],
)
def test_unknown_keys_are_named_with_the_nearest(
    old: str, new: str, name: str, nearest: str, file: Path
) -> None:
    text = GUIDE.read_text().replace(old, new)
    file.write_text(text)
    (warning,) = (w for w in load_settings(file, Role.SERVER).warnings if "unknown" in w)
    line = next(n for n, row in enumerate(text.splitlines(), 1) if new.rpartition("\n")[2] in row)
    assert warning == (
        f"The parameter '{name}' in line {line} is unknown, did you mean '{nearest}'?, yaml config file: {file}"
    )


def test_a_key_like_no_other(load: Load, file: Path) -> None:
    assert load(("enable_ssl: False", "enable_ssl: False\nqqq: 1")).warnings[0] == (
        f"The parameter 'qqq' in line 6 is unknown and has no effect, yaml config file: {file}"
    )


def test_a_misspelt_required_key_is_told_with_the_fault(file: Path) -> None:
    text = GUIDE.read_text().replace("start_fl_job_threshold", "start_fl_job_treshold")
    assert refusal(file, text).splitlines() == [
        f"The parameter 'round.start_fl_job_threshold' is missing, yaml config file: {file}",
        "warning: The parameter 'round.start_fl_job_treshold' in line 13 is unknown, did you mean "
        f"'round.start_fl_job_threshold'?, yaml config file: {file}",
    ]


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize(
    ("own", "fault"),
    [
        (
            "{redsi: {connect_timeout: 1.0}}",
            "'fedcore.redsi' in line 80 is unknown, did you mean 'fedcore.redis'?",
        ),
        ("{redis: {timeout: 1}}", "'fedcore.redis.timeout' in line 80 is unknown"),
        ("{log: loud}", "'fedcore.log' in line 80 should hold a mapping and has no effect"),
        ("7", "'fedcore' in line 80 should hold a mapping and has no effect"),
        ("{1: 2}", "'fedcore.1' in line 80 is unknown and has no effect"),
    ],
)
def test_our_own_section_is_strict(own: str, fault: str, role: Role, file: Path) -> None:
    text = GUIDE.read_text() + f"fedcore: {own}\n"
    line = text.count("\n")
    assert refusal(file, text, role).startswith("The parameter " + fault.replace("line 80", f"line {line}"))


def test_empty_sections_are_silent(file: Path) -> None:
    file.write_text(GUIDE.read_text() + "aggregation:\nfedcore:\n")
    assert load_settings(file, Role.SERVER).warnings == ()


@pytest.mark.parametrize("value", ["5", "[a]", "text", "2020-01-01"])
def test_a_section_that_is_none(value: str, file: Path) -> None:
    file.write_text(GUIDE.read_text() + f"aggregation: {value}\n")
    (warning,) = (w for w in load_settings(file, Role.SERVER).warnings if "aggregation" in w)
    assert "should hold a mapping and has no effect" in warning


def test_equal_keys(load: Load, file: Path) -> None:
    loaded = load(("fl_name: Lenet", "fl_name: Other\nfl_name: Lenet"))
    assert loaded.settings.fl_name == "Lenet"
    assert loaded.warnings[0] == (
        f"The parameter 'fl_name' in line 3 is given again, the last value counts, yaml config file: {file}"
    )


def test_of_equal_sections_the_last_counts_alone(file: Path) -> None:
    file.write_text("round: {start_fl_job_threshold: 5}\n" + GUIDE.read_text())
    loaded = load_settings(file, Role.SERVER)
    assert loaded.settings.round.start_fl_job_threshold == 2
    assert "'round' in line 13 is given again" in loaded.warnings[0]


def test_dotted_names_do_as_well(file: Path) -> None:
    text = GUIDE.read_text() + "client.client_epoch_num: 3\nfedcore.log: {level: debug}\n"
    file.write_text(text)
    loaded = load_settings(file, Role.SERVER)
    assert loaded.settings.client.client_epoch_num == 3
    assert loaded.settings.fedcore.log.level == "debug"
    assert f"'client.client_epoch_num' in line {text.count(chr(10)) - 1} is given again" in loaded.warnings[0]


def test_merge_keys_and_aliases(file: Path) -> None:
    file.write_text(
        "fedcore:\n  redis: &r {connect_timeout: 1.0, reply_timeout: 2.0}\n" + GUIDE.read_text()
        + "aggregation: &a {total_client_num: 4, iid_rate: 0.5}\n"
    )  # fmt: skip
    text = file.read_text().replace("aggregation: &a {total", "aggregation: {<<: {iid_rate: 0.25}, total")
    file.write_text(text.replace(", iid_rate: 0.5}", "}"))
    loaded = load_settings(file, Role.SERVER)
    assert loaded.settings.aggregation.iid_rate == 0.25
    assert loaded.settings.aggregation.total_client_num == 4
    assert loaded.warnings == ()


def test_values_out_of_force_only_warn(load: Load, file: Path) -> None:
    loaded = load(("dp_eps: 50.0", "dp_eps: -1"), ("cert_expire_warning_time_in_day: 90", "crl_path: 1"))
    assert loaded.settings.encrypt.dp_encrypt.dp_eps == 50.0
    assert [w for w in loaded.warnings if "dp_eps" in w] == [
        "Failed to check value of parameter 'encrypt.dp_encrypt.dp_eps': value is expected >0.000000, but got "
        f"-1.000000, yaml config file: {file} (it would be read only if encrypt.encrypt_type is DP_ENCRYPT)"
    ]
    assert any(
        "'ssl.crl_path'" in w and "(it would be read only if enable_ssl is true)" in w
        for w in loaded.warnings
    )


def test_values_out_of_force_keep_their_defaults(load: Load) -> None:
    loaded = load(("cipher_time_window: 3000", "cipher_time_window: 4000"))
    assert loaded.settings.encrypt.pw_encrypt.cipher_time_window == 1
    assert loaded.settings.ssl.server_cert_path == ""
    masked = load(("encrypt_type: NOT_ENCRYPT", "encrypt_type: PW_ENCRYPT"))
    assert masked.settings.encrypt.pw_encrypt.cipher_time_window == 3000


def test_tls_is_read_when_it_is_on(load: Load) -> None:
    loaded = load(("enable_ssl: False", "enable_ssl: True"), CA)
    assert loaded.settings.ssl.server_cert_path == "server.p12"
    assert unsupported(loaded.settings, Role.SERVER) == []


@pytest.mark.parametrize(
    ("enable_ssl", "tls", "address", "secured"),
    [
        ("False", "auto", "h:1", False),
        ("True", "auto", "h:1", True),
        ("False", "on", "h:1", True),
        ("True", "off", "h:1", False),
        ("True", "on", "unix:/run/redis.sock", False),
        ("True", "auto", "unix:/run/redis.sock", False),
    ],
)
def test_tls_to_redis(enable_ssl: str, tls: str, address: str, secured: bool, load: Load, file: Path) -> None:
    changes = [
        ("enable_ssl: False", f"enable_ssl: {enable_ssl}\nfedcore: {{redis: {{tls: {tls}}}}}"),
        ("127.0.0.1:23456", f'"{address}"'),
    ]
    assert redis_has_tls(load(*changes, CA).settings) is secured
    for role in Role:
        if secured:
            text = refusal_of(load, *changes, role=role)
            assert (
                "give distributed_cache.cacert_filename (or capath), or set fedcore.redis.tls to off" in text
            )
            assert text.startswith("enable_ssl" if tls == "auto" else "fedcore.redis.tls")
            assert text.endswith(f", yaml config file: {file}")
        else:
            load(*changes, role=role)
    warned = any("a unix socket, which is never encrypted" in text for text in load(*changes, CA).warnings)
    assert warned == (tls == "on" and not secured)


def test_a_sentinel_s_master_has_tls_whatever_the_address(load: Load) -> None:
    own = "enable_ssl: True\nfedcore: {redis: {sentinels: 's:1'}}"
    changes = [("enable_ssl: False", own), ("127.0.0.1:23456", '"unix:/run/redis.sock"'), CA]
    assert redis_has_tls(load(*changes).settings)


def test_certificate_and_key_belong_together(load: Load) -> None:
    switch, (old, new) = ("enable_ssl: False", "enable_ssl: True"), CA
    load(switch, (old, f"{new}\n  cert_filename: a\n  private_key_filename: b"))
    for name in ("cert_filename", "private_key_filename"):
        text = refusal_of(load, switch, (old, f"{new}\n  {name}: a"))
        assert (
            "distributed_cache.cert_filename and distributed_cache.private_key_filename belong together"
            in text
        )


def test_words_for_sentinels_without_sentinels(load: Load) -> None:
    def warnings(own: str) -> list[str]:
        loaded = load(("enable_ssl: False", f"enable_ssl: False\nfedcore: {{redis: {{{own}}}}}"))
        return [text for text in loaded.warnings if "have no effect without fedcore.redis.sentinels" in text]

    assert warnings("sentinel_username: fed")
    assert warnings("sentinel_password_file: /etc/fl/sentinel")
    assert not warnings("sentinel_username: fed, sentinels: 's:1'")


def test_redis_by_path(load: Load) -> None:
    loaded = load(("127.0.0.1:23456", '"unix:/run/redis.sock"'))
    assert loaded.settings.distributed_cache.address == UnixAddress("/run/redis.sock")


# --- several keys at once ---


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            [("global_iteration_time_window: 60000", "global_iteration_time_window: 59999")],
            "round.global_iteration_time_window is 59999 ms, shorter than its rounds' windows together, 60000 ms",
        ),
        (
            [("  start_fl_job_time_window: 30000", "  start_fl_job_time_window: 999")],
            "round.start_fl_job_time_window is 999 ms: MindSpore Federated rounds it down to 0 s, here it is kept",
        ),
        (
            [("start_fl_job_threshold: 2", "start_fl_job_threshold: 4294967295")],
            "need 4294967296 uploads in single precision, more than are selected",
        ),
        (
            [("NOT_ENCRYPT", "PW_ENCRYPT"), ("reconstruct_secrets_threshold: 1", "reconstruct_secrets_threshold: 2")],
            "encrypt.pw_encrypt.reconstruct_secrets_threshold 2 needs 3 clients, but 2 uploads complete",
        ),
        (
            [("NOT_ENCRYPT", "PW_ENCRYPT")],
            "shorter than its rounds' windows together, 78000 ms",
        ),
        (
            [("NOT_ENCRYPT", "PW_ENCRYPT"), ("enable_ssl: False", "enable_ssl: False\nfedcore: {update: {norm_bound: 1.0}}")],
            "fedcore.update.norm_bound measures weights, but with encrypt.encrypt_type PW_ENCRYPT servers see only masked",
        ),
        (
            [("enable_ssl: False", 'enable_ssl: False\nfedcore: {server: {tcp_ip: "0.0.0.0"}}')],
            "fedcore.server.tcp_ip 0.0.0.0 is announced to other nodes",
        ),
        (
            [("NOT_ENCRYPT", "SIGNDS"), ("upload_compress_type: NO_COMPRESS", "upload_compress_type: DIFF_SPARSE_QUANT")],
            "compression.upload_compress_type is set to NO_COMPRESS, as SIGNDS needs it",
        ),
    ],
)  # fmt: skip
def test_cross_checks_warn(changes: list[tuple[str, str]], text: str, load: Load) -> None:
    assert [warning for warning in load(*changes).warnings if text in warning]
    assert not [warning for warning in load(*changes, role=Role.SCHEDULER).warnings if text in warning]


def test_masks_and_signs_are_never_compressed(load: Load) -> None:
    sparse = ("upload_compress_type: NO_COMPRESS", "upload_compress_type: DIFF_SPARSE_QUANT")
    for protection, expected in (
        ("PW_ENCRYPT", UploadCompressType.NO_COMPRESS),
        ("SIGNDS", UploadCompressType.NO_COMPRESS),
        ("STABLE_PW_ENCRYPT", UploadCompressType.DIFF_SPARSE_QUANT),
        ("DP_ENCRYPT", UploadCompressType.DIFF_SPARSE_QUANT),
    ):
        loaded = load(sparse, ("encrypt_type: NOT_ENCRYPT", f"encrypt_type: {protection}"))
        assert loaded.settings.compression.upload_compress_type is expected


def test_cloud_workers_compress_nothing(load: Load) -> None:
    sparse = ("upload_compress_type: NO_COMPRESS", "upload_compress_type: DIFF_SPARSE_QUANT")
    loaded = load(sparse, ("server_mode: FEDERATED_LEARNING", "server_mode: CLOUD_TRAINING"))
    assert loaded.settings.compression.upload_compress_type is UploadCompressType.NO_COMPRESS
    assert (
        "compression.upload_compress_type is set to NO_COMPRESS, as CLOUD_TRAINING needs it"
        in loaded.warnings
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            [("NOT_ENCRYPT", "SIGNDS"), ("enable_ssl: False", "enable_ssl: False\nfedcore: {update: {norm_bound: 1.0}}")],
            "fedcore.update.norm_bound measures updates, but with encrypt.encrypt_type SIGNDS each moves the model",
        ),
        (
            [("NOT_ENCRYPT", "SIGNDS"), ("server_mode: FEDERATED_LEARNING", "server_mode: CLOUD_TRAINING")],
            "encrypt.encrypt_type SIGNDS is applied by devices, and with server_mode CLOUD_TRAINING cloud workers send",
        ),
        (
            [("NOT_ENCRYPT", "DP_ENCRYPT"), ("server_mode: FEDERATED_LEARNING", "server_mode: CLOUD_TRAINING")],
            "encrypt.encrypt_type DP_ENCRYPT is applied by devices, and with server_mode CLOUD_TRAINING cloud workers",
        ),
    ],
)  # fmt: skip
def test_a_protection_that_would_not_be_had_is_refused(
    changes: list[tuple[str, str]], text: str, load: Load
) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        load(*changes)
    load(*changes, role=Role.SCHEDULER)  # it reads none of these keys


@pytest.mark.parametrize(
    "change",
    [
        ("NOT_ENCRYPT", "DP_ENCRYPT"),
        ("NOT_ENCRYPT", "SIGNDS"),
        ("upload_compress_type: NO_COMPRESS", "upload_compress_type: DIFF_SPARSE_QUANT"),
        ("download_compress_type: NO_COMPRESS", "download_compress_type: QUANT"),
    ],
)
def test_protections_and_compressions_are_served(change: tuple[str, str], load: Load) -> None:
    assert unsupported(load(change).settings, Role.SERVER) == []


def test_what_cannot_be_served_is_refused(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SERVED, "encrypt.encrypt_type", (EncryptType.NOT_ENCRYPT,))
    noisy = load(("NOT_ENCRYPT", "DP_ENCRYPT")).settings
    assert unsupported(noisy, Role.SERVER) == [
        "encrypt.encrypt_type is DP_ENCRYPT, which this version cannot serve yet; it serves NOT_ENCRYPT"
    ]
    assert unsupported(noisy, Role.SCHEDULER) == []


@pytest.mark.parametrize("rule", AggregationType)
def test_every_rule_is_served(rule: AggregationType) -> None:
    config = Settings()
    chosen = replace(config, aggregation=replace(config.aggregation, aggregation_type=rule))
    assert unsupported(chosen, Role.SERVER) == []


# --- hyper-parameters ---


def test_hyper_parameters(load: Load) -> None:
    loaded = load(("update_model_ratio: 1.0", "update_model_ratio: 0.8"))
    assert hyper_parameters(loaded.settings) == {
        "global_iteration_time_window": 60000,
        "start_fl_job_threshold": 2,
        "start_fl_job_time_window": 30000,
        "update_model_ratio": 0.800000011920929,
        "update_model_time_window": 30000,
        "client_epoch_num": 20,
        "client_batch_size": 32,
        "client_learning_rate": 0.009999999776482582,
        "fl_iteration_num": 25,
        "aggregation_type": "FedAvg",
        "iid_rate": 0.0,
        "total_client_num": 1,
        "secure_aggregation": False,
        "encrypt_type": "NOT_ENCRYPT",
        "share_secrets_ratio": 1.0,
        "cipher_time_window": 1,
        "reconstruct_secrets_threshold": 1,
        "dp_eps": 50.0,
        "dp_delta": 0.009999999776482582,
        "dp_norm_clip": 1.0,
        "sign_k": 0.009999999776482582,
        "sign_eps": 100.0,
        "sign_thr_ratio": 0.6000000238418579,
        "sign_global_lr": 0.10000000149011612,
        "sign_dim_out": 0,
        "upload_compress_type": "NO_COMPRESS",
        "upload_sparse_rate": 0.4000000059604645,
        "download_compress_type": "NO_COMPRESS",
        "enable_ssl": False,
        "pki_verify": False,
        "mask_layout": "contiguous",
    }


def test_hyper_parameters_are_plain_values() -> None:
    values = hyper_parameters(Settings())
    assert len(values) == 31
    assert {type(value) for value in values.values()} == {int, float, bool, str}
    assert values["encrypt_type"] == EncryptType.NOT_ENCRYPT.value


# --- files that are no configuration ---


def test_no_file(file: Path) -> None:
    assert refusal(file, None) == f"yaml config file {file} not exist"


def test_a_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path, None) == f"yaml config file {tmp_path} cannot be read: Is a directory"


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "null", "5", "- a\n- b\n", "text"])
def test_no_mapping(text: str, file: Path) -> None:
    assert refusal(file, text) == (
        f"Expect content of yaml config file {file} is of the dict type, yaml config file: {file}"
    )


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a: b: c", " line 1, column 5: mapping values are not allowed"),
        ("fl_name: x\nround: [1", " line "),
        ("a: 1\n\tb: 2", " line 2, column 1: "),
        ("a: *b", " line 1, column 4: "),
        ("a: 1\n---\nb: 2\n", " line 2, column 1: but found another document"),
        ("fl_name: !!python/object/apply:os.system [ls]", " line 1, column 10: unknown tag"),
        ("fl_name: !!python/name:os.system x", " line 1, column 10: unknown tag"),
        ("fl_iteration_num: 0x_", " line 1, column 19: '0x_' is not a good int"),
        ("enable_ssl: !!bool maybe", " line 1, column 13: 'maybe' is not a good bool"),
        ("fl_name: =", " line 1, column 10: unknown tag"),
        ("round: !x {}", " line 1, column 8: unknown tag"),
        ("<<: 5", " line 1, column 5: expected a mapping"),
        (b"fl_name: \xff\xfe", ": "),
    ],
)
def test_broken_yaml(text: str | bytes, place: str, file: Path) -> None:
    message = refusal(file, text)
    assert message.startswith(f"Syntax error in yaml config file {file}{place}")
    assert "\n" not in message


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100000,
        "{a: " * 100000,
        "- " * 100000,
        "round: &x {<<: *x}",
        "x0: &x0 {}\n"
        + "".join(f"x{n + 1}: &x{n + 1} {{<<: *x{n}}}\n" for n in range(3000))
        + "round: *x3000\n",
        "round: &x {round: *x, start_fl_job_threshold: *x}",
        "&x a: *x",
        "fl_iteration_num: 0x" + "f" * 5000,
        "fl_iteration_num: " + "9" * 5000,
        "fl_iteration_num: 1" + ":59" * 3000,
        "round: {update_model_ratio: 1" + ":59" * 300 + ".5}",
        "round: {update_model_ratio: " + "9" * 4000 + "}",
        "? [a]\n: b",
        "? {a: b}\n: c",
        "fl_name: !!timestamp x",
        "fl_name: 2001-99-99",
        "fl_name: !!binary é",
        "fl_name: !!set {a, b}",
    ],
)
def test_hostile_files_are_refused_in_words(text: str, file: Path) -> None:
    assert refusal(file, text)


# --- random documents ---

NAMES = sorted({part for path in [*(key.path for key in KEYS), *SECTIONS] for part in path.split(".")})
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.dates(),
    st.binary(max_size=4),
    st.sampled_from(["1e-3", "a:1", "PW_ENCRYPT", "SIGNDS", "unix:/a", "1,2", "1MiB", "", "true"]),
)
keys = st.one_of(
    st.sampled_from(NAMES), st.sampled_from([key.path for key in KEYS]), st.text(max_size=4), scalars
)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=6)
)


@st.composite
def near_misses(draw: st.DrawFn) -> str:
    """The guide's file with a few values or whole keys exchanged."""
    tree = yaml.safe_load(GUIDE.read_text())
    for path in draw(st.lists(st.sampled_from([key.path for key in KEYS]), max_size=5)):
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict):
            node[last] = draw(trees)
    return yaml.safe_dump(tree, allow_unicode=True)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """The guide's file with some bytes exchanged."""
    text = bytearray(GUIDE.read_bytes())
    for at in draw(st.lists(st.integers(0, len(text) - 1), max_size=6)):
        text[at] = draw(st.sampled_from(b"\n :-[]{}&*!|>'\"%@#,?\t\\0e_<=~") | st.integers(0, 255))
    return bytes(text)


dumped = trees.map(lambda tree: yaml.safe_dump(tree, allow_unicode=True))


@settings(max_examples=400, deadline=None)
@given(st.one_of(dumped, near_misses(), damaged(), st.text(), st.binary()), st.sampled_from(Role))
def test_any_file_gives_settings_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, text: str | bytes, role: Role
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    try:
        loaded = load_settings(path, role)
    except ConfigError as fault:
        assert all(line.strip() for line in str(fault).split("\n"))
    else:
        assert isinstance(loaded.settings, Settings)
        assert len(hyper_parameters(loaded.settings)) == 31
        assert all("\n" not in warning for warning in loaded.warnings)
        unsupported(loaded.settings, role)
