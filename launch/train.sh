#!/usr/bin/env bash
# From a bare machine to a trained recommender; `launch/train.sh --help` says how.
set -euo pipefail

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
DRY_RUN=0

usage() {
    cat <<'TEXT'
usage: launch/train.sh [CONFIG] [--out DIR] [--resume | --overwrite] [--dry-run] [--SECTION.FIELD VALUE ...]

Makes a virtual environment, installs the package with what the TPU, NVIDIA GPU or CPU of this machine needs,
and runs `sftrec run CONFIG --out DIR`: prepare, train, evaluate, export.

  CONFIG                  YAML file, before any override (default: configs/movielens.yaml of this checkout)
  --out DIR               folder of the run (default: runs/NAME_OF_CONFIG below the current folder)
  --resume                go on with the run in DIR (an unfinished one is gone on with in any case)
  --overwrite             remove the run in DIR first (once: a restart goes on)
  --dry-run               print the commands instead of running them
  --install-only          make the virtual environment and run nothing
  --SECTION.FIELD VALUE   change any field of the config, such as --train.epochs 2 (`--help-config` lists them)

INT (Ctrl-C) and TERM go on to sftrec, which saves and leaves with exit code 75: "start me again". Where the signal did not
come to this script, it does so by itself; where it did, it leaves with 75, and the same command (without --overwrite) goes on later.

Several hosts: launch/tpu_vm.sh, launch/gke.sh, launch/slurm.sh, launch/processes.sh.

  SFTREC_DEVICE=tpu|cuda|cpu   instead of what is found
  SFTREC_VENV=DIR              the virtual environment (default: .venv of this checkout)
  SFTREC_PYTHON=FILE           the Python to make it with (default: the first of 3.13, 3.12, 3.11 that works)
  SFTREC_RESTARTS=N            how often it is started again at most (default 100; 0: leave with 75 instead)
TEXT
}

CONFIG="" OUT="" HOW="" LISTS=0 OVERRIDDEN=0 INSTALL_ONLY=0
PASSED=()
while [[ $# -gt 0 ]]; do
    case "$1" in
        -h | --help)
            usage
            exit 0
            ;;
        --dry-run) DRY_RUN=1 ;;
        --install-only) INSTALL_ONLY=1 ;;
        --out)
            OUT="${2:-}"
            [[ -n "$OUT" ]] || { echo "error: --out needs a folder, as in --out runs/mine" >&2 && exit 2; }
            shift
            ;;
        --out=*) OUT="${1#--out=}" ;;
        --resume | --overwrite)
            [[ "$HOW" == "" || "$HOW" == "$1" ]] || { echo "error: --resume and --overwrite were both given; use one" >&2 && exit 2; }
            HOW="$1"
            ;;
        --help-config)
            LISTS=1
            PASSED+=("$1")
            ;;
        -*)
            OVERRIDDEN=1
            PASSED+=("$1")
            ;;
        *)
            # After the first override a bare word is its value.
            if [[ -z "$CONFIG" && "$OVERRIDDEN" == 0 ]]; then CONFIG="$1"; else PASSED+=("$1"); fi
            ;;
    esac
    shift
done

# shellcheck source-path=SCRIPTDIR source=_environment.sh disable=SC1091
source "$ROOT/launch/_environment.sh"
# shellcheck source-path=SCRIPTDIR source=_again.sh disable=SC1091
source "$ROOT/launch/_again.sh"

if [[ -z "$CONFIG" ]]; then
    CONFIG="$ROOT/configs/movielens.yaml"
elif [[ ! -e "$CONFIG" && -e "$ROOT/$CONFIG" ]]; then
    CONFIG="$ROOT/$CONFIG"
fi
[[ -f "$CONFIG" ]] || fail "$CONFIG: no such config; name a YAML file such as $ROOT/configs/quick.yaml"
NAME="$(basename -- "$CONFIG")"
OUT="${OUT:-runs/${NAME%.*}}"
LIMIT="${SFTREC_RESTARTS:-100}"
[[ "$LIMIT" =~ ^[0-9]{1,9}$ ]] || fail "SFTREC_RESTARTS is '$LIMIT'; use a number from 0 on"
LIMIT=$((10#$LIMIT))

find_device
say "device: $DEVICE${SFTREC_DEVICE:+ (as SFTREC_DEVICE says)}"
install "run-$DEVICE" -e "$ROOT${EXTRA:+[$EXTRA]}"
[[ "$INSTALL_ONLY" == 0 ]] || exit 0

# Of several processes each looks for itself, and all see the same: nothing is written before the last one has joined.
REPLACES="${SFTREC_REPLACES:-$(stamp "$OUT")}"
if [[ "$LISTS" == 0 && "$HOW" == "" && -f "$OUT/config.yaml" && ! (-f "$OUT/metrics.json" && -d "$OUT/export") ]]; then
    say "run: $OUT was not finished; going on with it (--overwrite starts again)"
    HOW=--resume
fi

# Sets COMMAND. What has been begun since the order (of this script, or of a job) is gone on with, not overwritten.
compose() {
    local found
    found="$(stamp "$OUT")"
    [[ "$found" == none || "$found" == "$REPLACES" ]] || HOW=--resume
    COMMAND=("$VENV/bin/sftrec" run "$CONFIG" --out "$OUT" ${PASSED[@]+"${PASSED[@]}"} ${HOW:+"$HOW"})
}

compose
if [[ "$DRY_RUN" == 1 ]]; then
    show "${COMMAND[@]}"
    exit 0
fi
RESTARTS=0 DELAY=1
pass_signals
while true; do
    SINCE="$SECONDS" PIDS=()
    begin "${COMMAND[@]}"
    await "${PIDS[0]}"
    [[ "$STATUS" == "$AGAIN" && "$ASKED" == 0 ]] || exit "$STATUS"
    if ((RESTARTS >= LIMIT)); then
        say "run: $OUT asks to be started again (exit code $AGAIN) and was $RESTARTS times (SFTREC_RESTARTS); the same command goes on"
        exit "$AGAIN"
    fi
    RESTARTS=$((RESTARTS + 1))
    # What ends within seconds gets nowhere, and would keep the machine busy with starting.
    ((SECONDS - SINCE < 30)) || DELAY=1
    compose
    say "run: $OUT asks to be started again (exit code $AGAIN): ${HOW:-from the beginning} in $DELAY s, restart $RESTARTS of at most $LIMIT"
    pause "$DELAY"
    [[ "$ASKED" == 0 ]] || exit "$AGAIN"
    DELAY=$((DELAY * 2 < 60 ? DELAY * 2 : 60))
done
