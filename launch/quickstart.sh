#!/usr/bin/env bash
# From a fresh clone to a small Llama trained by ReLoRA on real text, next to its full-rank
# baseline: within ten minutes on two CPU cores. A GPU is used if there is one.
#
#   bash launch/quickstart.sh
#
# Run it again to go on after a stop; once all is done it only says so.
# Environment: DEVICES, PYTHON, VENV (see env.sh), PROMPT.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
PROMPT=${PROMPT:-def main(}
RELORA=runs/quickstart_relora FULL=runs/quickstart_full REPORT=runs/quickstart_report
EXPORT=$RELORA/export SAMPLE=$RELORA/sample.txt

# Ranks: all GPUs, or two without; fewer where the batch of 16 sequences could not be shared out.
DEVICES=${DEVICES:-$((GPUS > 0 ? GPUS : 2))}
[[ $DEVICES =~ ^[1-9][0-9]{0,4}$ ]] || die "DEVICES=$DEVICES: must be a whole number from 1 up"
while ((16 % DEVICES)); do
    DEVICES=$((DEVICES - 1))
done
MICRO_BATCH=$((16 / DEVICES < 8 ? 16 / DEVICES : 8))

TIMES=()
# phase NAME COMMAND…: runs it and keeps how long it took.
phase() {
    local name=$1 before=$SECONDS
    shift
    echo "── $name"
    "$@"
    TIMES+=("$(printf '%-28s %4d s' "$name" $((SECONDS - before)))")
}

# newer FILE OTHER…: whether FILE is there and no older than the others.
newer() {
    local file=$1 other
    shift
    [[ -e $file ]] || return
    for other in "$@"; do
        [[ ! $other -nt $file ]] || return
    done
}

# train METHOD: one run under the deepspeed launcher; nothing if it is finished.
train() {
    local config=configs/quickstart_$1.yaml state=runs/quickstart_$1/run_state.json
    if newer "$state" "$config" && grep -q '"status": "finished"' "$state"; then
        echo "finished: runs/quickstart_$1"
        return
    fi
    # (Its own front-end takes the first GPUs of the machine, whatever CUDA_VISIBLE_DEVICES says.)
    relora launch --devices "$DEVICES" "$config" batch.micro_batch_size="$MICRO_BATCH"
}

report() {
    local state=$RELORA/run_state.json
    if newer "$EXPORT/config.json" "$state" && newer "$SAMPLE" "$state" &&
        newer "$REPORT/report.html" "$state" "$FULL/run_state.json"; then
        echo "finished: $REPORT"
        return
    fi
    relora export "$RELORA" --to "$EXPORT" --force
    relora generate "$RELORA" --prompt "$PROMPT" | tee "$SAMPLE"
    relora compare "$RELORA" "$FULL" --to "$REPORT"
}

phase "set-up" set_up ""
phase "prepare" relora prepare configs/quickstart_relora.yaml
phase "train: ReLoRA" train relora
phase "train: full-rank baseline" train full
phase "export, sample, comparison" report

cat <<END

$(printf '%s\n' "${TIMES[@]}")
$(printf '%-28s %4d s' together "$SECONDS")

runs                 $RELORA  $FULL   (metrics.jsonl, log.txt, checkpoints/)
report               $REPORT/report.html  $REPORT/curves_tokens.png
model                $EXPORT   (transformers' AutoModelForCausalLM loads it)
generated text       $SAMPLE
all curves, live     $VENV/bin/tensorboard --logdir runs
END
