#!/usr/bin/env bash
# A run on several nodes of a SLURM cluster; `launch/slurm.sh --help` says how. Not run on a cluster yet.
set -euo pipefail

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck disable=SC2034
SCRIPT="launch/slurm.sh"
# shellcheck source-path=SCRIPTDIR source=_remote.sh disable=SC1091
source "$ROOT/launch/_remote.sh"

usage() {
    cat <<'TEXT'
usage: launch/slurm.sh [--nodes N] [--gpus N] [--name NAME] [--sbatch "OPTIONS"] [--dry-run] -- CONFIG [--out DIR] ...

Submits a job of one process a node: the first installs this checkout, then launch/train.sh runs on all together. The
checkout and DIR (default: runs/NAME_OF_CONFIG in the current folder) must lie where all nodes see them.

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
DEVICE="SFTREC_DEVICE=cpu"
[[ -z "$GPUS" ]] || DEVICE="SFTREC_DEVICE=cuda"
TRAIN="$(quoted bash "$ROOT/launch/train.sh")"
TASK="$DEVICE SFTREC_DISTRIBUTED=auto $TRAIN $(quoted "$CONFIG" --out "$OUT" ${PASSED[@]+"${PASSED[@]}"})"
[[ "$NODES" != 1 ]] || TASK="${TASK/SFTREC_DISTRIBUTED=auto /}"
FIRST="srun --nodes=1 --ntasks=1 $(quoted bash -c "$DEVICE $TRAIN --install-only")"
act sbatch --job-name "$NAME" --nodes "$NODES" --ntasks-per-node 1 ${GPUS:+--gpus-per-node "$GPUS"} ${MORE[@]+"${MORE[@]}"} \
    --wrap "$FIRST && srun $(quoted bash -c "$TASK")"
