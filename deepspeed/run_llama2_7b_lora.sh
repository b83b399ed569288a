#!/usr/bin/env bash
# Fine-tunes Llama-2-7B with LoRA under DeepSpeed ZeRO-3 on every GPU in CUDA_VISIBLE_DEVICES.
#
#   bash deepspeed/run_llama2_7b_lora.sh                      # the assignment: 2 GPUs of 16 GB
#   bash deepspeed/run_llama2_7b_lora.sh --rehearse           # the same path on the CPU, a tiny model
#   bash deepspeed/run_llama2_7b_lora.sh --preflight_only     # what would fail, and the cure
#   bash deepspeed/run_llama2_7b_lora.sh -h                   # all flags
#
# Environment: LLM_STORAGE (folder for the environment and all caches), VENV (.venv-v100 on Volta),
# CUDA_VISIBLE_DEVICES, GPU_MEMORY_CAP_GIB (rehearse a smaller card).
# Ctrl-C, or SIGTERM/SIGUSR1 from Slurm: finishes the step, saves, exits 75; the same command resumes.
set -euo pipefail

# Under sbatch, $0 is Slurm's copy of this file: look beside it, then where sbatch was called.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
for folder in "$here" "${SLURM_SUBMIT_DIR:-$here}" "${SLURM_SUBMIT_DIR:-$here}/deepspeed"; do
    if [ -f "$folder/lora_sft/train.py" ]; then here=$folder && break; fi
done
if [ ! -f "$here/main.py" ]; then
    echo "error: main.py is not beside $here; call sbatch in the repository's folder" >&2
    exit 2
fi
# shellcheck source=env.sh
source "$here/../env.sh" || exit 2
if ! command -v python >/dev/null || ! python -c 'import importlib.metadata as m; m.version("deepspeed")' 2>/dev/null; then
    echo "error: no environment with DeepSpeed is active; run: make install" >&2
    exit 2
fi

# The job runs in its own process session, so a signal that reaches this script reaches nothing else: it only
# leaves a file, which the ranks find at the end of a step. (bash handles a trap only while it waits.)
[ -w "${TMPDIR:-/tmp}" ] || export TMPDIR=/tmp  # a TMPDIR of another job, or of none
STOP_FILE=$(mktemp -u "${TMPDIR:-/tmp}/lora_stop.XXXXXX")
export STOP_FILE
stopping=0
setsid python "$here/main.py" "$@" &
job=$!

# shellcheck disable=SC2329
stop() {
    if [ "$stopping" = 1 ] && [ "$1" = INT ]; then
        echo "killed without saving; the same command resumes from the last checkpoint" >&2 || true
        kill -KILL -- "-$job" 2>/dev/null || true
        return
    fi
    stopping=1
    touch "$STOP_FILE" 2>/dev/null || kill -TERM -- "-$job" || true  # the folder is gone: every rank hears it itself
    echo "stopping at the end of this step and saving (Ctrl-C again: kill without saving)" >&2 || true
}
for name in HUP INT TERM USR1; do
    # shellcheck disable=SC2064
    trap "stop $name" "$name"
done

# A trapped signal interrupts `wait`; bash remembers the exit code of a job that ended meanwhile.
while wait "$job" || true; kill -0 "$job" 2>/dev/null; do :; done
code=0
wait "$job" || code=$?
rm -f "$STOP_FILE"
exit "$code"
