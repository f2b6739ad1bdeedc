#!/bin/sh
# Writes run.lock, demo.lock, dev.lock and ansible.lock with pip-compile. Versions that stand there stay unless they no longer fit;
# with --upgrade all are chosen anew.
set -eu
cd "$(dirname "$0")/.."

compile() {
    lock=requirements/$1
    shift
    .venv/bin/python -m piptools compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-header \
        --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options \
        --output-file "$lock" "$@" requirements/build.in
    {
        echo '# Written by "make lock" with pip-compile: edit setup.py or the .in files instead.'
        echo '#'
        echo '# Good for Linux and Python 3.11 or later: pip-compile sees only the Python that it runs on, so what'
        echo '# others need on top is named in build.in; a test compares this list with what its packages ask for.'
        echo
        cat "$lock"
    } >"$lock.new"
    mv "$lock.new" "$lock"
}

compile demo.lock --extra demo "$@" setup.py
compile run.lock --constraint requirements/demo.lock "$@" setup.py
compile dev.lock --extra demo --extra dev --constraint requirements/demo.lock "$@" setup.py requirements/dev.in
compile ansible.lock --constraint requirements/dev.lock "$@" requirements/ansible.in
