#!/usr/bin/env bash
# A run on a slice of TPU VMs; `launch/tpu_vm.sh --help` says how. Not run on a pod yet.
set -euo pipefail

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck disable=SC2034
SCRIPT="launch/tpu_vm.sh"
# shellcheck source-path=SCRIPTDIR source=_remote.sh disable=SC1091
source "$ROOT/launch/_remote.sh"

usage() {
    cat <<'TEXT'
usage: launch/tpu_vm.sh create|status|copy|run|delete --name NAME --zone ZONE [OPTIONS] [-- CONFIG [--out DIR] ...]

  create   asks for the slice: --type TYPE, such as v5litepod-16, v5p-128 or v6e-8; with --queued as a queued resource,
           with --spot one that may be taken away
  status   shows it
  copy     copies this checkout to every worker (~/sftrec)
  run      starts launch/train.sh on all workers together: -- CONFIG --out DIR and options of `sftrec run`
  delete   gives the slice back

  --project P     instead of gcloud's default
  --version V     of the TPU software (default: by the type)
  --bucket B      `run`: mounts the Cloud Storage bucket B as ~/runs on all workers, which must see one folder of the run;
                  --out is then below ~/runs
  --dry-run       prints the commands instead of running them

A spot slice that was taken away does not come back: `status --queued` says SUSPENDED. Give it back and ask for another
(`delete`, `create`), then `copy` and `run` again with the same words, without --overwrite: the run in --out, which must lie
outside the slice (--bucket, or a file share), goes on from its newest checkpoint.

Example:
  launch/tpu_vm.sh create --name mine --zone us-west4-a --type v5litepod-16 --queued --spot
  launch/tpu_vm.sh copy --name mine --zone us-west4-a
  launch/tpu_vm.sh run --name mine --zone us-west4-a --bucket my-runs -- configs/qwen3_8b_lora.yaml --out beauty
  launch/tpu_vm.sh delete --name mine --zone us-west4-a --queued
TEXT
}

VERB="" NAME="" ZONE="" TYPE="" VERSION="" BUCKET="" QUEUED=0
PROJECT=() SPOT=() REST=()
while [[ $# -gt 0 ]]; do
    case "$1" in
        -h | --help)
            usage
            exit 0
            ;;
        create | status | copy | run | delete) VERB="$1" ;;
        --name) need "$@" && NAME="$VALUE" && shift ;;
        --zone) need "$@" && ZONE="$VALUE" && shift ;;
        --type) need "$@" && TYPE="$VALUE" && shift ;;
        --version) need "$@" && VERSION="$VALUE" && shift ;;
        --bucket) need "$@" && BUCKET="$VALUE" && shift ;;
        --project) need "$@" && PROJECT=(--project "$VALUE") && shift ;;
        --queued) QUEUED=1 ;;
        --spot) SPOT=(--spot) ;;
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
[[ -n "$VERB" ]] || fail "say what to do: create, status, copy, run or delete"
[[ -n "$NAME" ]] || fail "--name is missing"
[[ -n "$ZONE" ]] || fail "--zone is missing"
WHERE=(--zone "$ZONE" ${PROJECT[@]+"${PROJECT[@]}"})
TPU=(gcloud compute tpus)

on_all() {
    act "${TPU[@]}" tpu-vm ssh "$NAME" "${WHERE[@]}" --worker=all --command "$1"
}

# The software that Google names for each kind.
software() {
    case "$TYPE" in
        v5litepod-*) printf 'v2-alpha-tpuv5-lite' ;;
        v5p-*) printf 'v2-alpha-tpuv5' ;;
        v6e-*) printf 'v2-alpha-tpuv6e' ;;
        v4-*) printf 'tpu-ubuntu2204-base' ;;
        *) fail "--type $TYPE is not known; use one such as v5litepod-16, v5p-128, v6e-8 or v4-32, or give --version" ;;
    esac
}

case "$VERB" in
    create)
        [[ -n "$TYPE" ]] || fail "--type is missing, such as --type v5litepod-16"
        VERSION="${VERSION:-$(software)}"
        if [[ "$QUEUED" == 1 ]]; then
            act "${TPU[@]}" queued-resources create "$NAME" --node-id "$NAME" "${WHERE[@]}" --accelerator-type "$TYPE" \
                --runtime-version "$VERSION" ${SPOT[@]+"${SPOT[@]}"}
        else
            act "${TPU[@]}" tpu-vm create "$NAME" "${WHERE[@]}" --accelerator-type "$TYPE" --version "$VERSION" \
                ${SPOT[@]+"${SPOT[@]}"}
        fi
        ;;
    status)
        if [[ "$QUEUED" == 1 ]]; then
            act "${TPU[@]}" queued-resources describe "$NAME" "${WHERE[@]}"
        else
            act "${TPU[@]}" tpu-vm describe "$NAME" "${WHERE[@]}"
        fi
        ;;
    copy)
        PACKED="$(mktemp -d)"
        trap 'rm -rf "$PACKED"' EXIT
        [[ "$DRY_RUN" == 1 ]] || tar -C "$ROOT" --exclude=.git --exclude=.venv --exclude=runs -czf "$PACKED/sftrec.tar.gz" .
        SHOWN="$PACKED"
        [[ "$DRY_RUN" == 0 ]] || SHOWN="."
        act "${TPU[@]}" tpu-vm scp "$SHOWN/sftrec.tar.gz" "$NAME:sftrec.tar.gz" "${WHERE[@]}" --worker=all
        on_all "mkdir -p sftrec && tar -xzf sftrec.tar.gz -C sftrec"
        ;;
    run)
        run_words ${REST[@]+"${REST[@]}"}
        [[ -n "$OUT" ]] || fail "name the folder of the run with --out; all workers must see it (--bucket, or a file share)"
        CONFIG="$(inside "$CONFIG")"
        MOUNT=""
        if [[ -n "$BUCKET" ]]; then
            [[ "$OUT" != /* ]] || fail "with --bucket, --out is below ~/runs; give a relative one"
            # shellcheck disable=SC2016
            MOUNT='mkdir -p "$HOME/runs" && { mountpoint -q "$HOME/runs" || gcsfuse --implicit-dirs '"$(quoted "$BUCKET")"' "$HOME/runs"; } && '
            # shellcheck disable=SC2016
            WORDS="$(quoted "$CONFIG") --out \"\$HOME/runs/\"$(quoted "$OUT")"
        else
            [[ "$OUT" == /* ]] || fail "--out $OUT: give an absolute path that all workers see, or --bucket"
            WORDS="$(quoted "$CONFIG" --out "$OUT")"
        fi
        [[ ${#PASSED[@]} == 0 ]] || WORDS+=" $(quoted "${PASSED[@]}")"
        on_all "${MOUNT}cd sftrec && SFTREC_DEVICE=tpu SFTREC_DISTRIBUTED=auto bash launch/train.sh $WORDS"
        ;;
    delete)
        if [[ "$QUEUED" == 1 ]]; then
            act "${TPU[@]}" queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
        else
            act "${TPU[@]}" tpu-vm delete "$NAME" "${WHERE[@]}" --quiet
        fi
        ;;
esac
