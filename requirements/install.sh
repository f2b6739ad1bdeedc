#!/bin/sh
# Makes .venv hold what the given lists name, and this project itself; does nothing if it does already.
#
#   requirements/install.sh demo.lock [torch.txt]
#
# PYTHON chooses the interpreter; otherwise the first one of Python 3.11 or later on PATH is taken. Two copies of
# this script do not disturb each other. Asks for nothing that is not in a fresh Debian or Ubuntu with Python.
set -eu
cd "$(dirname "$0")/.."

fail() {
    echo "$1" >&2
    exit 1
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

choose_python() {
    if [ -n "${PYTHON:-}" ]; then
        new_enough "$PYTHON" || fail "$PYTHON is not Python 3.11 or later; give another: make demo PYTHON=python3.12"
        return
    fi
    for PYTHON in python3 python3.13 python3.12 python3.11 python3.14; do
        if new_enough "$PYTHON"; then
            return
        fi
    done
    fail "there is no Python 3.11 or later: apt-get install python3 python3-venv"
}

make_venv() {
    choose_python
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "Python's venv module is missing: apt-get install python3-venv"
    "$PYTHON" -m venv --clear .venv
    pwd >.venv/.place
}

# Scripts in it name their place, and packages belong to the Python that it was made with.
is_usable() {
    [ "$(cat .venv/.place 2>/dev/null)" = "$(pwd)" ] && .venv/bin/python -c 'import pip' 2>/dev/null
}

install() {
    echo "installing what requirements/$1 names into .venv (once)" >&2
    case $1 in
    *.lock) hashes=--require-hashes ;;
    *) hashes= ;;
    esac
    .venv/bin/python -m pip install --quiet --disable-pip-version-check $hashes -r "requirements/$1"
}

# A mark is the text that was installed: is_marked NAME FILES..., mark NAME FILES...
is_marked() {
    mark=.venv/.$1
    shift
    [ -e "$mark" ] && cat "$@" | cmp -s - "$mark"
}

mark() {
    mark=.venv/.$1
    shift
    cat "$@" >"$mark"
}

exec 9<requirements
flock 9
is_usable || make_venv
for list in "$@"; do
    if ! is_marked "$list" "requirements/$list"; then
        install "$list"
        mark "$list" "requirements/$list"
    fi
done
project="setup.py lib/fedcore/__init__.py lib/fedcore/compression/_mask.c lib/fedcore/secagg/_stream.c"
if ! is_marked project $project; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
    mark project $project
    if ! .venv/bin/python -c 'import fedcore.compression._mask, fedcore.secagg._stream' 2>/dev/null; then
        echo "without a C compiler and Python.h: DIFF_SPARSE_QUANT and PW_ENCRYPT are slower than they could be (to change that:" >&2
        echo "apt-get install gcc python3-dev; rm .venv/.project; and the same command again)" >&2
    fi
fi
