#!/usr/bin/env bash
# Set-up, linters, types, and the tests with at least 85 % of relora/'s lines covered.
#
#   bash launch/test.sh                          everything but the tiers slow and gpu
#   bash launch/test.sh unit                     one tier: unit, process, launch, slow, gpu
#   bash launch/test.sh tests/test_plan.py -x    arguments go to pytest; no coverage then
#
# Tiers: tests/README.md. Environment: PYTHON, VENV, CONSTRAINTS (see env.sh).
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
set_up dev
unset PYTHONDONTWRITEBYTECODE # hundreds of processes would compile everything anew

if [[ $CONSTRAINTS == launch/constraints.txt ]]; then # not what other versions are for
    ruff check .
    ruff format --check .
    mypy
    shellcheck launch/*.sh launch/slurm.sbatch
fi
# Each test keeps to one thread; those of a file share what they make, so a file stays together.
parallel=(-n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder)
case ${1-} in
    "") ;;
    unit | process | launch | slow) exec pytest "${parallel[@]}" -m "$@" ;;
    gpu) exec pytest -m "$@" ;;
    *) exec pytest "$@" ;;
esac
exec pytest "${parallel[@]}" \
    --cov=relora --cov-report=term:skip-covered --cov-fail-under=85
