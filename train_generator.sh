#!/usr/bin/env bash
# Train a generator over a tokenizer's tokens, on all GPUs at hand or of the Slurm job:
#
#   sbatch train_generator.sh CONFIG [a.b=c ...]       (sbatch's own options come before the file's name)
#   bash train_generator.sh CONFIG [a.b=c ...]
#
# A stopped run continues from its last checkpoint; a job whose time is up saves and requeues itself.
# Nodes and GPUs: sbatch --nodes N --gpus-per-node M --cpus-per-gpu C train_..., or once in scripts/site.env
# (docs/cluster.md): a header that asked for GPUs would be refused by a cluster that has none.
#SBATCH --job-name=train_generator
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300
set -euo pipefail

# sbatch runs a copy of this file in a folder of its own, so Slurm must say where the repository is.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ ! -f $root/scripts/launch.sh ]]; then
    root=${SLURM_SUBMIT_DIR:-.}
fi
if [[ ! -f $root/scripts/launch.sh ]]; then
    root=$(dirname "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\).*/\1/p')")
fi

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    echo "usage: bash train_generator.sh CONFIG [a.b=c ...]   for example configs/fashion/generator.yaml" >&2
    exit $(($# == 0 ? 2 : 0))
fi
config=${1#config=}
shift
exec "$root/scripts/launch.sh" "$root/scripts/train_generator.py" config="$config" "$@"
