# shellcheck shell=bash disable=SC2034
# Sourced by train.sh and processes.sh (signals, waiting) and slurm.sh (stamp): what stopping and starting again takes.

# The exit code of `sftrec` that says: saved, start me again with --resume.
AGAIN=75

# What was begun, whether the script was asked to stop, and whether `wait` may have ended early.
PIDS=() PENDING=() BEGINNING=0 ASKED=0 CAUGHT=0

# From here on INT, TERM and HUP go on to everything begun.
pass_signals() {
    trap 'caught INT' INT
    trap 'caught TERM' TERM
    trap 'caught HUP' HUP
}

caught() {
    local signal="$1"
    CAUGHT=1
    if [[ "$signal" == HUP ]]; then
        # Comes beside TERM where a whole session ends; as a second signal it would cut the saving short.
        [[ "$ASKED" == 0 ]] || return 0
        signal=TERM
    fi
    ASKED=1
    PENDING+=("$signal")
    [[ "$BEGINNING" == 1 ]] || deliver
}

deliver() {
    local signal pid
    for signal in ${PENDING[@]+"${PENDING[@]}"}; do
        for pid in ${PIDS[@]+"${PIDS[@]}"}; do
            kill -s "$signal" "$pid" 2>/dev/null || true
        done
    done
    PENDING=()
}

# begin COMMAND...: starts it in the background and adds it to PIDS. It gets a process group of its own (set -m): Ctrl-C
# then reaches this script alone, which passes it on, so that a signal arrives once, whoever sent it. Without set -m a
# command in the background would ignore INT besides.
begin() {
    BEGINNING=1
    set -m
    "$@" </dev/null &
    PIDS+=("$!")
    set +m
    BEGINNING=0
    deliver
}

# await PID: sets STATUS to its exit status. A signal ends `wait` early; bash keeps the status of what has ended meanwhile.
await() {
    while true; do
        CAUGHT=0 STATUS=0
        wait "$1" || STATUS=$?
        [[ "$CAUGHT" == 1 ]] || return 0
    done
}

# pause SECONDS: ends early when the script is asked to stop.
pause() {
    local left
    for ((left = $1; left > 0; left--)); do
        [[ "$ASKED" == 0 ]] || return 0
        sleep 1 || true
    done
}

# stamp DIR: tells runs in DIR apart, by the time of the config.yaml that each begins with; `none` where there is none.
stamp() {
    date -r "$1/config.yaml" +%s 2>/dev/null || printf none
}
