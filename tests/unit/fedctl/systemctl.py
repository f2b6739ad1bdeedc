"""Stands in for systemctl and journalctl: says what a test has written down, and writes down what it is told.

$STAND_IN names a folder: ``units.json`` holds instance -> list of states (values of ``systemctl show``), of which each
look takes the first unless it is the last; ``calls`` gets a line per call; ``fails.json`` holds verb -> [code, text];
``enabled`` is the folder of links. Starting a unit makes "next.json"[instance] its states, stopping it "stopped".
"""

import json
import os
import sys
import time
from pathlib import Path

HERE = Path(os.environ["STAND_IN"])
STOPPED = [{"ActiveState": "deactivating", "SubState": "stop-sigterm"}, {"ActiveState": "inactive"}]


def load(name):
    path = HERE / name
    return json.loads(path.read_text()) if path.exists() else {}


def save(name, value):
    (HERE / name).write_text(json.dumps(value))


def instances(words):
    return [
        w[len("fl-serverd@") : -len(".service")]
        for w in words
        if w.startswith("fl-serverd@") and "*" not in w
    ]


def main(program, *words):
    with (HERE / "calls").open("a") as calls:
        print(program, *words, file=calls)
    verb = next(word for word in words if not word.startswith("--no-ask"))
    fails = load("fails.json")
    if verb in fails:
        code, text = fails[verb]
        if code < 0:
            time.sleep(60)
        print(text, file=sys.stderr)
        return code
    if program == "journalctl":
        print("the first line\nthe last line")
        return 0
    units, named = load("units.json"), instances(words)
    match verb:
        case "show":
            for instance in sorted({*units, *named}):
                states = units.get(instance) or [{}]
                values = {
                    "ActiveState": "inactive",
                    "SubState": "dead",
                    "Result": "success",
                    "Job": "",
                } | states[0]
                if len(states) > 1:
                    del states[0]
                print(
                    f"Id=fl-serverd@{instance}.service",
                    *(f"{k}={v}" for k, v in values.items()),
                    "",
                    sep="\n",
                )
        case "enable":
            for instance in named:
                (HERE / "enabled" / f"fl-serverd@{instance}.service").touch()
                units[instance] = load("next.json").get(
                    instance, [{"ActiveState": "active", "SubState": "running"}]
                )
        case "disable" | "kill":
            for instance in named:
                (HERE / "enabled" / f"fl-serverd@{instance}.service").unlink(missing_ok=True)
                units[instance] = (
                    load("end.json").get(instance, STOPPED) if verb == "disable" else STOPPED[1:]
                )
        case "reset-failed":
            for instance in named:
                units[instance] = STOPPED[1:]
    save("units.json", units)
    return 0


sys.exit(main(Path(sys.argv[0]).name, *sys.argv[1:]))
