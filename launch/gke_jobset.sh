#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as a JobSet.
#
#   launch/gke_jobset.sh --name=NAME --image=IMAGE --accelerator=TYPE --topology=4x4
#       --config=configs/NAME.py[:PRESET] --workdir=DIR [OPTION ...] [-- ARGUMENT ...]
#
#   --image=IMAGE        has the project installed and configs/ in its working folder
#   --accelerator=TYPE   label gke-tpu-accelerator, such as tpu-v5-lite-podslice
#   --topology=4x4       label gke-tpu-topology: chips of a slice
#   --chips=4            of a host
#   --slices=1           how many
#   --restarts=3         of the whole set, after any host has failed
#   --grace=120          seconds between SIGTERM and SIGKILL
#   --namespace=NAME     default: kubectl's own
#   --claim=NAME         a volume claim, ReadWriteMany, mounted at /data
#   --workdir=DIR        below /data
#   --python=CMD         interpreter in the image; default python
#   --dry-run            prints the YAML
#
# What follows -- goes to main as it is. The cluster needs the JobSet controller.

set -euo pipefail
# shellcheck source=launch/arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

# A word as a YAML string. Kubernetes reads $$ as $ and $(NAME) as a variable.
yaml() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  text=${text//$'\t'/\\t}
  [[ $text != *[[:cntrl:]]* ]] || refuse "control characters in an argument: ${text@Q}"
  printf '"%s"' "${text//\$/\$\$}"
}

# The words as items of a list.
items() {
  local word text
  for word in "$@"; do
    text=$(yaml "$word")
    echo "                - $text"
  done
}

# Hosts of a slice; a slice smaller than a host has one with fewer chips.
count_hosts() {
  local chips=1 side
  for side in ${option[topology]//x/ }; do
    chips=$((chips * side))
  done
  ((chips >= option[chips])) || option[chips]=$chips
  ((chips % option[chips] == 0)) || refuse "--chips=${option[chips]} of a host must" \
    "divide the $chips chips of --topology=${option[topology]}"
  hosts=$((chips / option[chips]))
}

document() {
  cat <<EOF
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: "${option[name]}"
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: ${option[restarts]}
  replicatedJobs:
  - name: slice
    replicas: ${option[slices]}
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: ${option[grace]}
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: "${option[accelerator]}"
              cloud.google.com/gke-tpu-topology: "${option[topology]}"
            containers:
            - name: main
              image: "${option[image]}"
              ports:
              - containerPort: 8471
              - containerPort: 8080
              - containerPort: 8482
              env:
              - name: PYTHONUNBUFFERED
                value: "1"
              command:
$words
              resources:
                limits:
                  google.com/tpu: ${option[chips]}
              volumeMounts:
              - name: data
                mountPath: /data
            volumes:
            - name: data
              persistentVolumeClaim:
                claimName: "${option[claim]}"
EOF
}

option=(
  [name]='' [image]='' [accelerator]='' [topology]='' [config]='' [workdir]=''
  [chips]=4 [slices]=1 [restarts]=3 [grace]=120 [namespace]='' [claim]=''
  [python]=python
)
parse "$@"
need name image accelerator topology config claim workdir chips slices restarts grace \
  python
count chips slices grace
match restarts '[0-9]{1,4}' "a whole number"
# Names of pods get -slice-N-N-xxxxx behind them and must stay within 63 characters.
match name '[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?' \
  "at most 40 small letters, digits and inner hyphens"
match topology '[1-9][0-9]*(x[1-9][0-9]*){1,2}' "like 4x4 or 2x2x4"
match image '[A-Za-z0-9._/:@-]+' "the name of an image"
for name in accelerator namespace claim; do
  match "$name" '[a-z0-9.-]+' "small letters, digits, hyphens and dots"
done
match workdir '/data/.+' "a folder below /data"
reserved workdir config job
whole_mesh
count_hosts
words=$(items "${option[python]}" -m skillsd_jax.main "--config=${option[config]}" \
  "--workdir=${option[workdir]}" --job=auto "${mesh[@]}" "${passed[@]}")

if [[ -v option[dry-run] ]]; then
  document
  exit 0
fi
program kubectl
document | kubectl ${option[namespace]:+"--namespace=${option[namespace]}"} apply -f -
