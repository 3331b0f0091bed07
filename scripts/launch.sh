#!/usr/bin/env bash
# Run a Python script of this repository with one process a GPU: on this machine, or on every node of a Slurm job.
#
#   scripts/launch.sh SCRIPT [ARGUMENT ...]
#
# Inside a Slurm job (sbatch, salloc, srun --pty bash) it starts one launcher a node with srun; elsewhere it uses the
# GPUs at hand. Without a GPU there is one process. A script that ends with status 75 has saved its work because time is
# up: its job is queued again. From the environment, all optional:
#   NUM_PROCESSES              processes on each machine
#   MASTER_ADDR, MASTER_PORT   where the processes meet: the first node, and a port in 20000..29999 made of the job's id
#   ODP_ENV                    the virtual environment (.venv of the repository)
#   ODP_CONTAINER, ODP_SRUN    words before python, and options of srun; these and more in scripts/site.env.example
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/environment.sh
source "$root/scripts/environment.sh"

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    sed -n 's/^# \{0,1\}//p' "${BASH_SOURCE[0]}" | sed -n '2,12p'
    exit $(($# == 0 ? 2 : 0))
fi

# Second time round in a Slurm job, or without Slurm: this machine's processes.
if [[ -z ${SLURM_JOB_ID:-} || -n ${LAUNCHED_NODES:-} ]]; then
    script=$1
    shift
    [[ -f $script ]] || script=$root/$script
    exec "${python[@]}" "$root/scripts/launch_node.py" "$script" "$@"
fi

# First time round: this file again on every node, which then knows its own GPUs and its SLURM_NODEID.
export LAUNCHED_NODES=${SLURM_JOB_NUM_NODES:-1}
if [[ $LAUNCHED_NODES -gt 1 ]]; then
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
    # The address at which Slurm itself finds the node; its name means something to Slurm alone.
    address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    export MASTER_ADDR=${MASTER_ADDR:-${address:-$first}}
    export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
fi
# srun does not take over the job's --cpus-per-task by itself, and waits for ever for what the step of a shell
# (srun --pty bash) holds, where it may not share it.
# shellcheck disable=SC2086
srun --nodes="$LAUNCHED_NODES" --ntasks="$LAUNCHED_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} ${SLURM_STEP_ID:+--overlap} ${ODP_SRUN:-} \
    "${BASH_SOURCE[0]}" "$@" &
srun=$!
# sbatch's --signal goes to the steps; with its B:, or by scancel --full, it comes here, and srun hands it on.
trap 'kill -USR1 "$srun" 2> /dev/null || true' TERM USR1
status=0
wait "$srun" || status=$?
while kill -0 "$srun" 2> /dev/null; do # a signal ended the waiting, not srun
    status=0
    wait "$srun" || status=$?
done
if [[ $status -eq 75 ]]; then
    # scancel sends TERM too, and then a job is COMPLETING while it saves: it must not come back.
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format="%T %r" || true)
    if [[ $state == COMPLETING* && $state != *TimeLimit ]]; then
        echo "job $SLURM_JOB_ID was cancelled, and has saved: to go on, start the same command once more"
    else
        echo "job $SLURM_JOB_ID is queued again, to go on where it was"
        scontrol requeue "$SLURM_JOB_ID" || echo "not queued again: start the same command once more" >&2
    fi
fi
exit "$status"
