#!/usr/bin/env bash
# Sets up .venv and runs the tests; arguments go to pytest: bash scripts/test.sh tests/packing -k qqq
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
make_environment
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # small models: threads that spin while they wait cost more than they give
if [ $# -eq 0 ]; then
    ruff check . || fail "ruff found something; see above."
    ruff format --check . || fail "some files are not formatted; run: .venv/bin/ruff format ."
    mypy || fail "mypy found something; see above."
fi
exec pytest "$@"
