#!/bin/sh
# Writes what tells about this host's part of the cluster into the folder $1, since $2: journals, state of the units,
# versions, configuration. No secrets: passwords and keys lie in files of their own, which are not looked at.
into=$1 since=$2
umask 077

# note FILE COMMAND...: what a command says goes to a file; one that is not there, or fails, says so in it.
note() {
    file=$into/$1
    shift
    { echo "\$ $*"; "$@"; } >>"$file" 2>&1 || echo "(exit status $?)" >>"$file"
}

for unit in 'fl-*' 'redis*' haproxy 'prometheus*' nftables chrony; do
    journalctl --no-pager --output=short-iso-precise --since="$since" --unit="$unit" >"$into/journal-${unit%\*}.txt" 2>&1
done
note kernel.txt journalctl --no-pager --output=short-iso-precise --since="$since" --dmesg
note status.txt systemctl status --no-pager --full --lines=3 fl.target fl.slice 'fl-*' var-lib-fl-ledgers.mount 'redis*' haproxy 'prometheus*' nftables chrony
note status.txt systemctl list-units --failed --no-pager
note units.txt systemctl cat --no-pager fl.target fl.slice 'fl-*' var-lib-fl-ledgers.mount
note versions.txt uname -a
note versions.txt cat /etc/os-release
note versions.txt ls -l /opt/fl /opt/fl/versions
note versions.txt /opt/fl/current/bin/python -m pip list --format=freeze --disable-pip-version-check
note versions.txt dpkg-query --show systemd 'redis*' haproxy 'prometheus*' nftables chrony
note clock.txt date --iso-8601=ns
note clock.txt timedatectl --no-pager
note clock.txt chronyc -n tracking
note network.txt ip address
note network.txt ss --listening --tcp --numeric --processes
note network.txt nft list ruleset
note room.txt free --mebi
note room.txt df --human-readable
note room.txt ls -l --recursive /var/lib/fl
note room.txt systemd-cgtop --batch --iterations=1 --depth=3
[ -e /etc/fl/fl.yaml ] && sed -E 's/((password|secret)[^:]*):.*/\1: (not collected)/I' /etc/fl/fl.yaml >"$into/fl.yaml"
for file in /var/lib/fl/events.txt /var/lib/fl/metrics.json; do
    [ -e "$file" ] && tail --lines=5000 "$file" >"$into/${file##*/}"
done
chmod -R u=rwX,go= "$into"
