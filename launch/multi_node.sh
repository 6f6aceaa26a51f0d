#!/usr/bin/env bash
# Train on the machines of a hostfile, started from any of them; each is reached by ssh without a
# password and sees this folder, its .venv and the data under the same path. Needs pdsh here.
# Run it again to go on after a stop.
#
#   HOSTFILE=launch/hostfile CONFIG=configs/llama_1b3_relora.yaml bash launch/multi_node.sh
#
# Environment: HOSTFILE (see hostfile.example), CONFIG, PYTHON, VENV (see env.sh).
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
CONFIG=${CONFIG:-configs/llama_1b3_relora.yaml}
HOSTFILE=${HOSTFILE:-$ROOT/launch/hostfile}

[[ -f $HOSTFILE ]] || die "no $HOSTFILE: copy launch/hostfile.example there and name your machines"
command -v pdsh >/dev/null || die "needs pdsh, which starts the ranks: apt install pdsh"
# A machine that does not answer would leave the others waiting for half an hour. The shell over
# there reads the folder's name once more, so it goes quoted.
printf -v there %q "$ROOT"
while read -r host _ || [[ $host ]]; do
    [[ -z $host || $host == \#* ]] && continue
    [[ $host != -* ]] || die "$HOSTFILE: $host is not the name of a machine"
    ssh -n -o BatchMode=yes -o ConnectTimeout=5 -- "$host" "test -d $there" ||
        die "$host ($HOSTFILE) is not reached by ssh without a password, or has no $ROOT"
done <"$HOSTFILE"
set_up ""

relora prepare "$CONFIG" "$@"
exec relora launch --hostfile "$HOSTFILE" "$CONFIG" "$@"
