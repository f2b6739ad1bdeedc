"""ansible/roles/pki and rotate_certs.yml here, read by openssl; systemctl is a script that takes notes.

What they do to running daemons is a matter of tests/lab.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from fedctl.__main__ import main

ANSIBLE = Path(__file__).parents[2] / "ansible"
FOUND = shutil.which("ansible-playbook", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
BIN = Path(FOUND).parent if FOUND else None

pytestmark = [
    pytest.mark.skipif(
        "FEDCORE_PLAYBOOKS" not in os.environ, reason="a minute of Ansible: `make lab` runs it"
    ),
    pytest.mark.skipif(BIN is None, reason="Ansible is not installed (requirements/ansible.lock)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away, as the role does"),
]


class Host:
    """One host of a cluster: this one, with folders of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.secrets = folder / "secrets"
        self.etc = folder / "etc"
        self.told = folder / "systemctl.log"
        (folder / "bin").mkdir()
        for name in ("pki", "credentials"):
            (self.etc / name).mkdir(parents=True)
        systemctl = folder / "bin/systemctl"
        systemctl.write_text(
            f'#!/bin/sh\necho "$@" >> {self.told}\necho ActiveState=inactive\necho ExecMainStartTimestamp=\n'
        )
        systemctl.chmod(0o755)
        self._inventory = folder / "inventory.yml"
        values = {
            "ansible_connection": "local",
            "ansible_python_interpreter": "{{ ansible_playbook_python }}",
            "fl_etc": str(self.etc),
            "fl_opt": str(folder / "opt"),
            "fl_group": "root",
            "fl_secrets_dir": str(self.secrets),
        }
        groups = {name: {"hosts": {}} for name in ("servers", "workers", "redis")}
        one = {"hosts": {"node1": {"fl_address": "127.0.0.5"}}, "vars": values}
        everything = {"all": {**one, "children": {**groups, "schedulers": {"hosts": {"node1": None}}}}}
        self._inventory.write_text(yaml.safe_dump(everything))

    def role(self, name: str) -> str:
        """Apply a role, and return what Ansible says."""
        words = ("--playbook-dir", str(ANSIBLE), "-m", "ansible.builtin.include_role", "-a", f"name={name}")
        return self._run("ansible", "all", *words)

    def play(self, *words: str) -> str:
        """Run a playbook, and return what it says."""
        return self._run("ansible-playbook", *words)

    def _run(self, program: str, *words: str) -> str:
        self.told.unlink(missing_ok=True)
        assert BIN is not None
        environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "ANSIBLE_CONFIG": str(ANSIBLE / "ansible.cfg"),
            "ANSIBLE_FORCE_COLOR": "0",
        }
        command = [str(BIN / program), "-i", str(self._inventory), *words]
        done = subprocess.run(
            command, cwd=ANSIBLE, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @property
    def reloads(self) -> int:
        """How often daemons were told to read their certificates again in the last run."""
        return self.told.read_text().count("try-reload-or-restart") if self.told.exists() else 0

    def serial(self, name: str) -> str:
        """Open a delivered PKCS#12 file with its delivered password, and return its certificate's serial number."""
        password = f"file:{self.etc}/credentials/{name}-password"
        opened = openssl("pkcs12", "-in", f"{self.etc}/pki/{name}.p12", "-passin", password, "-nokeys")
        (self.folder / "leaf.pem").write_text(opened)
        return openssl("x509", "-in", f"{self.folder}/leaf.pem", "-noout", "-serial").strip()

    def verify(self, name: str) -> None:
        """Let openssl check what was delivered, against what was delivered."""
        self.serial(name)
        pki = self.etc / "pki"
        words = ("-crl_check", "-CRLfile", f"{pki}/ca.crl", "-CAfile", f"{pki}/ca.crt", "-auth_level", "3")
        for purpose in ("sslserver", "sslclient"):
            openssl(
                "verify", *words, "-purpose", purpose, "-verify_ip", "127.0.0.5", f"{self.folder}/leaf.pem"
            )


def openssl(*words: str) -> str:
    done = subprocess.run(["openssl", *words], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_life_of_certificates(tmp_path: Path) -> None:
    """Made, found to be good, revoked, rotated, rotated with new passwords."""
    host = Host(tmp_path)
    host.role("pki")
    first = {name: host.serial(name) for name in ("server", "client")}
    for name in first:
        host.verify(name)

    crt = host.secrets / "hosts/node1/client.crt"
    revoked = CliRunner().invoke(main, ["certs", "revoke", str(crt), "--ca", str(host.secrets)])
    assert revoked.exit_code == 0, revoked.output
    host.play("rotate_certs.yml", "-e", "renew=list")
    assert host.reloads == 1
    assert host.serial("server") == first["server"]
    assert host.serial("client") != first["client"]
    host.verify("client")

    before = {name: host.serial(name) for name in first}
    password = (host.etc / "credentials/server-password").read_bytes()
    host.play("rotate_certs.yml")
    assert host.reloads == 1
    assert all(host.serial(name) != before[name] for name in first)
    assert (host.etc / "credentials/server-password").read_bytes() == password

    host.play("rotate_certs.yml", "-e", "renew=passwords")
    assert host.reloads == 0, "the restart that brings the password brings the certificate"
    assert (host.etc / "credentials/server-password").read_bytes() != password
    for name in first:
        host.verify(name)
