# shellcheck shell=bash disable=SC2034
# Sourced by train.sh and test.sh: finds Python and the accelerator, makes the virtual environment, installs the package.
# The sourcing script sets ROOT (the checkout) and DRY_RUN (0 or 1; with 1 commands are printed instead of run).

VENV="${SFTREC_VENV:-$ROOT/.venv}"
# pip and the package are started from other folders below.
[[ "$VENV" == /* ]] || VENV="$PWD/$VENV"

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

say() {
    printf '%s\n' "$*" >&2
}

# Prints a command the way a shell would read it back.
show() {
    printf '%q ' "$@"
    printf '\n'
}

# Runs a command without its output; after a failure shows the last lines of it. pip writes harmless remarks to standard
# error, so only the exit status counts.
quietly() {
    if [[ "$DRY_RUN" == 1 ]]; then
        show "$@"
        return 0
    fi
    local log status=0
    log="$(mktemp)"
    "$@" >"$log" 2>&1 || status=$?
    if [[ "$status" != 0 ]]; then
        tail -n 20 "$log" >&2
    fi
    rm -f "$log"
    return "$status"
}

# Sets PYTHON to an interpreter of version 3.11 or later that can make virtual environments.
find_python() {
    local candidate old=""
    for candidate in ${SFTREC_PYTHON:+"$SFTREC_PYTHON"} python3.13 python3.12 python3.11 python3 python; do
        # A name may be there and not work, as the shims of pyenv do.
        "$candidate" -c 'import sys' >/dev/null 2>&1 || continue
        if ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            old="${old:-$("$candidate" -V 2>&1)}"
        elif "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            PYTHON="$candidate"
            return 0
        else
            old="${old:-$("$candidate" -V 2>&1) without the module venv (Debian and Ubuntu: install pythonX.Y-venv)}"
        fi
    done
    fail "no Python 3.11 or later was found (${old:-no python3 at all}); install one, or name it with SFTREC_PYTHON=/path/to/python3"
}

has_tpu() {
    local device vendor id
    for device in /dev/accel[0-9]*; do
        [[ -e "$device" ]] && return 0
    done
    # The vendor is Google, which makes network and disk devices too; these are the ids that JAX knows as TPUs.
    for device in /sys/bus/pci/devices/*; do
        vendor="$(cat "$device/vendor" 2>/dev/null || true)"
        [[ "$vendor" == 0x1ae0 ]] || continue
        id="$(cat "$device/device" 2>/dev/null || true)"
        case "$id" in 0x0027 | 0x0056 | 0x005e | 0x0062 | 0x0063 | 0x006f | 0x0076) return 0 ;; esac
    done
    # In a container the PCI tree may be hidden; there the variables of the TPU runtime tell.
    [[ -e /dev/vfio && -n "${TPU_ACCELERATOR_TYPE:-}${TPU_WORKER_ID:-}${TPU_WORKER_HOSTNAMES:-}${TPU_CHIPS_PER_HOST_BOUNDS:-}" ]]
}

# Sets DEVICE to tpu, cuda or cpu and EXTRA to the extra of the package that it needs.
find_device() {
    DEVICE="${SFTREC_DEVICE:-}"
    if [[ -z "$DEVICE" ]]; then
        if has_tpu; then
            DEVICE=tpu
        elif [[ "$(nvidia-smi -L 2>/dev/null || true)" == GPU\ * ]]; then
            DEVICE=cuda
            local driver
            driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null || true)"
            driver="${driver%%.*}"
            [[ ! "$driver" =~ ^[0-9]+$ || "$driver" -ge 580 ]] ||
                fail "the NVIDIA driver $driver is older than 580, which CUDA 13 needs; update it or set SFTREC_DEVICE=cpu"
        else
            DEVICE=cpu
        fi
    fi
    case "$DEVICE" in
        tpu | cuda) EXTRA="$DEVICE" ;;
        cpu) EXTRA="" ;;
        *) fail "SFTREC_DEVICE is '$DEVICE'; use tpu, cuda or cpu" ;;
    esac
    # An accelerator that cannot be started is then an error, where JAX alone would go on with the CPU.
    case "$DEVICE" in
        cpu) export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" ;;
        *) export JAX_PLATFORMS="${JAX_PLATFORMS:-$DEVICE,cpu}" ;;
    esac
}

make_environment() {
    if [[ -x "$VENV/bin/python" ]] && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            fail "$VENV has $("$VENV/bin/python" -V), 3.11 or later is needed; remove that folder or set SFTREC_VENV to another"
        return 0
    fi
    if [[ -e "$VENV" && ! -e "$VENV/pyvenv.cfg" && -n "$(ls -A "$VENV" 2>/dev/null || echo file)" ]]; then
        fail "$VENV is no virtual environment and not empty; set SFTREC_VENV to another folder"
    fi
    find_python
    quietly "$PYTHON" -m venv "$VENV" || fail "the virtual environment $VENV could not be made (see above)"
}

# True when `wanted` (a name of an installation) was done already for this checkout and this pyproject.toml.
installed() {
    local stamp="$VENV/.sftrec-installed-$1"
    [[ -f "$stamp" && "$(cat "$stamp")" == "$(stamp_text)" ]]
}

stamp_text() {
    printf '%s %s' "$(cksum <"$ROOT/pyproject.toml")" "$ROOT"
}

# install NAME SPEC...: makes the environment and installs SPEC... with pip unless that was done before.
install() {
    local name="$1" begin="$SECONDS"
    shift
    make_environment
    if installed "$name"; then
        say "environment: $VENV, installed already"
        return 0
    fi
    say "environment: installing into $VENV (takes minutes the first time)"
    quietly "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "$@" ||
        fail "pip could not install the package (see above); check the network and run the same command again"
    if [[ "$DRY_RUN" != 1 ]]; then
        stamp_text >"$VENV/.sftrec-installed-$name"
        say "environment: installed in $((SECONDS - begin)) s"
    fi
}
