#!/usr/bin/env bash
# Train a tokenizer (stage 1 or 2) or its teacher, whichever CONFIG describes, on all GPUs at hand or of the Slurm job:
#
#   sbatch train_tokenizer.sh CONFIG [a.b=c ...]       (sbatch's own options come before the file's name)
#   bash train_tokenizer.sh CONFIG [a.b=c ...]
#
# A stopped run continues from its last checkpoint; a job whose time is up saves and requeues itself.
# Nodes and GPUs: sbatch --nodes N --gpus-per-node M --cpus-per-gpu C train_..., or once in scripts/site.env
# (docs/cluster.md): a header that asked for GPUs would be refused by a cluster that has none.
#SBATCH --job-name=train_tokenizer
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
    echo "usage: bash train_tokenizer.sh CONFIG [a.b=c ...]   for example configs/fashion/stage1.yaml" >&2
    exit $(($# == 0 ? 2 : 0))
fi
config=${1#config=}
shift

# shellcheck source=scripts/environment.sh
source "$root/scripts/environment.sh"
# A mistake in the configuration shows here, before any node starts.
kind=$("${python[@]}" -c '
import sys

from utils.cli import run
from utils.config import check_kind, load_config

run(lambda: print(check_kind(load_config(sys.argv[1], sys.argv[2:]), sys.argv[1], "teacher", "tokenizer")))
' "$config" "$@")
exec "$root/scripts/launch.sh" "$root/scripts/train_$kind.py" config="$config" "$@"
