#!/usr/bin/env bash
# Trains every config with every objective and seed, each in a folder of its own.
#
#   launch/sweep.sh --configs=FILE.py[:PRESET],... --root=DIR [OPTION ...] [-- ARGUMENT ...]
#
#   --objectives=grpo,skill_sd   default: that of the config
#   --seeds=0-2                  or 0,1,2; default 0
#   --jobs=1                     runs at a time
#   --cores=N                    cores of a run, with taskset; default: not bound
#   --grace=60                   seconds in which runs may save after SIGINT or SIGTERM
#   --python=CMD                 interpreter; default python
#   --dry-run                    prints what would run, on the first cores
#
# What follows -- goes to main as it is. A run whose summary.json is there is skipped, an
# unfinished one resumes. A failed one stops no other; the exit status is then 1. DIR/sweep.log
# says what became of each, RUN/logs/run.log what it printed. At the end stand the commands
# that compare them.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/arguments.sh
source "$here/arguments.sh"

# Fills `seeds` from 0,1,2 or 0-2.
read_seeds() {
  local first last
  match seeds '[0-9]{1,6}-[0-9]{1,6}|[0-9]{1,6}(,[0-9]{1,6})*' "like 0-2 or 0,1,2"
  if [[ ${option[seeds]} == *-* ]]; then
    first=$((10#${option[seeds]%-*})) last=$((10#${option[seeds]#*-}))
    ((first <= last)) || refuse "--seeds=${option[seeds]} runs backward"
    mapfile -t seeds < <(seq "$first" "$last")
  else
    IFS=, read -ra seeds <<<"${option[seeds]}"
  fi
}

# Adds a run: its name, and its settings as one line.
plan() {
  local config=$1 objective=$2 seed=$3 file=${1%%:*} name settings
  name=$(basename "$file" .py)
  [[ $config != *:* ]] || name+=-${config#*:}
  name+=${objective:+-$objective}-seed$seed
  [[ ! -v words[$name] ]] || refuse "two runs are called $name"
  settings=("--config=$config" "--config.seed=$seed")
  [[ -z $objective ]] || settings+=("--config.objective.name=$objective")
  names+=("$name")
  words[$name]=$(quoted "${settings[@]}" "${passed[@]}")
  config_of[$name]=$config
}

# Where a run stands: new, unfinished, finished, or other: finished with
# other settings.
state() {
  local folder=${option[root]}/$1 wanted=${words[$1]}
  if [[ ! -e $folder/summary.json ]]; then
    [[ -e $folder/config.json ]] && echo unfinished || echo new
  elif [[ -e $folder/logs/settings && $(<"$folder/logs/settings") != "$wanted" ]]; then
    echo other
  else
    echo finished
  fi
}

# Fills `command` with a run's on the cores of slot $2.
compose() {
  local cores=${option[cores]} settings
  eval "settings=(${words[$1]})" # what `quoted` wrote
  command=()
  [[ -z $cores ]] ||
    command=(taskset -c "$(($2 * cores))-$((($2 + 1) * cores - 1))")
  command+=("${option[python]}" -m skillsd_jax.main "${settings[@]}")
  command+=("--workdir=${option[root]}/$1")
}

record() {
  printf '%(%FT%T)T\t%s\t%s\n' -1 "$1" "$2" | tee -a "${option[root]}/sweep.log"
}

# Takes the next run that is to be done, and starts it in a free slot.
launch_next() {
  local name=${names[next]} slot folder standing
  next=$((next + 1))
  folder=${option[root]}/$name standing=$(state "$name")
  case $standing in
    finished) record "$name" "skipped: finished before" ;;
    other)
      record "$name" "failed: finished before with other settings: $folder"
      failures=$((failures + 1))
      ;;
    *)
      slot=${free[-1]}
      unset 'free[-1]'
      slot_of[$name]=$slot
      compose "$name" "$slot"
      mkdir -p "$folder/logs"
      printf '%s\n' "${words[$name]}" >"$folder/logs/settings"
      record "$name" "$([[ $standing == new ]] && echo started || echo resumed)"
      start "$name" "${command[@]}" >>"$folder/logs/run.log" 2>&1
      ;;
  esac
}

