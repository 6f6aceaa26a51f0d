#!/usr/bin/env bash
# Prepare the data and train on all devices of this machine. Run it again to go on after a stop.
#
#   CONFIG=configs/llama_60m_relora.yaml bash launch/train.sh
#   bash launch/train.sh train.steps=30000 seed=1        arguments override the config
#
# Environment: CONFIG, DEVICES, PYTHON, VENV (see env.sh).
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
CONFIG=${CONFIG:-configs/llama_60m_relora.yaml}
DEVICES=${DEVICES:-$((GPUS > 0 ? GPUS : 2))}
set_up ""

relora prepare "$CONFIG" "$@"
exec relora launch --devices "$DEVICES" "$CONFIG" "$@"
