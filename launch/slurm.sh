#!/usr/bin/env bash
# A run on several nodes of a SLURM cluster; `launch/slurm.sh --help` says how. Not run on a cluster yet.
set -euo pipefail

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck disable=SC2034
SCRIPT="launch/slurm.sh"
# shellcheck source-path=SCRIPTDIR source=_remote.sh disable=SC1091
source "$ROOT/launch/_remote.sh"
# shellcheck source-path=SCRIPTDIR source=_again.sh disable=SC1091
source "$ROOT/launch/_again.sh"

usage() {
    cat <<'TEXT'
usage: launch/slurm.sh [--nodes N] [--gpus N] [--name NAME] [--sbatch "OPTIONS"] [--dry-run] -- CONFIG [--out DIR] ...

Submits a job of one process a node: the first installs this checkout, then launch/train.sh runs on all together. The
checkout and DIR (default: runs/NAME_OF_CONFIG in the current folder) must lie where all nodes see them.

Two to three minutes before its time is up the job gets TERM; it saves, goes back into the queue and goes on from there. So
does a preempted one, where the partition preempts by requeueing. `scancel` ends it; the same command then goes on.

  --nodes N     nodes (default 1)
  --gpus N      GPUs of each node (default: none, on the CPU)
  --name NAME   of the job (default sftrec)
  --sbatch O    further options of sbatch, such as "--partition=gpu --time=24:00:00"
  --dry-run     prints the command instead of running it
TEXT
}

NODES=1 GPUS="" NAME=sftrec MORE=() REST=()
while [[ $# -gt 0 ]]; do
    case "$1" in
        -h | --help)
            usage
            exit 0
            ;;
        --nodes) need "$@" && NODES="$VALUE" && shift ;;
        --gpus) need "$@" && GPUS="$VALUE" && shift ;;
        --name) need "$@" && NAME="$VALUE" && shift ;;
        --sbatch)
            [[ -n "${2:-}" ]] || fail "--sbatch needs a value"
            read -r -a MORE <<<"$2"
            shift
            ;;
        --dry-run) DRY_RUN=1 ;;
        --)
            shift
            REST=("$@")
            break
            ;;
        *) fail "unknown word $1" ;;
    esac
    shift
done
[[ "$NODES" =~ ^[1-9][0-9]*$ ]] || fail "--nodes $NODES: use a number from 1 on"
[[ -z "$GPUS" || "$GPUS" =~ ^[1-9][0-9]*$ ]] || fail "--gpus $GPUS: use a number from 1 on"
run_words ${REST[@]+"${REST[@]}"}
CONFIG="$ROOT/$(inside "$CONFIG")"
BASE="$(basename -- "$CONFIG")"
OUT="${OUT:-runs/${BASE%.*}}"
[[ "$OUT" == /* ]] || OUT="$PWD/$OUT"
SET=(SFTREC_DEVICE=cpu)
[[ -z "$GPUS" ]] || SET=(SFTREC_DEVICE=cuda)
TRAIN=(bash "$ROOT/launch/train.sh")
FIRST="srun --nodes=1 --ntasks=1 $(quoted env "${SET[@]}" "${TRAIN[@]}" --install-only)"
[[ "$NODES" == 1 ]] || SET+=(SFTREC_DISTRIBUTED=auto)
# A job that was requeued has the same words; what it began before is gone on with, not overwritten or refused.
SET+=(SFTREC_REPLACES="$(stamp "$OUT")")
# `env` becomes train.sh, which is then the process that SLURM signals; the batch shell (a POSIX one) is not signalled.
TASK="srun $(quoted env "${SET[@]}" "${TRAIN[@]}" "$CONFIG" --out "$OUT" ${PASSED[@]+"${PASSED[@]}"})"
# shellcheck disable=SC2016
REQUEUE='[ "$STATUS" -ne '"$AGAIN"' ] || scontrol requeue "$SLURM_JOB_ID"; exit "$STATUS"'
act sbatch --job-name "$NAME" --nodes "$NODES" --ntasks-per-node 1 ${GPUS:+--gpus-per-node "$GPUS"} \
    --requeue --open-mode=append --signal=TERM@120 ${MORE[@]+"${MORE[@]}"} \
    --wrap "STATUS=0; $FIRST && $TASK || STATUS=\$?; $REQUEUE"
