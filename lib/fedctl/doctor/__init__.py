"""``fl doctor``: what stands against daemons on this host.

findings.py   what measured facts mean; pure
host.py       looks at this host: files, ports, disks, certificates
cluster.py    asks Redis, and tries the ways to other nodes
command.py    the command
"""
