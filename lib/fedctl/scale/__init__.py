"""``fl scale``: how many fl-serverd run on this host.

addresses.py    where a server listens, and whether it is ready
local.py        servers as plain processes, known by their locks: for development and single hosts
units.py        servers as units of systemd: what is known of them, and what is to be done
systemd.py      the same, done: systemctl and journalctl
command.py      the command
"""
