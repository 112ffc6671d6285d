#!/usr/bin/env bash
# Runs `ouro VERB …` (`train` if none is named) on TPU slices of a GKE cluster, a process on every
# host: as the JobSet of launch/jobset.yaml, or by XPK.
#
#   launch/gke.sh --image=IMAGE --claim=CLAIM [option …] [VERB] --flag=value …
#   launch/gke.sh --image=us-docker.pkg.dev/P/R/ouro_jax --claim=shared --type=tpu-v5p-slice \
#       --topology=4x4x4 train --config=configs/ouro_1p4b.py --workdir=/shared/runs/ouro_1p4b
#   launch/gke.sh --image=IMAGE --xpk=CLUSTER --type=v5p-128 train --config=… --workdir=…
#
#   --image=IMAGE      made by launch/Dockerfile
#   --claim=CLAIM      a PersistentVolumeClaim, mounted as /shared: for workdir and data
#   --type=TYPE        of the slices, in GKE's words or XPK's
#   --topology=4x4x4   chips along the axes of a slice
#   --chips=4          chips of a host: 4, but 1 or 8 where a slice is one host
#   --slices=1         so many, joined over the data-centre network
#   --xpk=CLUSTER      let XPK write and submit it; storage is what `xpk storage` attached
#   --cache, --logs    /shared/cache and /shared/logs/NAME; under XPK none unless told
#
# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
image="" type=tpu-v5p-slice topology=4x4x4 chips=4 slices=1 claim="" xpk=""
parse "image type topology chips slices claim xpk" "$@"
whole_numbers chips slices
name=$(tr '[:upper:]_.' '[:lower:]-' <<<"$name")
# XPK's limit; Kubernetes' own is a little longer.
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  fail "--name=$name: expected at most 40 of a-z, 0-9 and -, a letter first"
inside=(launch/local.sh --attempts=1)

if [[ -n $xpk ]]; then
  needs xpk image
  # XPK passes TERM on to the shell that it runs the command in: this must be that shell.
  inside=(exec "${inside[@]}" ${cache:+"--cache=$cache"} -- "${command[@]}")
  # XPK starts again after 42 and 127 to 255 by itself; 1 is a crash of ours, 75 a run that was asked
  # to stop, 124 one that was stuck. It counts all of them.
  run xpk workload create "--workload=$name" "--cluster=$xpk" "--tpu-type=$type" \
    "--num-slices=$slices" "--docker-image=$image" "--max-restarts=$attempts" \
    --restart-on-exit-codes=1,75,124 --termination-grace-period-seconds=120 "--command=$(quoted "${inside[@]}")"
  exit
fi

needs kubectl image claim
[[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || fail "--topology=$topology: expected e.g. 4x4x4"
hosts=$((${topology//x/*} / (chips ? chips : 1)))
((hosts * chips == ${topology//x/*})) || fail "--chips=$chips does not divide the chips of $topology"
inside+=("--cache=${cache:-/shared/cache}" "--logs=/shared/logs/$name" -- "${command[@]}")
words="[$(printf '%s\n' "${inside[@]}" | sed 's/[\\"]/\\&/g; s/.*/"&"/' | paste -sd, -)]"
manifest=""
while IFS= read -r line; do
  if [[ $line =~ ^([^:]*:\ ).*\ #\ \{([a-z]+)\}$ ]]; then
    key=${BASH_REMATCH[2]}
    line=${BASH_REMATCH[1]}${!key}
  fi
  manifest+=$line$'\n'
done <"$root/launch/jobset.yaml"
if $dry_run; then printf '%s' "$manifest"; else kubectl apply --filename=- <<<"$manifest"; fi
