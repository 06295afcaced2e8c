#!/bin/bash
# Pretrain on several machines with SLURM. Options after the two paths are passed to `crate-mae pretrain`:
#   sbatch examples/slurm/pretrain.sh FOLDER runs/mine --epochs 800 --precision bfloat16
# The data and the run's folder must be on a file system that all machines share. Before the time limit, the run saves a
# checkpoint and stops; the same command resumes it, even on a different number of machines.
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

# One whole model per process (ddp.yaml), or a shard of it (fsdp.yaml).
config=${ACCELERATE_CONFIG:-examples/accelerate/ddp.yaml}
per_machine=${SLURM_GPUS_ON_NODE:?how many processes a machine should run}
mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# Since SLURM 22.05, srun does not inherit --cpus-per-task from sbatch.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Seconds that the launcher gives processes to save a checkpoint: less than SLURM gives above.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-270}
launch=(
    accelerate launch --config_file "$config"
    --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * per_machine))
    --main_process_ip "${machines[0]}" --main_process_port "${MASTER_PORT:-29500}"
)
# SLURM_NODEID differs between machines, so each machine reads its own.
srun bash -c '"${@:2:$1}" --machine_rank "$SLURM_NODEID" "${@:$1+2}"' \
    _ "${#launch[@]}" "${launch[@]}" -m crate_mae pretrain "$data" --out "$out" "$@"
