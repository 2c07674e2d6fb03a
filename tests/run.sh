#!/usr/bin/env bash
# Every check: tests/run.sh [--full] [pytest arguments]
# Style by ruff, then pytest. Fails on a failing test, a skip that tests/skips.txt does not list, and a group of tests
# over its time (GROUPS in tests/conftest.py; --full runs the long tests too and has no budget).
set -euo pipefail
cd "$(dirname "$0")/.."
./run_local.sh --setup tests/requirements.txt
.venv/bin/python -m ruff check .
exec .venv/bin/python -m pytest -q --durations=20 --budgets "$@"
