#!/bin/sh
# From a checkout to the demo in one command, on a machine with Python 3.11 and nothing else:
#
#   sh config/demo.sh                    http://127.0.0.1:8090/
#   sh config/demo.sh --port 9000        other options: --help
#
# What it installs stays in a folder of your cache, so that the next start is quick; it says which.
# PYTHON                     the interpreter; by default the newest of python3.13, python3.12, ...
# PGREALTIME_DEMO_DIRECTORY  another folder to install in
set -eu

checkout=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)

fail() {
    printf 'demo.sh: %s\n' "$1" >&2
    exit "${2:-1}"
}

find_python() {
    for python in ${PYTHON:-python3.13 python3.12 python3.11 python3 python}; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$python"
            return
        fi
    done
    fail "no Python 3.11 or newer was found; name one with PYTHON=/path/to/python3"
}

# A folder that is ours alone: what lies in it is run. The last resort has a name that others could
# have taken, so its owner is looked at.
find_folder() {
    if [ -n "${PGREALTIME_DEMO_DIRECTORY:-}" ]; then
        set -- "$PGREALTIME_DEMO_DIRECTORY"
    else
        set -- "${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}/pgrealtime-demo" \
            "${TMPDIR:-/tmp}/pgrealtime-demo-venv-$(id -u)"
    fi
    for folder; do
        if mkdir -p "$folder" 2>/dev/null && chmod 700 "$folder" 2>/dev/null && [ -w "$folder" ] &&
            [ -n "$(find "$folder" -prune -user "$(id -u)")" ]; then
            printf '%s\n' "$folder"
            return
        fi
    done
    fail "can't write to $folder; name a folder with PGREALTIME_DEMO_DIRECTORY=..."
}

install_demo() {
    printf 'Installing pgrealtime in %s (once, under a minute) ...\n' "$folder"
    rm -rf "$folder/venv" "$folder/installed" || fail "can't remove what is left in $folder"
    "$python" -m venv "$folder/venv" >"$folder/log" 2>&1 ||
        fail "$python can't make a virtual environment; on Debian and Ubuntu: apt install python3-venv"
    "$folder/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check \
        --constraint "$checkout/.ci/constraints.txt" --editable "${checkout}[demo]" \
        >"$folder/log" 2>&1 || {
        tail -n 5 "$folder/log" >&2
        fail "pip couldn't install pgrealtime; all that it said is in $folder/log"
    }
    printf '%s\n' "$wanted" >"$folder/installed"
}

python=$(find_python)
folder=$(find_folder)

# The note is written last, so an installation that was interrupted or half removed is made anew.
wanted="$checkout $("$python" -c 'import sys; print(sys.executable, sys.version)' | tr '\n' ' ')
$(cksum "$checkout/pyproject.toml" "$checkout/.ci/constraints.txt")"
if [ "$(cat "$folder/installed" 2>/dev/null)" != "$wanted" ] ||
    ! "$folder/venv/bin/python" -c 'import pgrealtime.demo.run' 2>/dev/null; then
    install_demo
fi

exec "$folder/venv/bin/pgrealtime" demo "$@"
