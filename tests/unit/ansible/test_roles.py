"""What playbooks and code say of the same thing."""

from pathlib import Path

import yaml

from fedcore.store.link import RIGHTS

ANSIBLE = Path(__file__).parents[3] / "ansible"


def role_vars(role: str) -> dict:
    return yaml.safe_load((ANSIBLE / "roles" / role / "vars/main.yml").read_text())


def test_redis_allows_what_the_daemons_need_and_no_more():
    assert role_vars("redis")["redis_rights"].split() == RIGHTS.split()
