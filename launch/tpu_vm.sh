#!/usr/bin/env bash
# Runs `ouro VERB …` (`train` if none is named) on a Cloud TPU, a process on every worker.
#
#   launch/tpu_vm.sh --zone=ZONE --type=TYPE [option …] [VERB] --flag=value …
#   launch/tpu_vm.sh --zone=us-east5-a --type=v5p-256 --spot --share=10.0.0.2:/vol1 \
#       train --config=configs/ouro_1p4b.py --workdir=/shared/runs/ouro_1p4b
#
#   --zone, --type      as in gcloud, whose project it takes; the TPU is called --name
#   --runtime=VERSION   software of the TPU (v2-alpha-tpuv5)
#   --spot              may be preempted: one that was is asked for anew
#   --share=HOST:/PATH  an NFS share, mounted as /shared on every worker: for workdir and data
#   --logs=DIR          where the workers' logs come to when the run has ended: DIR/WORKER.log
#
# Asks for the TPU unless it is there, puts the commit checked out here on its workers, starts the
# run and watches it. Repeating the command is safe: a run that is going on is left alone.
#
# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
zone="" type="" runtime=v2-alpha-tpuv5 spot=false share="" pause=60
parse "zone type runtime spot share" "$@"
needs gcloud zone type

queue() { run gcloud compute tpus queued-resources "$1" "$name" "--zone=$zone" "${@:2}"; }
state() { queue describe '--format=value(state.state)' 2>/dev/null; }
workers() { run gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=all "--command=$1" "${@:2}"; }

create() {
  local flags=("--node-id=$name" "--accelerator-type=$type" "--runtime-version=$runtime")
  if $spot; then flags+=(--spot); fi
  queue create "${flags[@]}"
}

# uv brings Python 3.11 where the TPU's image has an older one.
install() {
  local archive=${TMPDIR:-/tmp}/ouro_jax.tar.gz setup
  setup="flock -n ouro.lock rm -f ouro.code || exit 0; mkdir -p ouro_jax && tar xzf ouro_jax.tar.gz -C ouro_jax
cd ouro_jax && export PATH=~/.local/bin:\$PATH && python3 -m pip install -q --user uv &&
uv venv -q --clear --python=3.11 .venv && uv pip install -q -e '.[tpu]' gcsfs"
  if [[ -n $share ]]; then
    setup+=" && { mountpoint -q /shared || { sudo apt-get install -qy nfs-common &&
sudo mkdir -p /shared && sudo mount -t nfs $(quoted "$share") /shared; }; }"
  fi
  run git -C "$root" archive --format=tar.gz "--output=$archive" HEAD &&
    run gcloud compute tpus tpu-vm scp "$archive" "$name:" "--zone=$zone" --worker=all &&
    workers "$setup"
}

# Detached, so that the run does not hang on this machine. The lock keeps a second start out.
start() {
  local inside=(launch/local.sh "--attempts=$attempts" "--pause=$pause" --logs=logs
    ${cache:+"--cache=$cache"} -- "${command[@]}") line
  line="$(quoted "${inside[@]}"); echo \$? >../ouro.code"
  workers "cd ouro_jax; nohup flock -n ../ouro.lock bash -c $(quoted "$line") >/dev/null 2>&1 </dev/null &"
}

# Until the last worker has ended; a wrong config on one ends it on all. One that holds no lock and
# has left no code was killed. A TPU that was taken away is no failure.
watch() {
  local codes now
  while now=$(state) && [[ $now == ACTIVE ]]; do
    sleep "$pause"
    codes=$(workers 'flock -n ouro.lock sh -c "cat ouro.code || echo 1" || echo running') || continue
    if grep -qx 2 <<<"$codes"; then workers 'fuser -sk ouro.lock; true' && return 2; fi
    grep -q running <<<"$codes" || return "$(sort -n <<<"$codes" | tail -1)"
  done
  if [[ $now == SUSPENDED ]]; then return 75; fi
  return 1
}

attempt() {
  local now
  while now=$(state) && [[ $now != ACTIVE ]]; do
    case $now in
      "") create ;;
      SUSPENDED | FAILED) queue delete --force --quiet ;;
    esac || return
    sleep "$pause"
  done
  install && start && watch
}

if $dry_run; then
  create && install && start
else
  restart attempt
fi
code=$?
run mkdir -p "$logs"
workers 'cat ouro_jax/logs/*' "--output-directory=$logs"
exit "$code"
