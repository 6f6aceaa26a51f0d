#!/usr/bin/env bash
# Set-up, linters, types, and the tests with at least 85 % of relora/'s lines covered.
#
#   bash launch/test.sh                          everything but the tests marked slow and gpu
#   bash launch/test.sh tests/test_plan.py -x    arguments go to pytest; no coverage then
#
# Environment: PYTHON, VENV (see env.sh).
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
set_up dev

ruff check .
ruff format --check .
mypy
shellcheck launch/*.sh launch/slurm.sbatch
if (($# > 0)); then
    exec pytest "$@"
fi
# Each test keeps to one thread; those of a file share what they make, so a file stays together.
exec pytest -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder \
    --cov=relora --cov-report=term:skip-covered --cov-fail-under=85
