#!/usr/bin/env bash
# Full rank, LoRA and ReLoRA on the same data, one after the other, and a report that compares them.
# Run it again to go on after a stop; what is finished is not trained again.
#
#   bash launch/compare.sh configs/quickstart_relora.yaml
#   SEEDS=3 TO=runs/mine bash launch/compare.sh CONFIG train.steps=1000    arguments override CONFIG
#   ARMS=configs/arms/ablation.yaml bash launch/compare.sh configs/ablation.yaml
#
# Environment: TO (runs/NAME_comparison), ARMS (a YAML file; the paper's arms), SEEDS, DEVICES,
# PYTHON, VENV (see env.sh).
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
(($# > 0)) || die "give a config: bash launch/compare.sh CONFIG [a.b=c …]"
CONFIG=$1
shift
TO=${TO:-runs/$(basename "${CONFIG%.yaml}")_comparison}
DEVICES=${DEVICES:-$((GPUS > 0 ? GPUS : 2))}
OPTIONS=(--to "$TO" --devices "$DEVICES")
[[ -z ${ARMS:-} ]] || OPTIONS+=(--arms "$ARMS")
[[ -z ${SEEDS:-} ]] || OPTIONS+=(--seeds "$SEEDS")
set_up ""

relora prepare "$CONFIG" "$@"
relora arms "$CONFIG" "${OPTIONS[@]}" "$@"
mapfile -t RUNS <"$TO/runs.txt"
relora compare "${RUNS[@]}" --to "$TO/report"
