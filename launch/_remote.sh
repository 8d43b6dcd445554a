# shellcheck shell=bash disable=SC2034
# Sourced by the scripts that start a run elsewhere: their common options, and commands that are shown or run.
# The sourcing script sets ROOT, and SCRIPT (its name); it reads CONFIG, OUT, PASSED and DRY_RUN.

DRY_RUN=0
CONFIG="" OUT=""
PASSED=()

fail() {
    printf 'error: %s; see %s --help\n' "$*" "$SCRIPT" >&2
    exit 2
}

# Prints a command the way a shell would read it back.
shown() {
    printf '%q ' "$@" | sed 's/ $//'
    printf '\n'
}

# Prints a command and runs it unless --dry-run.
act() {
    shown "$@"
    if [[ "$DRY_RUN" == 0 ]]; then
        command -v "$1" >/dev/null 2>&1 || fail "$1 is not installed here"
        "$@"
    fi
}

# need OPTION VALUE...: sets VALUE to the value of an option that must have one.
need() {
    [[ -n "${2:-}" && "$2" != --* ]] || fail "$1 needs a value"
    VALUE="$2"
}

# run_words WORD...: takes CONFIG, --out and everything that goes to `sftrec run`.
run_words() {
    while [[ $# -gt 0 ]]; do
        case "$1" in
            --out)
                need "$@"
                OUT="$VALUE"
                shift
                ;;
            -*) PASSED+=("$1") ;;
            *)
                if [[ -z "$CONFIG" && ${#PASSED[@]} == 0 ]]; then CONFIG="$1"; else PASSED+=("$1"); fi
                ;;
        esac
        shift
    done
    [[ -n "$CONFIG" ]] || fail "no CONFIG given; name a YAML file such as configs/qwen3_0_6b_lora.yaml"
    [[ -f "$CONFIG" || -f "$ROOT/$CONFIG" ]] || fail "$CONFIG: no such config"
}

# The words of a command as one text that a shell reads back.
quoted() {
    local text
    text="$(printf '%q ' "$@")"
    printf '%s' "${text% }"
}

# inside FILE: the path of a file of this checkout, relative to it.
inside() {
    local path
    path="$(cd -- "$(dirname -- "$1")" 2>/dev/null && pwd)/$(basename -- "$1")"
    [[ "$path" == "$ROOT"/* ]] || path="$ROOT/$1"
    [[ -f "$path" ]] || fail "$1: lies outside this checkout, which is what is copied"
    printf '%s' "${path#"$ROOT"/}"
}
