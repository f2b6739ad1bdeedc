"""``fl scale`` with systemd: what follows from what systemd shows."""

from __future__ import annotations

import pytest

from fedctl.scale.units import Activity, Plan, Start, Unit, plan, start_of, stopped, units_of

# as systemd 252 prints it: its own order, and an instance that was only asked for
SHOWN = """\
MainPID=0
StatusText=
Result=success
ExecMainStatus=0
Id=fl-serverd@7.service
ActiveState=inactive
SubState=dead
Job=

MainPID=313
StatusText=iteration 1 of 25, a=b, collecting
Result=success
ExecMainStatus=0
Id=fl-serverd@0.service
ActiveState=active
SubState=running
Job=

MainPID=0
StatusText=
Result=exit-code
ExecMainStatus=78
Id=fl-serverd@12.service
ActiveState=failed
SubState=failed
Job=

MainPID=0
StatusText=
Result=watchdog
ExecMainStatus=6
Id=fl-serverd@3.service
ActiveState=activating
SubState=auto-restart
Job=4711
"""

RUNNING = Unit(0, True, Activity.RUNNING)


def unit(
    instance: int, activity: Activity = Activity.RUNNING, *, enabled: bool = True, job: bool = False
) -> Unit:
    return Unit(instance, enabled, activity, job=job)


def known(*units: Unit) -> dict[int, Unit]:
    return {unit.instance: unit for unit in units}


def test_what_systemd_shows_is_read() -> None:
    links = ["fl-serverd@0.service", "fl-serverd@1.service", "fl-schedulerd.service", "fl-serverd@x.service"]
    assert units_of(SHOWN, links) == {
        0: Unit(
            0,
            True,
            Activity.RUNNING,
            "active (running)",
            False,
            "",
            313,
            "iteration 1 of 25, a=b, collecting",
        ),
        1: Unit(1, True),
        3: Unit(3, False, Activity.BETWEEN, "activating (auto-restart)", True, "watchdog"),
        12: Unit(12, False, Activity.FAILED, "failed (failed)", False, "exit-code 78"),
    }


@pytest.mark.parametrize(
    "shown", ["", "\n", "Id=cron.service\nActiveState=active\n", "Id=fl-serverd@03.service\n"]
)
def test_nothing_to_read(shown: str) -> None:
    assert units_of(shown, []) == {}


def test_who_waits_for_something_else_to_start_is_seen() -> None:
    assert units_of("Id=fl-serverd@0.service\nActiveState=inactive\nJob=7\n", [])[0].job


@pytest.mark.parametrize("word", ["activating", "deactivating", "maintenance", "a new word"])
def test_whatever_is_neither_up_nor_down_is_between(word: str) -> None:
    units = units_of(f"Id=fl-serverd@0.service\nActiveState={word}\n", [])
    assert units[0].activity is Activity.BETWEEN


@pytest.mark.parametrize("word", ["active", "reloading", "refreshing"])
def test_who_reads_its_configuration_again_runs(word: str) -> None:
    assert units_of(f"Id=fl-serverd@0.service\nActiveState={word}\n", [])[0].activity is Activity.RUNNING


@pytest.mark.parametrize(
    ("wanted", "units", "expected"),
    [
        (0, known(), Plan((), ())),
        (3, known(), Plan((0, 1, 2), ())),
        (2, known(unit(0), unit(1)), Plan((), ())),
        (1, known(unit(0), unit(1), unit(2)), Plan((), (2, 1))),
        (0, known(unit(0), unit(10), unit(9)), Plan((), (10, 9, 0))),
        (3, known(unit(0, enabled=False), unit(1, Activity.STOPPED)), Plan((0, 1, 2), ())),
        (2, known(unit(0, Activity.FAILED), unit(1, Activity.BETWEEN)), Plan((0, 1), ())),
        (0, known(unit(0, Activity.FAILED, enabled=False), unit(1, enabled=False)), Plan((), (1, 0))),
        (1, known(unit(0), unit(5, Activity.STOPPED)), Plan((), (5,))),
        (2, known(unit(1), unit(3)), Plan((0,), (3,))),
    ],
)
def test_the_plan(wanted: int, units: dict[int, Unit], expected: Plan) -> None:
    assert plan(wanted, units) == expected


@pytest.mark.parametrize(
    ("activity", "job", "expected"),
    [
        (Activity.RUNNING, False, Start.UP),
        (Activity.BETWEEN, False, Start.GOES_ON),
        (Activity.BETWEEN, True, Start.GOES_ON),
        (Activity.STOPPED, True, Start.GOES_ON),  # waits for something else
        (Activity.STOPPED, False, Start.IN_VAIN),  # ended at once, or a condition does not hold
        (Activity.FAILED, False, Start.IN_VAIN),
    ],
)
def test_how_a_start_goes(activity: Activity, job: bool, expected: Start) -> None:
    assert start_of(unit(0, activity, job=job)) is expected


@pytest.mark.parametrize(
    ("activity", "job", "expected"),
    [
        (Activity.RUNNING, True, False),
        (Activity.BETWEEN, False, False),
        (Activity.STOPPED, False, True),
        (Activity.FAILED, False, True),
        (Activity.STOPPED, True, False),
    ],
)
def test_when_a_stop_is_over(activity: Activity, job: bool, expected: bool) -> None:
    assert stopped(unit(0, activity, job=job)) is expected


@pytest.mark.parametrize(
    ("activity", "enabled", "words"),
    [
        (Activity.RUNNING, True, "enabled, running"),
        (
            Activity.RUNNING,
            False,
            "running, but not enabled: a reboot ends it (systemctl enable fl-serverd@3)",
        ),
        (Activity.STOPPED, True, "enabled, but not running (systemctl start fl-serverd@3)"),
        (Activity.FAILED, True, "failed, exit-code 78 (systemctl status fl-serverd@3)"),
        (Activity.FAILED, False, "not enabled, failed, exit-code 78 (systemctl status fl-serverd@3)"),
        (Activity.BETWEEN, True, "enabled, activating (start)"),
        (Activity.BETWEEN, False, "not enabled, activating (start)"),
    ],
)
def test_the_words(activity: Activity, enabled: bool, words: str) -> None:
    assert Unit(3, enabled, activity, "activating (start)", result="exit-code 78").standing == words