# Books the end of run $1 with status $2.
settle() {
  local folder=${option[root]}/$1 fault=''
  free+=("${slot_of[$1]}")
  if (($2)); then
    fault=$(status_words "$2")
  elif [[ ! -e $folder/summary.json ]]; then
    fault="status 0, but no summary.json"
  fi
  if [[ -n $fault && -n $asked ]]; then
    record "$1" "stopped: $fault"
  elif [[ -n $fault ]]; then
    record "$1" "failed: $fault; its log: $folder/logs/run.log"
    failures=$((failures + 1))
  else
    record "$1" finished
  fi
}

# Prints, for each config, the command that compares its finished runs.
comparison() {
  local config name folders baseline
  for config in "${configs[@]}"; do
    folders=()
    for name in "${names[@]}"; do
      [[ ${config_of[$name]} != "$config" || $(state "$name") != finished ]] ||
        folders+=("${option[root]}/$name")
    done
    ((${#folders[@]})) || continue
    baseline=()
    [[ -z ${objectives[0]} || ,${option[objectives]}, == *,grpo,* ]] ||
      baseline=("--baseline=${objectives[0]}")
    quoted python "${here%/launch}/benchmarks/compare.py" "${folders[@]}" "${baseline[@]}"
  done
}

option=(
  [configs]='' [root]='' [objectives]='' [seeds]=0 [jobs]=1 [cores]='' [grace]=60
  [python]=python
)
parse "$@"
need configs root seeds jobs grace python
count jobs cores grace
match configs '[^,]+(,[^,]+)*' "config files with commas between them"
match objectives '[a-z0-9_]+(,[a-z0-9_]+)*' "names with commas between them"
program "${option[python]}"
[[ -z ${option[cores]} ]] || program taskset
reserved workdir config config.seed config.objective.name job
((${option[cores]:-1} * option[jobs] <= $(nproc))) || [[ -z ${option[cores]} ]] ||
  refuse "--jobs=${option[jobs]} of --cores=${option[cores]} need more than the" \
    "$(nproc) cores there are"

declare -A words=() config_of=() slot_of=()
names=()
IFS=, read -ra configs <<<"${option[configs]}"
IFS=, read -ra objectives <<<"${option[objectives]}"
((${#objectives[@]})) || objectives=('')
read_seeds
for config in "${configs[@]}"; do
  config_file "$config"
  for objective in "${objectives[@]}"; do
    for seed in "${seeds[@]}"; do
      plan "$config" "$objective" "$seed"
    done
  done
done

if [[ -v option[dry-run] ]]; then
  for name in "${names[@]}"; do
    case $(state "$name") in
      finished) echo "# $name: finished, skipped" ;;
      other) echo "# $name: finished with other settings, fails" ;;
      *)
        compose "$name" 0
        log=$(quoted "${option[root]}/$name/logs/run.log")
        echo "$(quoted "${command[@]}") >>$log 2>&1"
        ;;
    esac
  done
  exit 0
fi

mkdir -p "${option[root]}"
# shellcheck source=launch/processes.sh
source "$here/processes.sh"
next=0 failures=0
mapfile -t free < <(seq "$((option[jobs] - 1))" -1 0)
while ((next < ${#names[@]} || ${#running[@]})); do
  while ((${#free[@]} && next < ${#names[@]})) && [[ -z $asked ]]; do
    launch_next
  done
  [[ -z $asked ]] || next=${#names[@]}
  ((${#running[@]})) || continue
  await
  for name in "${!ended[@]}"; do
    settle "$name" "${ended[$name]}"
  done
done
comparison
[[ -z $asked ]] || exit $((128 + $(kill -l "$asked")))
((failures == 0)) || say "$failures of ${#names[@]} runs failed"
((failures == 0))
