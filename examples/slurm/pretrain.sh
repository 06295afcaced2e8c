#!/bin/bash
# Pretrain on several machines under SLURM; options after the two names go to `crate-mae pretrain`:
#   sbatch examples/slurm/pretrain.sh FOLDER runs/mine --epochs 800 --precision bfloat16
# The data and the run's folder must be on a file system that all machines share. When the time is over, the run saves
# itself and stops; the same command goes on with it, also on another number of machines.
#SBATCH --job-name=crate-mae
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append

set -euo pipefail

if (($# < 2)); then
    echo "usage: sbatch $0 DATA OUT [OPTION...]" >&2
    exit 2
fi
data=$1 out=$2
shift 2

# One whole model per process (ddp.yaml), or a share of it (fsdp.yaml).
config=${ACCELERATE_CONFIG:-examples/accelerate/ddp.yaml}
per_machine=${SLURM_GPUS_ON_NODE:?how many processes a machine should run}
mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# Since SLURM 22.05 srun does not take the cores of a task from sbatch.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# How long the launcher lets processes save themselves: less than SLURM gives above.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-270}
launch=(
    accelerate launch --config_file "$config"
    --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * per_machine))
    --main_process_ip "${machines[0]}" --main_process_port "${MASTER_PORT:-29500}"
)
# SLURM_NODEID differs between machines, so it is read there.
srun bash -c '"${@:2:$1}" --machine_rank "$SLURM_NODEID" "${@:$1+2}"' \
    _ "${#launch[@]}" "${launch[@]}" -m crate_mae pretrain "$data" --out "$out" "$@"
