# shellcheck shell=bash
# Sourced by the scripts beside it: where things are, and the set-up of the virtual environment.
#
#   PYTHON   interpreter that makes the environment, 3.11 or newer   (python3)
#   VENV     where it lies; made if it is not there                   (.venv)
#   DEVICES  ranks on this machine             (all GPUs; 2 on a machine without)
#   CONSTRAINTS  versions it gets              (launch/constraints.txt); others want another VENV

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT" || exit
PYTHON=${PYTHON:-python3}
VENV=${VENV:-$ROOT/.venv}
CONSTRAINTS=${CONSTRAINTS:-launch/constraints.txt}
export DS_BUILD_OPS=0               # DeepSpeed compiles nothing, neither here nor later
export DS_ACCELERATOR               # cpu where there is no GPU, or if it was so before
export TOKENIZERS_PARALLELISM=false # tokenizers warns when its process forks

die() {
    echo "relora: $*" >&2
    exit 1
}

# Prints how many GPUs the driver of this machine knows, whatever is hidden from programs.
count_gpus() {
    local found
    found=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU ' || true)
    if ((found == 0)); then # not every container has nvidia-smi
        found=$(find /proc/driver/nvidia/gpus -mindepth 1 -maxdepth 1 2>/dev/null | wc -l)
    fi
    echo "$found"
}

# Prints how many of them a program started from here would see. CUDA reads its list up to the
# first entry that names none.
count_visible_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+x} ]]; then
        awk -F, '{ while (++i <= NF && $i ~ /^ *([0-9]+|GPU-.*|MIG-.*) *$/); print i - 1 }' \
            <<<"${CUDA_VISIBLE_DEVICES%%$'\n'*}"
    else
        echo "$GPUS_HERE"
    fi
}

# A list of GPUs on a machine without any means nothing. On one that has some an empty list is for
# `relora launch` to judge: training on the CPU by mistake would take days.
GPUS_HERE=$(count_gpus)
if [[ $GPUS_HERE == 0 || ${DS_ACCELERATOR-} == cpu ]]; then
    DS_ACCELERATOR=cpu
    # shellcheck disable=SC2034 # the scripts use it
    GPUS=0
else
    [[ ${DS_ACCELERATOR-} ]] || unset DS_ACCELERATOR
    # shellcheck disable=SC2034
    GPUS=$(count_visible_gpus)
fi

# set_up EXTRAS: makes $VENV what pyproject.toml and $CONSTRAINTS say, and puts it on the PATH.
# Says nothing and takes no time if it is so already. The stamp is written last: an environment
# left half made by a kill has none, and is mended by the next call.
set_up() {
    local extras=$1 stamp=$VENV/relora.stamp key
    key=$(echo "$ROOT $VENV" | cat - pyproject.toml "$CONSTRAINTS" | cksum)
    # dev holds all that a plain installation does
    if [[ ! -x $VENV/bin/python ]] || ! grep -qsx -e "$key $extras" -e "$key dev" "$stamp"; then
        rm -f "$stamp"
        _make_venv
        echo "relora: installing into $VENV (once, some minutes on a slow line)" >&2
        _install "$extras"
        echo "$key $extras" >"$stamp"
        echo "relora: set up in $SECONDS s" >&2
    fi
    PATH=$VENV/bin:$PATH
}

# Makes the environment, or mends one whose pip does not run. With a GPU, a torch that $PYTHON
# already has (a vendor's container, say) is kept, by letting the environment see it.
_make_venv() {
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        die "needs Python 3.11 or newer, and $PYTHON is $("$PYTHON" --version 2>&1 || true);" \
            "set PYTHON=/path/to/python3.11"
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 && return
    local options=()
    _keeps_torch && options+=(--system-site-packages)
    if [[ -e $VENV/pyvenv.cfg ]]; then
        options+=(--clear) # ours to clear: an environment, but a broken one
    fi
    "$PYTHON" -m venv "${options[@]}" "$VENV" ||
        die "could not make $VENV; on Debian and Ubuntu: apt install python3-venv"
}

_keeps_torch() {
    ((GPUS_HERE > 0)) && "$PYTHON" -c 'import torch' 2>/dev/null
}

_install() {
    local extras=$1 pins=$VENV/constraints.txt torch
    cp "$CONSTRAINTS" "$pins"
    if _keeps_torch; then
        sed -i '/^torch==/d' "$pins"
    elif ((GPUS_HERE == 0)); then
        torch=$(grep '^torch==' "$pins")
        _install_cpu_torch "$torch" "$pins"
    fi
    _pip -c "$pins" -e ".${extras:+[$extras]}"
}

# The CPU build of torch, a tenth of the size: from what pip already sees (a mirror or a folder of
# wheels), then from PyTorch's own index if it answers. Else the plain build will do as well.
_install_cpu_torch() {
    local torch=$1 pins=$2 index=https://download.pytorch.org/whl/cpu
    "$VENV/bin/python" -m pip show -q torch 2>/dev/null && return
    "$VENV/bin/python" -m pip install -q -c "$pins" "$torch+cpu" 2>/dev/null && return
    if "$VENV/bin/python" -c \
        "from urllib.request import urlopen; urlopen('$index/torch/', timeout=3)" 2>/dev/null; then
        _pip --extra-index-url "$index" -c "$pins" "$torch+cpu"
    fi
}

# pip without its chatter; what it said is shown if it fails.
_pip() {
    "$VENV/bin/python" -m pip install -q --disable-pip-version-check "$@" >"$VENV/pip.log" 2>&1 || {
        cat "$VENV/pip.log" >&2
        die "pip could not install $*; the same command goes on from here"
    }
}
