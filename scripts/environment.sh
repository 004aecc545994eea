#!/usr/bin/env bash
# Makes the Python environment that the Makefile's targets run in; does nothing when it is up to date.
#   scripts/environment.sh demo|dev
# Settings: PYTHON (interpreter), VENV (folder), TORCH_INDEX (extra package index for the torch wheel).
#
# The environment carries stamps: .base (which interpreter, which folder) and .extra-NAME (what was installed).
# A .busy mark left by an interrupted run means that files may be half written, so the environment is made anew.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONSAFEPATH=1 PIP_DISABLE_PIP_VERSION_CHECK=1
extra=${1:?demo or dev}
python=${PYTHON:-python3}
venv=${VENV:-.venv}
log=.cache/pip-$extra.log

# Measured 2026-11 on x86-64, Python 3.11, CPU torch: `pip download -d D -c constraints.txt '.[demo]'`, du -sm D; and the
# folder of a fresh environment, plus a third for pip's cache and temporary files.
case $extra in
demo) download_mb=258 disk_mb=1800 ;;
dev) download_mb=550 disk_mb=2300 ;;
*) echo "environment: demo or dev, not $extra" >&2; exit 2 ;;
esac

fail() {
    printf 'blockzoo: %s\n' "$1" >&2
    exit 1
}

free_mb() { df -Pm . | awk 'NR == 2 { print $4 }'; }

# One line per obstacle, each with the way out, before anything is downloaded.
preflight() {
    [ "$(uname -s)" = Linux ] || fail "only Linux is supported: use a Linux machine, container or WSL."
    command -v "$python" >/dev/null || fail "$python is not installed: install Python 3.11 or newer, or name one with make PYTHON=/path/to/python3."
    local version
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "$python does not start: name another with make PYTHON=/path/to/python3."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
        || fail "$python is Python $version and 3.11 is the oldest that works: name a newer one with make PYTHON=/path/to/python3."
    "$python" -c 'import ensurepip, venv' 2>/dev/null \
        || fail "$python cannot make environments: ask for the package python$version-venv, or name another interpreter with make PYTHON=/path/to/python3."
    [ "$(free_mb)" -ge "$disk_mb" ] || fail "$(free_mb) MB are free here and the environment needs $disk_mb MB: free some space, or put it elsewhere with make VENV=/other/disk/venv."
}

base_stamp() { "$python" -c 'import os, sys; print(sys.version, sys.platform, os.path.realpath(sys.executable))'; realpath -m "$venv"; pwd; }
extra_stamp() { printf '%s\n' "${TORCH_INDEX:-}"; sha256sum pyproject.toml constraints.txt; }

is_current() {
    [ ! -e "$venv/.busy" ] && [ -x "$venv/bin/python" ] \
        && [ "$(cat "$venv/.base" 2>/dev/null)" = "$(base_stamp 2>/dev/null)" ] \
        && [ "$(cat "$venv/.extra-$extra" 2>/dev/null)" = "$(extra_stamp)" ]
}

# Elsewhere the default torch wheel carries CUDA. pip tells which wheel it would take without downloading it.
warn_of_cuda() {
    [ -z "${TORCH_INDEX:-}" ] && [ "$(uname -m)" = x86_64 ] || return 0
    local url
    url=$("$venv/bin/python" -m pip install --quiet --dry-run --ignore-installed --no-deps --report - -c constraints.txt torch 2>/dev/null \
        | "$venv/bin/python" -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["download_info"]["url"])' 2>/dev/null) || return 0
    case $url in
    *cpu*) ;;
    *)
        echo "blockzoo: the torch wheel found brings CUDA, which adds several GB. Without a GPU, stop here (Ctrl-C) and run" >&2
        echo "          make TORCH_INDEX=URL with the CPU index that PyTorch's installation page names." >&2
        ;;
    esac
}

is_current && exit 0
mkdir -p .cache
exec 9>.cache/environment.lock
if ! flock --nonblock 9; then
    echo "blockzoo: another make is setting up the environment; waiting for it" >&2
    flock 9
    is_current && exit 0
fi

preflight
# A sound environment that was made by other means is adopted.
base=$(cat "$venv/.base" 2>/dev/null || base_stamp)
if [ -e "$venv/.busy" ] || [ "$base" != "$(base_stamp)" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    # Only what is an environment is removed: VENV= may have been mistyped.
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ ! -e "$venv/.busy" ]; then
        [ -d "$venv" ] && [ -z "$(ls -A "$venv")" ] || fail "$venv exists and is not a Python environment: name another folder with make VENV=."
    fi
    # The interpreter may be the one of this very environment, when it is activated.
    python=$("$python" -c 'import sys; print(sys._base_executable)')
    rm -rf "$venv"
fi
echo "Setting up $venv: up to $download_mb MB to download (once; pip keeps them), $disk_mb MB of disk. Log: $log"
if [ ! -x "$venv/bin/python" ]; then
    mkdir -p "$venv"
    touch "$venv/.busy"
    "$python" -m venv "$venv" >"$log" 2>&1 || { tail -n 5 "$log" >&2; fail "making the environment failed: see $log."; }
fi
base_stamp >"$venv/.base"
touch "$venv/.busy"
warn_of_cuda
set +e
"$venv/bin/python" -m pip install --no-input -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -e ".[$extra]" 2>&1 \
    | "$venv/bin/python" scripts/pip_progress.py "$log"
status=${PIPESTATUS[0]}
set -e
[ "$status" -eq 0 ] || fail "installing failed: see $log; running make again starts afresh."
# What dev installs is all that demo needs.
extra_stamp >"$venv/.extra-$extra"
[ "$extra" = demo ] || extra_stamp >"$venv/.extra-demo"
rm -f "$venv/.busy"
