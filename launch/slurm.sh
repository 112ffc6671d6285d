#!/usr/bin/env bash
# Runs `ouro VERB …` (`train` if none is named) on SLURM nodes, a process for each GPU.
#
#   launch/slurm.sh [option …] [VERB] --flag=value …
#   launch/slurm.sh --nodes=4 --gpus=8 --sbatch='--partition=gpu --time=24:00:00' \
#       train --config=configs/ouro_1p4b.py --workdir=/shared/runs/ouro_1p4b
#
#   --nodes=1 --gpus=8  nodes, and GPUs of each; --gpus=0: a process a node, on its CPU
#   --sbatch='FLAGS'    flags of sbatch
#   --array=0,2-4       an array job of these tasks; %a in the command is a task's number
#   --logs=DIR          DIR/job_ID.log, DIR/NODE_PROCESS.log; of an array DIR/TASK/NODE_PROCESS.log
#
# Within an allocation (salloc, or the job that it submits) it runs, again after a crash. Two minutes
# before its time is over the job saves and queues itself again; SLURM queues it again when a node
# fails or is taken away. `scancel --batch --signal=TERM JOB` saves and ends it.
#
# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
nodes=1 gpus=8 sbatch="" array=""
parse "nodes gpus sbatch array" "$@"
whole_numbers nodes gpus

submit() {
  local inside=("$root/launch/slurm.sh" "--name=$name" "--logs=$logs" "--attempts=$attempts"
    "--pause=$pause" ${cache:+"--cache=$cache"} -- "${command[@]}")
  local flags=("--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$((gpus ? gpus : 1))"
    "--output=$logs/job_%j.log" --open-mode=append --requeue --signal=B:USR1@120)
  if ((gpus)); then flags+=("--gpus-per-node=$gpus"); fi
  if [[ -n $array ]]; then flags+=("--array=$array"); fi
  local more
  read -ra more <<<"$sbatch"
  run mkdir -p "$logs"
  run sbatch "${flags[@]}" "${more[@]}" "--wrap=exec $(quoted "${inside[@]}")"
}

# The processes of a run end together, whatever one of them fails of; srun ends what is left of them
# two minutes after the first.
step() {
  srun --kill-on-bad-exit=0 --wait=120 "--output=$logs/%N_%t.log" --open-mode=append \
    ouro "${command[@]}" &
  srun=$!
  ended "$srun"
}

# Asks the run, once, to save and end: a second time would cut it short. srun itself answers TERM by
# killing; scancel signals the processes, and not this script. If SLURM ends the job (scancel,
# preemption), its KillWait is the limit.
stop() {
  if ! $stopping; then stopping=true && scancel --signal=TERM "$job"; fi
}

# The last two minutes of the job, of which 20 seconds are for queueing it.
time_is_over() {
  local second=0 code=75
  stop
  while [[ -n $srun ]] && kill -0 "$srun" 2>/dev/null && ((second++ < 100)); do sleep 1; done
  if [[ -n $srun ]] && ! kill -0 "$srun" 2>/dev/null; then
    wait "$srun"
    code=$?
  fi
  case $code in 0 | 2 | 130) ;; *) scontrol requeue "$job" ;; esac
  exit "$code"
}

if [[ -z ${SLURM_JOB_ID:-} ]]; then
  needs sbatch
  submit
  exit
fi
needs srun
job=$SLURM_JOB_ID srun=""
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  command=("${command[@]//%a/$SLURM_ARRAY_TASK_ID}") logs+=/$SLURM_ARRAY_TASK_ID
  # The SLURM_JOB_ID of one of the tasks is the whole array's.
  job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi
export JAX_COMPILATION_CACHE_DIR=${cache:-${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/ouro_jax}}
# srun does not take it from sbatch.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
mkdir -p "$logs"
trap stop TERM
trap time_is_over USR1
restart step
