"""The programs that launchers call, made to run on this machine or to write down what they got."""

import os
import subprocess
from pathlib import Path

from micro_run import ROOT

# Writes its arguments down, and ends with the next of the codes in $FAKE/codes. What hangs keeps
# its name; `save75` ends with 75 a moment after TERM, each of which it writes down.
OURO = """
number=$(flock "$FAKE" bash -c 'echo "$1" >>"$FAKE/ouro"; wc -l <"$FAKE/ouro"' bash \
  "$* ${JAX_COMPILATION_CACHE_DIR:-}")
echo "process ${SLURM_PROCID:-} says $*"
code=$(sed -n "${number}p" "$FAKE/codes" 2>/dev/null)
case ${code:-0} in
  save*)
    trap 'echo "$*" >>"$FAKE/told"' TERM
    echo >>"$FAKE/ready"
    while [[ ! -e $FAKE/told ]]; do /bin/sleep 0.05; done
    if [[ $* == *--process_id=1* ]]; then /bin/sleep 1; fi
    /bin/sleep 0.5
    echo "process ${SLURM_PROCID:-} has saved"
    exit "${code#save}"
    ;;
  hang | deaf)
    if [[ $code == deaf ]]; then trap '' TERM; fi
    echo >>"$FAKE/ready"
    exec -a "$0" /bin/sleep 60
    ;;
esac
exit "${code:-0}"
"""

# A job of --nodes × --ntasks-per-node, or of each task of --array, run at once.
SBATCH = """
echo "$*" >>"$FAKE/sbatch"
for flag in "$@"; do
  case $flag in
    --nodes=*) nodes=${flag#*=} ;;
    --ntasks-per-node=*) tasks=${flag#*=} ;;
    --array=*) array=${flag#*=} ;;
    --wrap=*) line=${flag#*=} ;;
  esac
done
export SLURM_JOB_ID=$RANDOM SLURM_NNODES=$nodes SLURM_NTASKS_PER_NODE=$tasks
export SLURM_NTASKS=$((nodes * tasks)) SLURM_JOB_NODELIST=localhost
if [[ -z ${array:-} ]]; then sh -c "$line"; exit; fi
for task in ${array//,/ }; do
  SLURM_ARRAY_JOB_ID=$SLURM_JOB_ID SLURM_ARRAY_TASK_ID=$task sh -c "$line" || code=$?
done
exit "${code:-0}"
"""

# The tasks of a step, whose code is the highest of theirs. It answers TERM as the real one does.
SRUN = """
trap 'kill -KILL $(cat "$FAKE/tasks")' TERM
while [[ $1 == --* ]]; do
  if [[ $1 == --output=* ]]; then output=${1#*=}; fi
  shift
done
export SLURM_STEP_NODELIST=$SLURM_JOB_NODELIST SLURM_STEP_NUM_NODES=$SLURM_NNODES SLURM_STEP_ID=0
for ((task = 0; task < SLURM_NTASKS; task++)); do
  node=$((task / SLURM_NTASKS_PER_NODE)) file=${output/\\%N/node$((task / SLURM_NTASKS_PER_NODE))}
  SLURM_PROCID=$task SLURM_LOCALID=$((task % SLURM_NTASKS_PER_NODE)) SLURM_NODEID=$node \\
    "$@" >>"${file/\\%t/$task}" 2>&1 &
  echo $! >>"$FAKE/tasks"
done
worst=0
for ((task = 0; task < SLURM_NTASKS; task++)); do
  wait -n || { code=$? && worst=$((code > worst ? code : worst)); }
done
exit $worst
"""

# Only what `scancel --signal=TERM JOB` does: the tasks get it.
SCANCEL = """
echo "$*" >>"$FAKE/scancel"
kill -TERM $(cat "$FAKE/tasks")
"""

RECORDER = """
echo "$*" >>"$FAKE/$(basename "$0")"
cat >>"$FAKE/$(basename "$0").stdin"
"""

# Lines of shell run in the worker's home; the TPU's state is the next line of $FAKE/states.
GCLOUD = """
echo "$*" >>"$FAKE/gcloud"
export HOME=$FAKE/worker
mkdir -p "$HOME"
for flag in "$@"; do
  case $flag in
    describe)
      sed -n 1p "$FAKE/states"
      (($(wc -l <"$FAKE/states") == 1)) || sed -i 1d "$FAKE/states"
      ;;
    --command=*) (cd && bash -c "${flag#*=}") ;;
    --output-directory=*) touch "${flag#*=}/0.log" ;;
    scp) cp "$5" ~ ;;
  esac
done
"""


class Fakes:
    """A folder of programs for the PATH, and what they have written down."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        self.env = os.environ | {
            "PATH": f"{folder}/bin:{os.environ['PATH']}", "FAKE": str(folder), "HOME": str(folder),
        }  # fmt: skip
        self.add(ouro=OURO, sbatch=SBATCH, srun=SRUN, scancel=SCANCEL, gcloud=GCLOUD)
        self.add(scontrol=RECORDER, kubectl=RECORDER, xpk=RECORDER)

    def add(self, **programs: str) -> None:
        for name, text in programs.items():
            file = self.folder / "bin" / name
            file.write_text(f"#!/bin/bash\n{text}")
            file.chmod(0o755)

    def codes(self, *codes: int | str) -> None:
        """What `ouro` ends with, call after call; 0 after that. `hang`: it does not end."""
        (self.folder / "codes").write_text("".join(f"{code}\n" for code in codes))

    def calls(self, program: str) -> list[str]:
        file = self.folder / program
        return file.read_text().splitlines() if file.exists() else []

    def launch(self, script: str, *arguments: str) -> subprocess.CompletedProcess:
        """Runs a launcher in this folder."""
        return subprocess.run(
            [str(ROOT / "launch" / f"{script}.sh"), *arguments],
            capture_output=True, text=True, env=self.env, cwd=self.folder, timeout=300,
        )  # fmt: skip
