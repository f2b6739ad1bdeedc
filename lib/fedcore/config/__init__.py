"""Configuration: one YAML file to one frozen tree of Settings, all faults at once.

    address.py     host:port, hosts, ports of instances
    keys.py        what a key is: type, range, default, unit, help
    settings.py    the tree of settings and its table of keys
    document.py    YAML to flat values
    loader.py      flat values to Settings or a ConfigError
    crosscheck.py  rules about several keys at once
    support.py     what this version cannot serve yet
    hyper.py       the values that servers of a job share
    sample.py      the text of etc/fl.yaml.sample

No environment variable is read and nothing is global: whoever needs a setting is given it.
"""

from fedcore.config.address import (
    HTTP_ADDRESS_FAULT,
    SCHEDULER_ADDRESS_FAULT,
    TCP_IP_FAULT,
    Address,
    UnixAddress,
    address_of_instance,
    parse_address,
    parse_addresses,
    parse_host,
    parse_redis_address,
    port_of_instance,
)
from fedcore.config.hyper import hyper_parameters
from fedcore.config.keys import Key, Role
from fedcore.config.loader import LoadedSettings, load_settings
from fedcore.config.settings import (
    KEYS,
    AggregationType,
    DownloadCompressType,
    EncryptType,
    EvalType,
    LogLevel,
    NormAction,
    RedisTls,
    ServerMode,
    Settings,
    UploadCompressType,
)
from fedcore.config.support import unsupported

__all__ = [
    "HTTP_ADDRESS_FAULT",
    "KEYS",
    "SCHEDULER_ADDRESS_FAULT",
    "TCP_IP_FAULT",
    "Address",
    "AggregationType",
    "DownloadCompressType",
    "EncryptType",
    "EvalType",
    "Key",
    "LoadedSettings",
    "LogLevel",
    "NormAction",
    "RedisTls",
    "Role",
    "ServerMode",
    "Settings",
    "UnixAddress",
    "UploadCompressType",
    "address_of_instance",
    "hyper_parameters",
    "load_settings",
    "parse_address",
    "parse_addresses",
    "parse_host",
    "parse_redis_address",
    "port_of_instance",
    "unsupported",
]
