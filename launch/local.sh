#!/usr/bin/env bash
# Trains with several processes on this machine.
#
#   launch/local.sh --config=FILE.py[:PRESET] --workdir=DIR [OPTION ...] [-- ARGUMENT ...]
#
#   --processes=2   how many; with --gpus one for each of them
#   --devices=1     CPU devices of a process
#   --gpus=0,1      instead: GPUs by index, one for each process
#   --port=PORT     of the coordinator; default: a free one
#   --logs=DIR      a log of each process; default WORKDIR/logs
#   --grace=60      seconds in which processes may save after SIGINT or SIGTERM
#   --python=CMD    interpreter; default python
#   --dry-run       prints what would run
#
# What follows -- goes to main as it is. Process 0 is shown. Where a process fails the
# others get SIGTERM, and SIGKILL after 20 s, or --grace where that is less; the exit
# status is that of the first.

set -euo pipefail
# shellcheck source=launch/arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

# A port of this machine that nothing listens on, below those that systems give out.
free_port() {
  local port
  for _ in {1..50}; do
    port=$((20000 + RANDOM % 12000))
    if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      echo "$port"
      return
    fi
  done
  refuse "no free port found; pass --port="
}

# Fills `command` with what process $1 runs.
compose() {
  if [[ -n ${option[gpus]} ]]; then
    command=(env "CUDA_VISIBLE_DEVICES=${gpus[$1]}")
  else
    # JAX_NUM_CPU_DEVICES would win over the flag.
    command=(env -u JAX_NUM_CPU_DEVICES JAX_PLATFORMS=cpu "XLA_FLAGS=$xla_flags")
  fi
  command+=(
    PYTHONUNBUFFERED=1 "${option[python]}" -m skillsd_jax.main
    "--config=${option[config]}" "--workdir=${option[workdir]}"
    "--job=127.0.0.1:${option[port]},${option[processes]},$1" "${passed[@]}"
  )
}

option=(
  [config]='' [workdir]='' [processes]='' [devices]='' [gpus]='' [port]='' [logs]=''
  [grace]=60 [python]=python
)
parse "$@"
need config workdir grace python
count processes devices port grace
match gpus '[0-9]+(,[0-9]+)*' "indices of GPUs with commas between them"
config_file "${option[config]}"
program "${option[python]}"
reserved job workdir config
IFS=, read -ra gpus <<<"${option[gpus]}"
if [[ -n ${option[gpus]} ]]; then
  [[ -z ${option[devices]} ]] || refuse "--gpus and --devices exclude each other"
  : "${option[processes]:=${#gpus[@]}}"
  ((option[processes] == ${#gpus[@]})) || refuse \
    "--processes=${option[processes]} needs as many in --gpus=${option[gpus]}"
fi
: "${option[processes]:=2}" "${option[devices]:=1}"
: "${option[logs]:=${option[workdir]}/logs}"
xla_flags="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=${option[devices]}"
if [[ -z ${option[port]} ]]; then
  option[port]=$(free_port)
elif (exec 3<>"/dev/tcp/127.0.0.1/${option[port]}") 2>/dev/null; then
  refuse "--port=${option[port]} is taken"
fi

if [[ -v option[dry-run] ]]; then
  for ((i = 0; i < option[processes]; i++)); do
    compose "$i"
    log=$(quoted "${option[logs]}/process-$i.log")
    ((i)) && log=">>$log 2>&1" || log="2>&1 | tee -a $log"
    echo "$(quoted "${command[@]}") $log"
  done
  exit 0
fi

mkdir -p "${option[logs]}"
# shellcheck source=launch/processes.sh
source "$(dirname "${BASH_SOURCE[0]}")/processes.sh"
say "${option[processes]} processes, port ${option[port]}, logs in ${option[logs]}"
exec {shown}> >(exec tee -ai "${option[logs]}/process-0.log")
tee=$!
for ((i = 0; i < option[processes]; i++)); do
  [[ -z $asked ]] || break
  compose "$i"
  if ((i == 0)); then
    start 0 "${command[@]}" >&"$shown" 2>&1
    exec {shown}>&-
  else
    start "$i" "${command[@]}" >>"${option[logs]}/process-$i.log" 2>&1
  fi
done

status=0
while ((${#running[@]})); do
  await
  for name in "${!ended[@]}"; do
    if ((ended[$name] && !status)) && [[ -z $asked ]]; then
      status=${ended[$name]}
      say "process $name ended with $(status_words "$status"); the others are ended;" \
        "its log: ${option[logs]}/process-$name.log"
      # Without a peer nothing can be saved together.
      stop TERM "$((option[grace] < 20 ? option[grace] : 20))"
    fi
  done
done
for _ in {1..50}; do # the last lines of process 0, unless it left the pipe to another
  kill -0 "$tee" 2>/dev/null || break
  sleep 0.1
done
if [[ -n $asked ]]; then
  say "stopped by SIG$asked"
  exit $((128 + $(kill -l "$asked")))
fi
exit "$status"
