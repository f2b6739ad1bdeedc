"""docs/OPERATIONS.md against the code: the texts, ports, paths, sizes, metrics and variables that it names."""

from __future__ import annotations

import re

import pytest
import yaml
from unit.docs.pages import (
    ROOT,
    WILDCARD,
    blocks,
    codes,
    page,
    section,
    shown_by_the_code,
    table,
    unknown_options,
)

from fedcore.config import Role, load_settings
from fedcore.services.terms import ledger_shape
from fedcore.wire.arrays import Layout, Weight
from fedexamples import lenet

PAGE = page("OPERATIONS.md")
TROUBLES = [  # a row without a text has the one of the row above
    row
    for title in re.findall(r"^### (.*)$", section(PAGE, "Troubleshooting"), re.M)
    for row in table(section(PAGE, title), "text", "cause", "remedy")
    if row[0]
]


@pytest.mark.parametrize("text", [codes(row[0])[0] for row in TROUBLES])
def test_the_code_can_say_what_the_page_explains(text: str) -> None:
    assert len(text.replace(WILDCARD, "")) >= 10, "too little to look for"
    assert shown_by_the_code(text)


def test_each_trouble_has_one_text_a_cause_and_a_remedy() -> None:
    assert len(TROUBLES) > 30
    assert all(len(codes(text)) == 1 and cause and remedy for text, cause, remedy in TROUBLES)


GROUP_VARS = yaml.safe_load((ROOT / "ansible/group_vars/all.yml").read_text())
UNITS = {path.name: path.read_text() for path in (ROOT / "systemd").glob("*.*") if path.is_file()}


# ---- numbers


def test_the_sizes_are_those_of_the_code(tmp_path) -> None:
    """One example per row, at 200 devices and Ansible's default budget."""
    assert "256MiB" in GROUP_VARS["fl_ledger_budget"]
    sample = yaml.safe_load((ROOT / "etc/fl.yaml.sample").read_text())
    sample["round"]["start_fl_job_threshold"] = 200
    sample["fedcore"] = {"ledger": {"memory_budget": "256MiB"}}
    (tmp_path / "fl.yaml").write_text(yaml.safe_dump(sample))
    settings = load_settings(tmp_path / "fl.yaml", Role.SERVER).settings
    rows = table(
        section(PAGE, "Sizing"),
        *(
            "model",
            "values",
            "one slot, MB",
            "slots at 256 MiB, N = 200",
            "ledger of a server, MB",
            "checkpoint, MB",
        ),
    )
    assert len(rows) == 3
    for name, values, slot, slots, ledger, checkpoint in rows:
        if name == "LeNet-5":
            layout = Layout.of(lenet.initial_weights(0))
        else:
            layout = Layout((Weight("w", (int(values),), True),))
        shape = ledger_shape(settings, layout)
        assert layout.total_floats == int(values)
        assert (shape.slots, f"{shape.slot_size / 1e6:.1f}") == (int(slots), slot)
        assert (f"{shape.size / 1e6:.0f}", f"{4 * int(values) / 1e6:.1g}") == (
            ledger,
            f"{float(checkpoint):.1g}",
        )


# ---- names


def test_the_metrics_are_there() -> None:
    code = (ROOT / "lib/fedcore/observe/metrics.py").read_text()
    rows = table(section(PAGE, "Monitoring"), "metric", "worth a look when")
    for metric in (name for row in rows for name in codes(row[0])):
        name, _, label = metric.partition("{")
        assert name == "up" or f'"{name}"' in code, name
        for word in re.findall(r'"(\w+)"', label):
            assert f'"{word}"' in code or shown_by_the_code(word), metric


def test_the_variables_are_there() -> None:
    """They are in group_vars/all.yml, in argument_specs of a role, or options of fl.yaml."""
    named = {word for word in codes(PAGE) if re.fullmatch(r"[a-z]+_[a-z_]+", word)}
    known = {*GROUP_VARS}
    for specs in (ROOT / "ansible/roles").glob("*/meta/argument_specs.yml"):
        known |= set(yaml.safe_load(specs.read_text())["argument_specs"]["main"].get("options", {}))
    sample = (ROOT / "etc/fl.yaml.sample").read_text()
    known |= set(re.findall(r"^ *#?(\w+):", sample, re.M))
    metrics = {
        word
        for word in named
        if shown_by_the_code(word) and f'"{word}"' in (ROOT / "lib/fedcore/observe/metrics.py").read_text()
    }
    assert named - known - metrics - {"next_req_time", "ansible_host"} == set()
    for option in re.findall(r"`fedcore\.([\w.]+)", PAGE):
        for word in option.split("."):
            assert re.search(rf"^ *#?{word}:", sample, re.M), option


