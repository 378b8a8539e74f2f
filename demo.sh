#!/bin/sh
# The whole life of jobs, shown in about twenty seconds. It uses a folder and a database of
# its own, touches no other queue, and leaves nothing behind.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
dir=$(mktemp -d "${TMPDIR:-/tmp}/queuectl-demo.XXXXXX")
export QUEUECTL_DB="$dir/demo.db"
unset QUEUECTL_JOB_ID

queuectl() { "$python" "$here/queuectl.py" "$@"; }

clean_up() {
    trap - EXIT INT TERM HUP
    queuectl worker stop --now >/dev/null 2>&1 || true
    cd / && rm -rf "$dir"
}
trap clean_up EXIT
trap 'exit 130' INT TERM HUP
cd "$dir"

say() { printf '\n--- %s\n' "$*"; }

run() { # show a command as it would be typed, then run it
    printf '$ queuectl'
    for word in "$@"; do
        case $word in
            *[!A-Za-z0-9_./=:,-]*) printf " '%s'" "$word" ;;
            *) printf ' %s' "$word" ;;
        esac
    done
    printf '\n'
    queuectl "$@"
}

until_running() { # until a worker runs this job; at most 10 seconds
    tries=100
    until queuectl worker list 2>/dev/null | grep -q " $1\$"; do
        tries=$((tries - 1))
        [ "$tries" -gt 0 ] || { echo "job $1 did not start" >&2; exit 1; }
        sleep 0.1
    done
}

expect() { # a job is in this state, or the demo has failed
    queuectl show "$1" --json | grep -q "\"state\": \"$2\"" || {
        echo "demo: job $1 is not $2:" >&2
        queuectl show "$1" >&2
        exit 1
    }
}

say "Three jobs: one succeeds, one succeeds at its second attempt, one lacks a file."
run enqueue --id hello 'echo hello'
run enqueue --id flaky 'echo "attempt $QUEUECTL_ATTEMPT"; test "$QUEUECTL_ATTEMPT" -ge 2'
run enqueue --id hopeless --max-retries 2 'ls input.txt'

say "A worker runs them. A failure is tried again after 2 ** attempts seconds; --drain ends
    the worker when nothing is left to do."
run worker start --drain
expect hello completed
expect flaky completed
expect hopeless dead

say "What they printed is kept, and so is every run."
run logs hello
run show flaky

say "The job that used up its attempts is in the dead letter queue, with the reason."
run dlq list

say "Mend the cause and retry it: its attempts begin at 0 again."
echo '$ touch input.txt'
touch input.txt
run dlq retry hopeless
run worker start --drain --quiet
run list
expect hopeless completed

say "Priorities: higher runs sooner; equal ones run first in, first out."
run enqueue --id low --priority -5 true
run enqueue --id normal true
run enqueue --id urgent --priority 10 true
run worker start --drain

say "A job per line. Why they wait is told; one deploy at a time, whatever the number of workers."
run pause deploy
printf '%s\n' "\$ printf 'echo one\necho two\n' | queuectl enqueue --queue deploy --lines -"
printf 'echo one\necho two\n' | queuectl enqueue --queue deploy --lines -
run resume deploy
run limit deploy 1
run worker start --count 2 --drain

say "A timeout ends the whole process group of a job."
run enqueue --id slow --timeout 1s --max-retries 1 'sleep 60'
run worker start --drain
expect slow dead

say "Two workers in the background. A delayed job runs when its time has come."
run worker start --count 2 --detach
run enqueue --id later --delay 1s 'echo "now it is time"'
run list --state scheduled
run wait later
run logs later

say "kill -9 of a worker in the middle of a job. Its supervisor takes the job back, ends what
    is left of it, and starts another worker: the job runs again and loses one attempt."
run enqueue --id victim 'echo "attempt $QUEUECTL_ATTEMPT"; sleep 1'
until_running victim
run worker list
pid=$(queuectl worker list | awk '$NF == "victim" { print $3 }')
echo "\$ kill -9 $pid"
kill -9 "$pid"
run wait victim
run show victim
expect victim completed

say "A graceful stop: the running job is finished first, the waiting ones stay."
run enqueue --id last 'sleep 1; echo finished in peace'
until_running last
run worker stop
run logs last
expect last completed

say "All there is to know at a glance."
run enqueue --id tomorrow --delay 1d true
run status

say "That was all. $dir is deleted now."
