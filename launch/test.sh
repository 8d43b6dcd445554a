#!/usr/bin/env bash
# Installs what the tests need and runs them: launch/test.sh [ARGUMENTS OF PYTEST]
set -euo pipefail

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
DRY_RUN=0
TORCH="torch==2.13.0"

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    cat <<'TEXT'
usage: launch/test.sh [--dry-run] [ARGUMENTS OF PYTEST]

Makes a virtual environment (the same as launch/train.sh), installs the package with its test extra, runs `pytest -q`
on the CPU. Without arguments: the tests that need neither network nor weights. `-m weights`: those on SmolLM2-135M.

  SFTREC_VENV=DIR      the virtual environment (default: .venv of this checkout)
  SFTREC_PYTHON=FILE   the Python to make it with (default: the first of 3.13, 3.12, 3.11 that works)
TEXT
    exit 0
fi
if [[ "${1:-}" == --dry-run ]]; then
    DRY_RUN=1
    shift
fi

# shellcheck source-path=SCRIPTDIR source=_environment.sh disable=SC1091
source "$ROOT/launch/_environment.sh"

make_environment
if ! installed test && [[ "$(uname -s)" == Linux ]]; then
    # First and alone: together with the rest pip may weigh other builds of it for many minutes.
    say "environment: installing $TORCH into $VENV"
    quietly "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "$TORCH" ||
        say "environment: $TORCH cannot be had here; going on with what the test extra allows"
fi
install test -e "${ROOT}[test]"

export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
# Tools that tests call, such as shellcheck, lie beside python.
export PATH="$VENV/bin:$PATH"
COMMAND=("$VENV/bin/python" -m pytest -q "$@")
if [[ "$DRY_RUN" == 1 ]]; then
    show "${COMMAND[@]}"
    exit 0
fi
cd "$ROOT"
exec "${COMMAND[@]}"
