#!/usr/bin/env bash
# Run a Python script of this repository with one process a GPU: on this machine, or on every node of a Slurm job.
#
#   scripts/launch.sh SCRIPT [ARGUMENT ...]
#
# Inside a Slurm job (sbatch, salloc) it starts one launcher a node with srun; elsewhere it uses the GPUs at hand.
# Without a GPU there is one process. From the environment, all optional:
#   NUM_PROCESSES              processes on each machine
#   MASTER_ADDR, MASTER_PORT   where the processes meet: the first node, and a port in 20000..29999 made of the job's id
#   ODP_ENV                    the virtual environment (.venv of the repository)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/environment.sh
source "$root/scripts/environment.sh"

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    sed -n 's/^# \{0,1\}//p' "${BASH_SOURCE[0]}" | sed -n '2,10p'
    exit $(($# == 0 ? 2 : 0))
fi

# First time round in a Slurm job: once more on every node, which then knows its own GPUs and its SLURM_NODEID.
if [[ -n ${SLURM_JOB_ID:-} && -z ${LAUNCHED_NODES:-} ]]; then
    export LAUNCHED_NODES=${SLURM_JOB_NUM_NODES:-1}
    if [[ $LAUNCHED_NODES -gt 1 ]]; then
        mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
        export MASTER_ADDR=${MASTER_ADDR:-${hosts[0]}}
        export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
    fi
    # srun does not take over the job's --cpus-per-task by itself.
    exec srun --nodes="$LAUNCHED_NODES" --ntasks="$LAUNCHED_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "${BASH_SOURCE[0]}" "$@"
fi

script=$1
shift
[[ -f $script ]] || script=$root/$script

processes=${NUM_PROCESSES:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
if [[ $processes -gt 1 ]]; then
    cores=$(nproc)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
fi

if [[ ${LAUNCHED_NODES:-1} -gt 1 ]]; then
    exec "$python" -m torch.distributed.run --nnodes="$LAUNCHED_NODES" --node-rank="$SLURM_NODEID" \
        --nproc-per-node="$processes" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" "$script" "$@"
elif [[ $processes -gt 1 ]]; then
    exec "$python" -m torch.distributed.run --standalone --nproc-per-node="$processes" "$script" "$@"
else
    exec "$python" "$script" "$@"
fi
