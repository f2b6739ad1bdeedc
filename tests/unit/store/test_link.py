"""What Redis says in its first words, which refusals mean "not here", and the rights that we ask for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fedcore.store
from fedcore.store.link import RIGHTS, Access, NotServing, cannot_serve, followers, info, refusal

STORE = Path(fedcore.store.__file__).parent
MASTER = b"# Replication\r\nrole:master\r\nconnected_slaves:3\r\n"


def test_info_is_read_line_by_line() -> None:
    assert info(b"# Server\r\nrun_id:abc\r\nos:Linux: 6\r\n\r\nbad\r\nx:\xff\r\n") == {
        "run_id": "abc",
        "os": "Linux: 6",
        "x": "\ufffd",
    }


def test_replicas_count_once_they_are_in_step() -> None:
    replicas = (
        b"slave0:ip=10.0.0.1,port=6379,state=online,offset=9,lag=0\r\n"
        b"slave1:ip=10.0.0.2,port=6379,state=wait_bgsave,offset=0,lag=0\r\n"
        b"slave10:ip=10.0.0.3,port=6379,state=online,offset=9,lag=1\r\n"
        b"slave_priority:state=online\r\n"
    )
    assert followers(MASTER) == 0
    assert followers(MASTER + replicas) == 2


@pytest.mark.parametrize(
    ("answer", "role"), [(b"role:slave\r\nslave0:state=online\r\n", "slave"), (b"", "node without a role")]
)
def test_only_a_master_will_do(answer: bytes, role: str) -> None:
    with pytest.raises(NotServing, match=f"it is a {role}, not the master .*fedcore.redis.sentinels"):
        followers(answer)


@pytest.mark.parametrize(
    "text",
    [
        "READONLY You can't write against a read only replica.",
        "LOADING Redis is loading the dataset in memory",
        "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
        "NOAUTH Authentication required.",
        "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
        "NOREPLICAS Not enough good replicas to write.",
        # Redis 6, within a script; txredisapi has cut off "ERR"
        " Error running script (call to f_e0e1f9): @user_script:1: @user_script: 1: -READONLY You can't write",
    ],
)
def test_refusals_that_mean_not_here(text: str) -> None:
    assert cannot_serve(Exception(text))


@pytest.mark.parametrize(
    "text",
    [
        "WRONGTYPE Operation against a key holding the wrong kind of value",
        "NOSCRIPT No matching script. Please use EVAL.",
        "OOM command not allowed when used memory > 'maxmemory'.",
        " Error running script (call to f_e0): @user_script:1: the field READONLY is missing",
        "READONLYISH",
    ],
)
def test_refusals_that_are_about_one_command(text: str) -> None:
    assert not cannot_serve(Exception(text))


@pytest.mark.parametrize(
    ("command", "text", "remedy"),
    [
        ("AUTH", "WRONGPASS invalid username-password pair", "fedcore.redis.password_file"),
        ("AUTH", " AUTH <password> called without any password configured", "remove fedcore.redis.username"),
        ("PING", "NOAUTH Authentication required.", "give fedcore.redis.password_file"),
        ("INFO", "NOPERM this user has no permissions to run the 'info' command", RIGHTS),
        ("SELECT", " DB index is out of range", "fedcore.redis.database"),
    ],
)
def test_a_lasting_refusal_comes_with_its_remedy(command: str, text: str, remedy: str) -> None:
    error = refusal(Exception(text), command)
    assert error.lasting
    assert remedy in str(error)


def test_a_passing_one_needs_none() -> None:
    error = refusal(Exception("LOADING Redis is loading the dataset in memory"), "PING")
    assert not error.lasting
    assert error.hint == ""


def test_a_password_is_not_shown() -> None:
    assert "secret" not in repr(Access("fed", b"secret"))


def test_the_rights_cover_each_command_of_the_scripts_and_the_adapters() -> None:
    scripts = "".join(path.read_text() for path in (STORE / "scripts").glob("*.lua"))
    adapters = "".join(path.read_text() for path in STORE.glob("*.py"))
    used = set(re.findall(r"redis\.p?call\(\s*['\"](\w+)['\"]", scripts))
    used |= set(re.findall(r"(?:command|_say|ask)\(\s*(?:connection,\s*)?\"([A-Z]+)\"", adapters))
    granted = {word.removeprefix("+").partition("|")[0].upper() for word in RIGHTS.split() if word[0] == "+"}
    assert len(used) > 20
    assert used - {"AUTH", "SENTINEL"} <= granted, "add what is missing to fedcore.store.link.RIGHTS"
