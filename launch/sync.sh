#!/usr/bin/env bash
# Copy runs from another machine, with rsync over ssh.
usage='Usage: bash launch/sync.sh [options] HOST list          list the runs
       bash launch/sync.sh [options] HOST all           copy every run
       bash launch/sync.sh [options] HOST pull RUN...   copy these runs

HOST is a name, user@address, or an alias of ~/.ssh/config, as for ssh.

  --metrics-only        leave out checkpoint-*/, probes/ and *.safetensors (weights and tensors)
  --remote-root PATH    folder of the runs on HOST: absolute, or relative to the home (default: trl_entropy/runs)
  --into DIR            folder to copy the runs into (default: runs)
  --port N              port of ssh
  --identity FILE       private key of ssh
  --ssh-config FILE     used instead of ~/.ssh/config

A local file that is newer than the one on HOST is kept, and no local file is deleted. A copy that was interrupted
continues where it stopped if the same command is run again. The host key must be known to ssh.'
set -euo pipefail

die() { printf 'sync.sh: %s\n' "$1" >&2; exit "${2:-2}"; }
need() { [ "$#" -ge 2 ] && [ -n "$2" ] || die "$1 needs a value; --help shows the options."; }

ssh=(ssh)
filter=()
remote_root=trl_entropy/runs
into=runs
while [ "$#" -gt 0 ]; do
    case "$1" in
        --metrics-only) filter=(--exclude='/**/checkpoint-*/' --exclude='/**/probes/' --exclude='*.safetensors'); shift ;;
        --remote-root) need "$@"; remote_root=$2; shift 2 ;;
        --into) need "$@"; into=$2; shift 2 ;;
        --port) need "$@"; ssh+=(-p "$2"); shift 2 ;;
        --identity) need "$@"; ssh+=(-i "$2"); shift 2 ;;
        --ssh-config) need "$@"; ssh+=(-F "$2"); shift 2 ;;
        -h | --help) printf '%s\n' "$usage"; exit ;;
        -*) die "unknown option $1; --help shows the options." ;;
        *) break ;;
    esac
done
[ "$#" -ge 2 ] || { printf '%s\n' "$usage" >&2; exit 2; }
host=$1 command=$2
shift 2
command -v ssh >/dev/null || die "ssh is not installed here."

list() {
    # %q quotes the path, whatever it contains, as one word for the shell of the other machine.
    "${ssh[@]}" -- "$host" "sh -s -- $(printf %q "$remote_root")" <<'REMOTE'
cd -- "$1" || exit 1
find . -name config.yaml -type f | sort | {
    any=
    while IFS= read -r config; do
        any=1 run=${config%/config.yaml}
        step=$(tail -n 1 -- "$run/metrics.jsonl" 2>/dev/null | sed -n 's/^{"step": \([0-9]*\).*/\1/p')
        printf '%6s  step %-6s  %s\n' "$(du -sh -- "$run" | cut -f 1)" "${step:-0}" "${run#./}"
    done
    [ -n "$any" ] || { printf 'no run below %s\n' "$1" >&2; exit 1; }
}
REMOTE
}

copy() {
    command -v rsync >/dev/null || die "rsync is not installed here (on Debian and Ubuntu: apt-get install rsync)."
    mkdir -p -- "$into"
    local word shell='' quote="'" status=0
    for word in "${ssh[@]}"; do shell+="'${word//$quote/$quote$quote}' "; done  # rsync's own quoting doubles a quote
    # --protect-args: no shell of the other machine changes the names. Unfinished files are kept in .rsync-partial, so
    # that no file with its final name is incomplete, or newer than the complete one.
    rsync --rsh="$shell" --recursive --links --times --update --partial-dir=.rsync-partial --protect-args \
        --human-readable --itemize-changes ${filter[@]+"${filter[@]}"} "$@" "$into/" || status=$?
    [ "$status" -eq 0 ] || die "rsync ended with status $status; if it was interrupted, the same command continues." "$status"
}

case "$command" in
    list) [ "$#" -eq 0 ] || die "list takes no name of a run."; list ;;
    all) [ "$#" -eq 0 ] || die "all takes no name of a run; use pull for single runs."; copy "$host:$remote_root/" ;;
    pull)
        [ "$#" -gt 0 ] || die "pull needs the name of a run; list shows them."
        sources=()
        for run in "$@"; do
            case "/$run/" in
                //* | */../* | */./*) die "$run is not the name of a run; list shows them." ;;
            esac
            sources+=("$host:$remote_root/./${run%/}")  # --relative keeps the path after the dot
        done
        copy --relative "${sources[@]}"
        ;;
    *) die "unknown command $command; use list, all or pull." ;;
esac