def test_the_paths_are_those_of_roles_and_units() -> None:
    rows = table(section(PAGE, "Users, files, units"), "path", "owner, mode", "what")
    places = {str(value) for value in GROUP_VARS.values()}
    everything = "\n".join(
        [*UNITS.values(), *(f.read_text() for f in (ROOT / "ansible/roles").rglob("*.yml")), *places]
    )
    everything = everything.replace("{{ fl_etc }}", "/etc/fl").replace("{{ fl_opt }}", "/opt/fl")
    everything = everything.replace("{{ fl_state_dir }}", "/var/lib/fl").replace(
        "{{ fl_pki }}", "/etc/fl/pki"
    )
    everything = everything.replace("{{ fl_state_dir ~ '", "/var/lib/fl")
    for path in (path.removesuffix("*") for row in rows for path in codes(row[0])):
        assert path == "ansible/secrets/INVENTORY" or path in everything, path


def test_the_units_are_there() -> None:
    rows = table(section(PAGE, "Users, files, units"), "unit", "what")
    assert {codes(row[0])[0].replace("@N.", "@.") for row in rows} == set(UNITS)


def test_the_commands_name_units_that_are_there() -> None:
    commands = " ".join(re.findall(r"systemctl [^#`|\n]*", PAGE))
    daemons = re.findall(r"(?<![\w-])fl-\w+(?:@[\w*]+)?", commands)
    assert daemons
    assert {re.sub(r"@.*", "@", name) + ".service" for name in daemons} <= set(UNITS)


@pytest.mark.parametrize(
    "line",
    [line for block in blocks(PAGE, "sh") for line in block.splitlines() if re.match(r"(sudo )?fl ", line)],
)
def test_the_options_are_there(line: str) -> None:
    assert unknown_options(line) == set()


def test_the_playbooks_are_there() -> None:
    for name in re.findall(r"\b[a-z_]+\.yml", PAGE):
        assert name == "mine.yml" or (ROOT / "ansible" / name).is_file(), name


# ---- signals and exit codes


def test_the_exit_codes_are_those_of_code_and_units() -> None:
    rows = table(section(PAGE, "Signals and exit codes"), "exit code", "meaning", "what systemd does")
    then = {code: what for code, _, what in rows}
    assert list(then) == ["0", "78", "2", "1"]
    unit = UNITS["fl-serverd@.service"]
    assert "\nRestartPreventExitStatus=2 78\n" in unit and "\nRestart=on-failure\n" in unit
    seconds = re.search(r"^RestartSec=(\d+)$", unit, re.M)
    assert seconds is not None and f"after {seconds[1]} s" in then["1"]
    assert "\nStartLimitIntervalSec=0\n" in unit and "for ever" in then["1"]
    launch = (ROOT / "daemons/launch.py").read_text()
    for code in then:
        assert re.search(rf"^  {code} +\w", launch, re.M), code


def test_the_signals_are_those_of_the_help() -> None:
    rows = table(section(PAGE, "Signals and exit codes"), "signal", "what the daemon does")
    launch = (ROOT / "daemons/launch.py").read_text()
    for name in (name for row in rows[:2] for name in codes(row[0])):
        assert name in launch
    watchdog = re.search(r"^WatchdogSec=(\d+)$", UNITS["fl-serverd@.service"], re.M)
    assert watchdog is not None and f"for {watchdog[1]} s" in rows[3][1]


# ---- ports


def test_the_ports_are_those_of_the_firewall() -> None:
    role = yaml.safe_load((ROOT / "ansible/roles/firewall/vars/main.yml").read_text())
    numbers = {name: value for name, value in GROUP_VARS.items() if name.endswith("_port")}

    def ports(written: str) -> str:
        if "firewall_ssh_ports" in written:
            return "22"
        found = re.sub(
            r"\{\{ (\w+_port) \| int \+ (\d+) \}\}", lambda m: str(numbers[m[1]] + int(m[2])), written
        )
        return re.sub(r"\{\{ (\w+_port) \}\}", lambda m: str(numbers[m[1]]), found)

    def sources(name: str) -> set[str]:
        return set(re.findall(r"(?:firewall|fl)_\w+", str(role["firewall_sources"][name])))

    told = [
        (port, codes(group)[0], set(codes(origin)))
        for port, group, origin, _ in table(
            section(PAGE, "Ports"), "port", "hosts of group", "let in from", "what"
        )
    ]
    assert told == [
        (ports(row["ports"]), row["group"], sources(row["from"])) for row in role["firewall_ports"]
    ]
