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

# A signal only leaves a file, which the ranks find at the end of a step: from the first line on, for Slurm may signal
# early. (bash handles a trap only between commands and while it waits.)
[ -w "${TMPDIR:-/tmp}" ] || export TMPDIR=/tmp  # a TMPDIR of another job, or of none
export STOP_FILE="${TMPDIR:-/tmp}/lora_stop.$$.$RANDOM"
stopping=0 job=
# shellcheck disable=SC2329
stop() {
    if [ "$stopping" = 1 ] && [ "$1" = INT ]; then
        echo "killed without saving; the same command resumes from the last checkpoint" >&2 || true
        [ -z "$job" ] || kill -KILL -- "-$job" 2>/dev/null || true
        return
    fi
    stopping=1
    # The folder is gone: every rank hears it itself.
    touch "$STOP_FILE" 2>/dev/null || { [ -n "$job" ] && kill -TERM -- "-$job"; } || true
    echo "stopping at the end of this step and saving (Ctrl-C again: kill without saving)" >&2 || true
}
for name in HUP INT TERM USR1; do
    # shellcheck disable=SC2064
    trap "stop $name" "$name"
done
# Before the job has begun, a signal may also have ended a command of this script.
trap 'code=$?; rm -f "$STOP_FILE"; [ -n "$job" ] || { [ $stopping = 0 ] && [ $code -lt 128 ]; } || exit 75' EXIT
give_up() {
    [ "$stopping" = 1 ] || echo "error: $1" >&2
    exit 2
}

# Under sbatch, $0 is Slurm's copy of this file: look beside it, then where sbatch was called.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
for folder in "$here" "${SLURM_SUBMIT_DIR:-$here}" "${SLURM_SUBMIT_DIR:-$here}/deepspeed"; do
    if [ -f "$folder/lora_sft/train.py" ]; then here=$folder && break; fi
done
[ -f "$here/main.py" ] || give_up "main.py is not beside $here; call sbatch in the repository's folder"
# shellcheck source=env.sh
source "$here/../env.sh" || exit 2
use_v100_environment
has_deepspeed || give_up "no environment with DeepSpeed is active; run: make install"
[ $stopping = 0 ] || exit 75

# In a process session of its own, so that a signal to this script reaches nothing else. Slurm may signal every process:
# those signals are ignored until Python listens.
(trap '' HUP INT TERM USR1 && exec setsid python "$here/main.py" "$@") &
job=$!

# A trapped signal interrupts `wait`; bash remembers the exit code of a job that ended meanwhile.
while wait "$job" || true; kill -0 "$job" 2>/dev/null; do :; done
code=0
wait "$job" || code=$?
exit "$code"
