#!/usr/bin/env bash
# pytest-xdist: `--dist loadgroup` ignores `xdist_group` marks under pytest 9.2, without a warning.
# Exit status: 0 the behaviour is as described, 1 it has changed, 2 the packages could not be installed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

cat >test_groups.py <<'EOF'
import os
from pathlib import Path

import pytest


@pytest.mark.xdist_group("shared")
@pytest.mark.parametrize("number", range(6))
def test_in_group(number):
    worker = os.environ["PYTEST_XDIST_WORKER"]
    with Path("workers.txt").open("a") as file:
        file.write(worker + "\n")


@pytest.mark.parametrize("number", range(6))
def test_without_group(number):
    pass
EOF
touch pytest.ini

# Number of processes that ran tests of the one group, under the given version of pytest.
processes_of_group() {
    "${PYTHON:-python3}" -m venv "venv-$1" >&2 || exit 2
    "venv-$1/bin/python" -m pip install --quiet --disable-pip-version-check \
        "pytest==$1" pytest-xdist==3.8.0 >&2 || exit 2
    rm -f workers.txt
    "venv-$1/bin/pytest" --quiet -n 2 --dist loadgroup >&2
    sort -u workers.txt | wc -l
}

old=$(processes_of_group 9.1.0)
new=$(processes_of_group 9.2.0)
echo "pytest-xdist 3.8.0, --dist loadgroup -n 2, six tests in one group:"
echo "pytest 9.1.0 ran them in $old process, pytest 9.2.0 in $new"
[ "$old" -eq 1 ] && [ "$new" -eq 2 ]
