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
  --overwrite             remove the run in DIR first
  --dry-run               print the commands instead of running them
  --install-only          make the virtual environment and run nothing
  --SECTION.FIELD VALUE   change any field of the config, such as --train.epochs 2 (`--help-config` lists them)

Several hosts: launch/tpu_vm.sh, launch/gke.sh, launch/slurm.sh, launch/processes.sh.

  SFTREC_DEVICE=tpu|cuda|cpu   instead of what is found
  SFTREC_VENV=DIR              the virtual environment (default: .venv of this checkout)
  SFTREC_PYTHON=FILE           the Python to make it with (default: the first of 3.13, 3.12, 3.11 that works)
TEXT
}

CONFIG="" OUT="" STARTED=0 LISTS=0 OVERRIDDEN=0 INSTALL_ONLY=0
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
            STARTED=1
            PASSED+=("$1")
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

if [[ -z "$CONFIG" ]]; then
    CONFIG="$ROOT/configs/movielens.yaml"
elif [[ ! -e "$CONFIG" && -e "$ROOT/$CONFIG" ]]; then
    CONFIG="$ROOT/$CONFIG"
fi
[[ -f "$CONFIG" ]] || fail "$CONFIG: no such config; name a YAML file such as $ROOT/configs/quick.yaml"
NAME="$(basename -- "$CONFIG")"
OUT="${OUT:-runs/${NAME%.*}}"

find_device
say "device: $DEVICE${SFTREC_DEVICE:+ (as SFTREC_DEVICE says)}"
install "run-$DEVICE" -e "$ROOT${EXTRA:+[$EXTRA]}"
[[ "$INSTALL_ONLY" == 0 ]] || exit 0

# Of several processes each would look for itself, and might find what another has just begun.
if [[ "$STARTED" == 0 && "$LISTS" == 0 && -z "${SFTREC_DISTRIBUTED:-}${SFTREC_COORDINATOR:-}" && -f "$OUT/config.yaml" && ! -f "$OUT/metrics.json" ]]; then
    say "run: $OUT was not finished; going on with it (--overwrite starts again)"
    PASSED+=(--resume)
fi
COMMAND=("$VENV/bin/sftrec" run "$CONFIG" --out "$OUT" ${PASSED[@]+"${PASSED[@]}"})
if [[ "$DRY_RUN" == 1 ]]; then
    show "${COMMAND[@]}"
    exit 0
fi
exec "${COMMAND[@]}"
