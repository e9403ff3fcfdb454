#!/usr/bin/env bash
# Trains on all workers of a Cloud TPU VM.
#
#   launch/tpu_pod.sh [start] --name=TPU --config=configs/NAME.py[:PRESET] --workdir=DIR
#       [OPTION ...] [-- ARGUMENT ...]
#   launch/tpu_pod.sh logs|status|stop --name=TPU [OPTION ...]
#
#   --zone=ZONE  --project=NAME   default: gcloud's own
#   --workdir=DIR        absolute, on a file system that all workers share
#   --repository=URL  --ref=REF   installs that commit; default: the code that lies here
#   --extras=alfworld    pip extras of the project
#   --python=python3.11  interpreter on the workers, 3.11 or later
#   --follow=yes         shows the log of worker 0; Ctrl-C ends the showing only
#   --dry-run            prints what would run
#
# What follows -- goes to main as it is. On the workers everything lies in ~/skillsd_jax.
# stop sends SIGTERM. gcloud asks for an SSH key in the agent: ssh-add it first.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/arguments.sh
source "$here/arguments.sh"

repository=${here%/launch}
archive=$repository/build/skillsd_jax.tar.gz
folder=skillsd_jax # in the home of each worker
# shellcheck disable=SC2016 # the workers expand it
alive='kill -0 "$(cat logs/pid 2>/dev/null)" 2>/dev/null'

# on WORKERS COMMAND: runs a line of bash in the home folder of workers.
on() {
  run gcloud compute tpus tpu-vm ssh "${option[name]}" "${place[@]}" \
    "--worker=$1" "--command=$2"
}

bring_code() {
  local clear="rm -rf $folder/skillsd_jax $folder/configs"
  if [[ -n ${option[ref]} ]]; then
    on all "rm -rf $folder/.git && mkdir -p $folder && cd $folder && git init -q &&\
 git fetch -q --depth=1 $(quoted "${option[repository]}" "${option[ref]}") &&\
 git checkout -qf FETCH_HEAD"
    return
  fi
  run mkdir -p "$repository/build"
  run tar -czf "$archive" --exclude=__pycache__ -C "$repository" \
    setup.py pyproject.toml README.md skillsd_jax configs
  run gcloud compute tpus tpu-vm scp "$archive" "${option[name]}:$folder.tar.gz" \
    "${place[@]}" --worker=all
  on all "$clear && mkdir -p $folder && tar -xzf $folder.tar.gz -C $folder"
}

start() {
  local extras=${option[extras]:+[${option[extras]}]} main
  main=$(quoted env PYTHONUNBUFFERED=1 nohup .venv/bin/python -m skillsd_jax.main \
    "--config=${option[config]}" "--workdir=${option[workdir]}" --job=auto \
    "${mesh[@]}" "${passed[@]}")
  on all "mkdir -p $folder/logs && cd $folder && if $alive; then\
 echo 'a run goes on here: stop it first' >&2; exit 1; fi"
  bring_code
  on all "cd $folder && $(quoted "${option[python]}") -m venv .venv &&\
 .venv/bin/pip install --quiet -e $(quoted ".$extras") 'jax[tpu]'"
  on all "cd $folder && { $main >>logs/main.log 2>&1 </dev/null & echo \$! >logs/pid; }"
  [[ ${option[follow]} == no ]] || logs
}

logs() { on 0 "tail -n 100 -F $folder/logs/main.log"; }

status() {
  on all "cd $folder && { if $alive; then echo running; else echo ended; fi;\
 tail -n 3 logs/main.log; }"
}

stop() {
  # shellcheck disable=SC2016 # the workers expand it
  on all "cd $folder"' && kill -TERM "$(cat logs/pid)"'
}

option=(
  [name]='' [config]='' [workdir]='' [zone]='' [project]='' [repository]='' [ref]=''
  [extras]='' [python]=python3.11 [follow]=yes
)
action=start
case ${1-} in start | logs | status | stop) action=$1 && shift ;; esac
parse "$@"
need name
match name '[a-z]([a-z0-9-]*[a-z0-9])?' "the name of a TPU VM"
match zone '[a-z0-9-]+' "a zone such as us-central2-b"
match project '[a-z0-9:.-]+' "the id of a project"
match extras '[a-z,]+' "pip extras with commas between them"
match follow 'yes|no' "yes or no"
if [[ $action == start ]]; then
  need config workdir python
  match workdir '/.*' "an absolute path that all workers share"
  match ref '[^-].*' "a branch, tag or commit"
  match repository '[^-].*' "the address of a repository"
  if [[ -n ${option[ref]}${option[repository]} ]]; then
    need ref repository
  else
    [[ ${option[config]} == configs/* ]] ||
      refuse "--config=${option[config]} must lie in configs/, which is what is copied"
    config_file "$repository/${option[config]}"
  fi
  reserved workdir config job
  whole_mesh
else
  ((!${#passed[@]})) || refuse "$action passes nothing on to main"
fi
[[ -v option[dry-run] ]] || program gcloud
place=(${option[zone]:+"--zone=${option[zone]}"})
place+=(${option[project]:+"--project=${option[project]}"})
"$action"
