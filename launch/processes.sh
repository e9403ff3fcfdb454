# shellcheck shell=bash
# Starts processes, waits for them, ends them. Sourced.
#
# Each has a process group of its own, so that Ctrl-C reaches the launcher alone, and so
# that what it leaves behind can be ended with it.

declare -A running=() # process id → name
# shellcheck disable=SC2034 # the launchers read it
declare -A ended=() # name → exit status, of those that the last `await` saw end
deadline=             # in SECONDS: what still runs then is killed
asked=                # the signal that the launcher got
tick=                 # process id of the clock of `await`

# Bash tells on stderr of each job that a signal ended; the launchers say it in their words.
exec 2> >(
  trap '' INT TERM HUP
  exec grep --line-buffered -vF '"$@" < /dev/null' >&2
)
set -m
trap 'on_signal INT' INT
trap 'on_signal TERM' TERM
trap 'on_signal HUP' HUP
trap 'kill_groups "${!running[@]}"' EXIT

# start NAME COMMAND...
start() {
  local name=$1
  shift
  "$@" </dev/null &
  running[$!]=$name
}

# Waits until one has ended, at most a second.
await() {
  local pid status
  ended=()
  if [[ -z $tick ]] || ! kill -0 "$tick" 2>/dev/null; then
    sleep 1 >/dev/null 2>&1 &
    tick=$!
  fi
  wait -n "${!running[@]}" "$tick" 2>/dev/null || true
  for pid in "${!running[@]}"; do
    kill -0 "$pid" 2>/dev/null && continue
    status=0
    wait "$pid" 2>/dev/null || status=$?
    ((status == 0)) || kill_groups "$pid"
    # shellcheck disable=SC2034
    ended[${running[$pid]}]=$status
    unset "running[$pid]"
  done
  if [[ -n $deadline ]] && ((SECONDS >= deadline && ${#running[@]})); then
    say "not ended in time, killed: ${running[*]}"
    kill_groups "${!running[@]}"
  fi
}

# stop SIGNAL SECONDS: asks all to end, and says how long they may take.
stop() {
  ((${#running[@]})) || return 0
  kill -s "$1" "${!running[@]}" 2>/dev/null || true
  deadline=$((SECONDS + $2))
}

# The first signal is passed on; a second one kills.
on_signal() {
  if [[ -z $asked ]]; then
    asked=$1
    # shellcheck disable=SC2154 # an option of every launcher that sources this
    say "SIG$1 passed on; waiting up to ${option[grace]} s"
    stop "$1" "${option[grace]}"
  else
    deadline=0
  fi
}

kill_groups() {
  local pid
  for pid in "$@"; do
    kill -KILL -- "-$pid" 2>/dev/null || true
  done
}

# An exit status in words.
status_words() {
  local words="status $1"
  if (($1 > 128)) && kill -l "$(($1 - 128))" >/dev/null 2>&1; then
    words+=" (SIG$(kill -l "$(($1 - 128))"))"
  fi
  echo "$words"
}
