#!/usr/bin/env bash
# Several processes as one run, on this machine or one on each of several; `launch/processes.sh --help` says how.
set -euo pipefail

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck disable=SC2034
SCRIPT="launch/processes.sh"
# shellcheck source-path=SCRIPTDIR source=_remote.sh disable=SC1091
source "$ROOT/launch/_remote.sh"
# shellcheck source-path=SCRIPTDIR source=_again.sh disable=SC1091
source "$ROOT/launch/_again.sh"

usage() {
    cat <<'TEXT'
usage: launch/processes.sh [--count N] [--devices D] [--coordinator HOST:PORT] [--dry-run] -- CONFIG --out DIR ...

Starts N processes on this machine, or with --index one of them. INT (Ctrl-C) and TERM go on to all of them; they save and
leave with exit code 75, and so does this script: the same command goes on with the run.

  --count N                  processes in all (default 2)
  --devices D                virtual CPU devices of each (default 1; with SFTREC_DEVICE=cuda their GPUs are shared out by you)
  --coordinator HOST:PORT    where the first process listens (default localhost:12355)
  --index I                  start only process I (0 to N-1): for one process on each of several machines, which must all see DIR
  --dry-run                  prints the commands instead of running them
TEXT
}

COUNT=2 DEVICES=1 COORDINATOR=localhost:12355 INDEX="" REST=()
while [[ $# -gt 0 ]]; do
    case "$1" in
        -h | --help)
            usage
            exit 0
            ;;
        --count) need "$@" && COUNT="$VALUE" && shift ;;
        --devices) need "$@" && DEVICES="$VALUE" && shift ;;
        --coordinator) need "$@" && COORDINATOR="$VALUE" && shift ;;
        --index) need "$@" && INDEX="$VALUE" && shift ;;
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
[[ "$COUNT" =~ ^[1-9][0-9]*$ ]] || fail "--count $COUNT: use a number from 1 on"
[[ "$DEVICES" =~ ^[1-9][0-9]*$ ]] || fail "--devices $DEVICES: use a number from 1 on"
[[ "$COORDINATOR" == *:* ]] || fail "--coordinator $COORDINATOR: write HOST:PORT"
[[ -z "$INDEX" || ("$INDEX" =~ ^[0-9]+$ && "$INDEX" -lt "$COUNT") ]] || fail "--index $INDEX: use 0 to $((COUNT - 1))"
run_words ${REST[@]+"${REST[@]}"}
[[ -n "$OUT" ]] || fail "name the folder of the run with --out"

export SFTREC_DEVICE="${SFTREC_DEVICE:-cpu}"
act bash "$ROOT/launch/train.sh" --install-only
FIRST=0 LAST=$((COUNT - 1))
[[ -z "$INDEX" ]] || FIRST="$INDEX" LAST="$INDEX"
pass_signals
for ((at = FIRST; at <= LAST && ASKED == 0; at++)); do
    COMMAND=(env SFTREC_COORDINATOR="$COORDINATOR" SFTREC_PROCESSES="$COUNT" SFTREC_PROCESS="$at")
    [[ "$SFTREC_DEVICE" != cpu ]] || COMMAND+=(XLA_FLAGS="--xla_force_host_platform_device_count=$DEVICES")
    COMMAND+=(bash "$ROOT/launch/train.sh" "$CONFIG" --out "$OUT" ${PASSED[@]+"${PASSED[@]}"})
    shown "${COMMAND[@]}"
    [[ "$DRY_RUN" == 1 ]] || begin "${COMMAND[@]}"
done
# An error of one counts more than 75 of the others.
WORST=0
for pid in ${PIDS[@]+"${PIDS[@]}"}; do
    await "$pid"
    [[ "$STATUS" == 0 || ("$STATUS" == "$AGAIN" && "$WORST" != 0) ]] || WORST="$STATUS"
done
exit "$WORST"
