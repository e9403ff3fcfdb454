#!/usr/bin/env bash
# Trains on a Slurm cluster: writes a batch script and submits it.
#
#   launch/slurm.sh --config=FILE.py[:PRESET] --workdir=DIR --time=HH:MM:SS [OPTION ...]
#       [-- ARGUMENT ...]
#
#   --nodes=1           DIR must be the same folder on all of them
#   --gpus=8            of a node; 0: none
#   --per=node          a process for each node, or with gpu for each GPU
#   --cpus=N            cores of a process; default: the cluster's
#   --partition=NAME  --account=NAME  --name=skillsd
#   --lead=120          seconds before the limit at which processes get SIGTERM
#   --restarts=10       how often a job that reached its limit goes back into the queue
#   --setup=FILE        sourced first: modules, a virtual environment
#   --logs=DIR          default WORKDIR/logs; the batch script is kept there too
#   --python=CMD        interpreter; default python
#   --dry-run           prints the batch script
#
# What follows -- goes to main as it is. The job runs in the present folder.

set -euo pipefail
# shellcheck source=launch/arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

# sbatch's options, a line each.
directives() {
  local tasks=1
  [[ ${option[per]} == node ]] || tasks=${option[gpus]}
  cat <<EOF
#SBATCH --job-name=${option[name]}
#SBATCH --nodes=${option[nodes]}
#SBATCH --ntasks-per-node=$tasks
#SBATCH --time=${option[time]}
#SBATCH --output=${option[logs]}/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@${option[lead]}
EOF
  ((!option[gpus])) || echo "#SBATCH --gpus-per-node=${option[gpus]}"
  [[ -z ${option[cpus]} ]] || echo "#SBATCH --cpus-per-task=${option[cpus]}"
  [[ -z ${option[partition]} ]] || echo "#SBATCH --partition=${option[partition]}"
  [[ -z ${option[account]} ]] || echo "#SBATCH --account=${option[account]}"
}

# The line that starts every process.
step() {
  local words=(
    srun --kill-on-bad-exit=1 --open-mode=append
    "--output=${option[logs]}/process-%t.log"
  )
  ((!option[gpus])) || words+=(--gpu-bind=none)
  [[ -z ${option[cpus]} ]] || words+=("--cpus-per-task=${option[cpus]}")
  words+=(
    "${option[python]}" -m skillsd_jax.main "--config=${option[config]}"
    "--workdir=${option[workdir]}" --job=auto "${mesh[@]}" "${passed[@]}"
  )
  quoted "${words[@]}"
}

# JAX takes one device for a process on Slurm unless it is told which ones.
devices() {
  [[ ${option[per]} == node ]] && ((option[gpus])) || return 0
  echo "export JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 "$((option[gpus] - 1))")"
}

script() {
  local patience=$((option[lead] - 30)) # seconds; the rest is for the queue
  echo '#!/usr/bin/env bash'
  directives
  echo 'set -euo pipefail'
  [[ -z ${option[setup]} ]] || echo "source $(quoted "${option[setup]}")"
  echo 'export PYTHONUNBUFFERED=1'
  devices
  cat <<EOF

# Slurm sends USR1 to this shell alone, and only because of the limit: every process gets
# TERM, and the job goes back into the queue, where the same command resumes. (srun itself
# would kill them at TERM.)
at_limit() {
  scancel --signal=TERM "\$SLURM_JOB_ID" || true
  for ((second = 0; second < $patience; second++)); do
    kill -0 "\$step" 2>/dev/null || break
    sleep 1
  done
  if [[ -e $(quoted "${option[workdir]}/summary.json") ]]; then
    exit 0
  elif ((\${SLURM_RESTART_COUNT:-0} >= ${option[restarts]})); then
    echo "not finished after ${option[restarts]} restarts" >&2
    exit 1
  fi
  scontrol requeue "\$SLURM_JOB_ID"
  exit 0
}
trap at_limit USR1

$(step) &
step=\$!
wait "\$step"
EOF
}

option=(
  [config]='' [workdir]='' [time]='' [nodes]=1 [gpus]=8 [per]=node [cpus]=''
  [partition]='' [account]='' [name]=skillsd [lead]=120 [restarts]=10 [setup]=''
  [logs]='' [python]=python
)
parse "$@"
need config workdir time nodes gpus per name lead restarts python
: "${option[logs]:=${option[workdir]}/logs}"
count nodes cpus lead
match gpus '[0-9]{1,3}' "a whole number"
match restarts '[0-9]{1,4}' "a whole number"
match per 'node|gpu' "node or gpu"
match time '([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}' "as Slurm takes it: MM, HH:MM:SS, D-HH:MM:SS"
for name in partition account name; do
  match "$name" '[A-Za-z0-9_.,-]+' "letters, digits and _ . , -"
done
match logs '[A-Za-z0-9_./+=@-]+' "a path without blanks and %, which Slurm would replace"
((option[lead] >= 60)) || refuse "--lead=${option[lead]} must be 60 or more"
((option[gpus])) || [[ ${option[per]} == node ]] || refuse "--per=gpu needs --gpus"
[[ ${option[workdir]} != *://* ]] || refuse "--workdir must be a folder of all nodes"
config_file "${option[config]}"
reserved workdir config job
whole_mesh

if [[ -v option[dry-run] ]]; then
  script
  exit 0
fi
program sbatch
mkdir -p "${option[logs]}"
script >"${option[logs]}/job.sh"
sbatch "${option[logs]}/job.sh"
