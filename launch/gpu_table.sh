#!/usr/bin/env bash
# What this machine's GPU makes of it: the tests of all graphs on CUDA, then `relora bench` of the
# shipped sizes in bf16, as they are and compiled: tables here, and in TO for each a bench.json
# (device, date, commit) and a bench.png.
#
#   bash launch/gpu_table.sh
#   CONFIGS=configs/quickstart_relora.yaml bash launch/gpu_table.sh --rounds 3   for bench
#
# Without a GPU it does the same on the CPU, which is a rehearsal. Environment: CONFIGS, TO
# (runs/gpu_table), PYTHON, VENV (see env.sh).
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
TO=${TO:-runs/gpu_table}
((GPUS > 0)) || echo "relora: no GPU here, so this is a rehearsal on the CPU" >&2
set_up dev

# table NAME CONFIG ARGUMENTS…: as it is and, on a GPU and with a rank, with compiled blocks
table() {
    local name=$1 config=$2
    shift 2
    printf '\n── %s\n' "$name"
    relora bench "$config" --precision bf16 --to "$TO/$name" "$@"
    if ((GPUS > 0)) && ! grep -q '^lora: {blocks' "$config"; then
        printf '\n── %s, compiled\n' "$name"
        relora bench "$config" train.compile=blocks --precision bf16 \
            --to "$TO/${name}_compiled" "$@"
    fi
}

pytest -q -m gpu tests/test_gpu.py -k graph
if [[ ${CONFIGS-} ]]; then
    for config in $CONFIGS; do
        table "$(basename "${config%.yaml}")" "$config" "$@"
    done
    exit
fi
for size in 60m 130m 350m; do
    table "llama_${size}_relora" "configs/llama_${size}_relora.yaml" "$@"
    table "published/llama_$size" "configs/published/llama_$size.yaml" "$@"
done
table llama_1b3_relora configs/llama_1b3_relora.yaml "$@"
# All arms at once would not fit 80 GB.
table published/llama_1b3 configs/published/llama_1b3.yaml "$@" --arms full_lean relora frozen_a
table published/llama_1b3_blocks configs/published/llama_1b3.yaml "$@" --blocks 4
