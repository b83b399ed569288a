# shellcheck shell=bash
# Sourced by the Makefile, by the launcher and by you (`source env.sh`): activates the environment, and
# with LLM_STORAGE=/some/large/disk moves everything big there: the environment itself (9 GB) and all
# caches that would otherwise fill the home quota. A cache variable that is already set is left alone.

_repo=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

if [ -n "${LLM_STORAGE:-}" ]; then
    mkdir -p "$LLM_STORAGE" || { echo "error: LLM_STORAGE=$LLM_STORAGE cannot be created" >&2; return 2; }
    LLM_STORAGE=$(cd "$LLM_STORAGE" && pwd)
    export LLM_STORAGE
    export PIP_CACHE_DIR="${PIP_CACHE_DIR:-$LLM_STORAGE/pip}"
    export UV_CACHE_DIR="${UV_CACHE_DIR:-$LLM_STORAGE/uv}"
    export HF_HOME="${HF_HOME:-$LLM_STORAGE/huggingface}"
    export FLASHINFER_WORKSPACE_BASE="${FLASHINFER_WORKSPACE_BASE:-$LLM_STORAGE/flashinfer}"
    export TVM_FFI_CACHE_DIR="${TVM_FFI_CACHE_DIR:-$LLM_STORAGE/tvm-ffi}"
    export SGLANG_DG_CACHE_DIR="${SGLANG_DG_CACHE_DIR:-$LLM_STORAGE/deep_gemm}"
    export TRITON_HOME="${TRITON_HOME:-$LLM_STORAGE/triton}"
    export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$LLM_STORAGE/torch_extensions}"
    export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$LLM_STORAGE/torchinductor}"
    export XDG_CACHE_HOME="${XDG_CACHE_HOME:-$LLM_STORAGE/cache}"  # matplotlib and whatever else asks
fi

# The first of python3.11, python3.12, python3, python that is 3.11 or 3.12.
_supported_python() {
    local candidate
    for candidate in ${1:-python3.11 python3.12 python3 python}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    echo "error: Python 3.11 or 3.12 is needed; found $(python3 --version 2>&1)." \
        "Load a module or name one: make PYTHON=/path/to/python3.11 ..." >&2
    return 2
}

# install_environment VENV LOCK [PYTHON [FOLDER]]: the lock, then the package in FOLDER. The stamp VENV/.installed is written last, so an installation
# that was interrupted is done again. `venv --without-pip` works without Debian's python3-venv package.
install_environment() (
    set -eu
    cd "$_repo"
    python=$(_supported_python "${3:-}")
    if [ -n "${LLM_STORAGE:-}" ] && [ ! -d "$1" ]; then
        target="$LLM_STORAGE/${1#.}-$(cksum <"$2" | cut -d' ' -f1)"
        mkdir -p "$target"
        ln -sfn "$target" "$1"
    fi
    echo "Installing $2 into $1 with $("$python" --version) (once; some minutes)"
    rm -f "$1/.installed"
    [ -x "$1/bin/python" ] || "$python" -m venv --without-pip "$(readlink -f "$1")"
    uv=$(command -v uv || true)
    if [ -z "$uv" ]; then
        "$python" -m pip --disable-pip-version-check --python "$1/bin/python" install -q \
            "$(grep '^uv==' "$2")" && uv=$1/bin/uv || echo "uv is not to be had: pip does the work (10 minutes)"
    fi
    if [ -n "$uv" ]; then
        "$uv" pip install -q --python "$1/bin/python" --compile-bytecode -r "$2"
    else
        "$python" -m pip --disable-pip-version-check --python "$1/bin/python" install -q -r "$2"
    fi
    if [ -n "${4:-}" ]; then
        if [ -n "$uv" ]; then
            "$uv" pip install -q --python "$1/bin/python" --no-deps --reinstall "$4"
        else
            "$python" -m pip --disable-pip-version-check --python "$1/bin/python" install -q --no-deps \
                --force-reinstall "$4"
        fi
    fi
    touch "$1/.installed"
)

has_deepspeed() {
    command -v python >/dev/null && python -c 'import importlib.metadata as m; m.version("deepspeed")' 2>/dev/null
}

# What makes a visible GPU one for .venv-v100: compute capability below 7.5, or a driver below 580. Silent without one.
needs_v100() {
    [ -n "${CUDA_VISIBLE_DEVICES-all}" ] || return 1
    # shellcheck disable=SC2086
    nvidia-smi ${CUDA_VISIBLE_DEVICES:+-i "$CUDA_VISIBLE_DEVICES"} --query-gpu=compute_cap,driver_version \
        --format=csv,noheader 2>/dev/null | awk -F', *' '
            /^[0-9]/ && $1 < 7.5 { why = "compute capability " $1 }
            /^[0-9]/ && $2 + 0 < 580 { why = "driver " $2 }
            END { if (why) print why; else exit 1 }'
}

# Training on such a GPU: .venv-v100, if it was made, takes the place of our .venv, and of no other environment.
use_v100_environment() {
    local why
    [ -z "${VENV:-}" ] && [ "${VIRTUAL_ENV:-}" = "$_repo/.venv" ] && [ -x "$_repo/.venv-v100/bin/python" ] || return 0
    why=$(needs_v100) || return 0
    export VIRTUAL_ENV="$_repo/.venv-v100"
    export PATH="$VIRTUAL_ENV/bin:$PATH"
    echo "GPU with $why: the environment is .venv-v100"
}

# The end of a Slurm job whose step ended with code $1, 75: stopped and saved, or a node was lost; 128 and more: killed, as
# what a lost node left. It goes back into the queue, at most 20 times; a cancelled job is not RUNNING.
end_or_requeue() {
    if { [ "$1" = 75 ] || [ "$1" -ge 128 ]; } && [ "$(squeue --noheader --job "$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
        if [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
            scontrol requeue "$SLURM_JOB_ID"
        else
            echo "requeued 20 times already; the same command goes on"
        fi
    fi
    exit "$1"
}

# An environment that is active and has DeepSpeed stays (a bare conda base does not count); VENV names one.
if [ -n "${VENV:-}" ] || [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] ||
    ! has_deepspeed; then
    _venv=${VENV:-.venv}
    [ -n "${VENV:-}" ] || [ -d "$_repo/.venv" ] || [ ! -d "$_repo/.venv-v100" ] || _venv=.venv-v100
    case $_venv in /*) ;; *) _venv=$_repo/$_venv ;; esac
    if [ -x "$_venv/bin/python" ]; then
        export VIRTUAL_ENV="$_venv"
        export PATH="$VIRTUAL_ENV/bin:$PATH"
    elif [ -n "${VENV:-}" ]; then
        echo "error: VENV=$VENV: no environment there; run: make install (or make install-v100)" >&2
        return 2
    fi
fi
