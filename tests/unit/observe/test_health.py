"""The line that says how a daemon is."""

from __future__ import annotations

from fedcore.observe.health import Readiness


def test_a_ready_daemon_says_what_it_is_about() -> None:
    assert Readiness({"redis": lambda: None}).status("iteration 7 of 20") == "iteration 7 of 20; Redis ok"


def test_one_that_is_not_says_why_first() -> None:
    checks = {"redis": lambda: "no connection", "job": lambda: None, "ledger": lambda: "full"}
    assert Readiness(checks).reasons() == {"redis": "no connection", "ledger": "full"}
    assert Readiness(checks).status("joining") == "not ready: redis: no connection; ledger: full; joining"
