#!/usr/bin/env bash
# A run on TPUs of a GKE cluster, by XPK; `launch/gke.sh --help` says how. Not run on a pod yet.
set -euo pipefail

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck disable=SC2034
SCRIPT="launch/gke.sh"
# shellcheck source-path=SCRIPTDIR source=_remote.sh disable=SC1091
source "$ROOT/launch/_remote.sh"

usage() {
    cat <<'TEXT'
usage: launch/gke.sh run|delete --cluster C --name NAME --zone ZONE [OPTIONS] [-- CONFIG --out DIR ...]

  run      submits launch/train.sh as an XPK workload: --type TYPE, such as v5litepod-16; -- CONFIG --out DIR and options of
           `sftrec run`; DIR is a folder that all pods see, such as a mounted bucket
  delete   removes the workload

A workload whose pods are taken away saves and is restarted up to N times (--restarts): the same DIR goes on.

  --slices N      slices of that type (default 1)
  --restarts N    (default 100)
  --image I       the image that this checkout is laid upon (default python:3.11)
  --project P     instead of the default
  --dry-run       prints the commands instead of running them

XPK: https://github.com/AI-Hypercomputer/xpk (pip install xpk). The cluster: xpk cluster create.
TEXT
}

VERB="" CLUSTER="" NAME="" ZONE="" TYPE="" SLICES=1 RESTARTS=100 IMAGE="python:3.11"
PROJECT=() REST=()
while [[ $# -gt 0 ]]; do
    case "$1" in
        -h | --help)
            usage
            exit 0
            ;;
        run | delete) VERB="$1" ;;
        --cluster) need "$@" && CLUSTER="$VALUE" && shift ;;
        --name) need "$@" && NAME="$VALUE" && shift ;;
        --zone) need "$@" && ZONE="$VALUE" && shift ;;
        --type) need "$@" && TYPE="$VALUE" && shift ;;
        --slices) need "$@" && SLICES="$VALUE" && shift ;;
        --restarts) need "$@" && RESTARTS="$VALUE" && shift ;;
        --image) need "$@" && IMAGE="$VALUE" && shift ;;
        --project) need "$@" && PROJECT=(--project "$VALUE") && shift ;;
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
[[ -n "$VERB" ]] || fail "say what to do: run or delete"
for option in CLUSTER NAME ZONE; do
    [[ -n "${!option}" ]] || fail "--${option,,} is missing"
done
WHERE=(--cluster "$CLUSTER" --workload "$NAME" --zone "$ZONE" ${PROJECT[@]+"${PROJECT[@]}"})

case "$VERB" in
    run)
        [[ -n "$TYPE" ]] || fail "--type is missing, such as --type v5litepod-16"
        [[ "$SLICES" =~ ^[1-9][0-9]*$ ]] || fail "--slices $SLICES: use a number from 1 on"
        [[ "$RESTARTS" =~ ^[0-9]+$ ]] || fail "--restarts $RESTARTS: use a number from 0 on"
        run_words ${REST[@]+"${REST[@]}"}
        [[ "$RESTARTS" == 0 || " ${PASSED[*]-} " != *" --overwrite "* ]] ||
            fail "--overwrite would overwrite at every restart; name another --out, or add --restarts 0"
        [[ "$OUT" == /* ]] || fail "name the folder of the run with --out and an absolute path that all pods see"
        CONFIG="$(inside "$CONFIG")"
        # XPK signals the shell of the command, so train.sh takes its place (exec); it restarts on 42, 127 to 255 and what is named.
        WORDS="$(quoted "$CONFIG" --out "$OUT" ${PASSED[@]+"${PASSED[@]}"})"
        act xpk workload create "${WHERE[@]}" --tpu-type "$TYPE" --num-slices "$SLICES" --base-docker-image "$IMAGE" \
            --max-restarts "$RESTARTS" --restart-on-exit-codes 75 --termination-grace-period-seconds 120 \
            --script-dir "$ROOT" --command "exec env SFTREC_DEVICE=tpu SFTREC_DISTRIBUTED=auto bash launch/train.sh $WORDS"
        ;;
    delete) act xpk workload delete "${WHERE[@]}" ;;
esac
