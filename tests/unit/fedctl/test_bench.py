"""``fl bench secagg``: it measures the real thing, and does not believe a wrong result."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from fedcore.secagg import keys
from fedctl.__main__ import main
from fedctl.bench import secagg as measures
from fedctl.processes import NoRedis


def run(*arguments):
    return CliRunner().invoke(main, ["bench", "secagg", *arguments], prog_name="fl")


def test_a_small_group_is_measured(tmp_path):
    path = tmp_path / "result.json"
    done = run("--clients", "7", "--sizes", "100,9", "--dropouts", "0,40", "--json", str(path))
    assert done.exit_code == 0, done.output
    figures = json.loads(path.read_text())
    assert [(row["size"], row["n"]) for row in figures["clients"]] == [(100, 7), (9, 7)]
    streams = {(row["size"], row["dropout"]): row["streams"] for row in figures["server"]}
    assert streams == {(100, 0): 7, (9, 0): 7, (100, 40): 5 + 2 * 5, (9, 40): 5 + 2 * 5}
    assert all(row["steps"]["pbkdf2"] > 0 for row in figures["clients"])
    (group,) = figures["groups"]
    assert group["bytes"]["shareSecrets"][0] > 6 * 96 and group["redis_bytes"] > 7 * 6 * (96 + 33)
    assert "GB/s" in done.stdout and "a client" in done.stdout


def test_memory_is_estimated_without_a_redis(monkeypatch):
    def none(folder):
        raise NoRedis("there is none")

    monkeypatch.setattr(measures, "redis_server", none)
    done = run("--clients", "4", "--sizes", "9", "--dropouts", "0")
    assert done.exit_code == 0 and "estimated" in done.stdout


def test_the_estimate_is_near_what_redis_needs(tmp_path):
    group = measures.Group.of(12)
    measured = measures.redis_bytes(group, tmp_path)
    assert measured / 3 < measures.estimated_redis_bytes(group) < 3 * measured


def test_secrets_that_are_not_recovered_end_it():
    group = measures.Group.of(5)
    stranger = keys.new_pair(lambda count: b"\1" * count)
    lost = next(fl_id for fl_id in group.ids if fl_id not in group.uploaders(20))
    members = {**group.members, lost: group.members[lost]._replace(s_pk=stranger.public)}
    with pytest.raises(measures.Wrong, match="not recovered"):
        measures.server(replace(group, members=members), 20)


def test_masks_that_do_not_cancel_end_it(monkeypatch):
    monkeypatch.setattr(measures.unmask, "add", lambda streams, into: None)
    with pytest.raises(measures.Wrong, match="masks off"):
        measures.server(measures.Group.of(4), 0)


@pytest.mark.parametrize("dropout", [0, 10, 30, 40])
def test_as_many_drop_out_as_are_asked_for(dropout):
    group = measures.Group.of(10)
    assert len(group.uploaders(dropout)) == 10 - dropout // 10


@pytest.mark.parametrize(
    "arguments", [("--clients", "2"), ("--clients", "a"), ("--dropouts", "50"), ("--sizes", "0")]
)
def test_numbers_out_of_range(arguments):
    done = run(*arguments)
    assert done.exit_code == 2 and arguments[0] in done.stderr


def test_too_few_would_remain():
    done = run("--clients", "5", "--dropouts", "40")
    assert done.exit_code == 2 and "take more clients" in done.stderr


def test_help_gives_examples():
    assert "Examples:" in run("--help").stdout
