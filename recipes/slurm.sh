#!/bin/bash
# Stage 2 on two machines with eight GPUs each: sbatch recipes/slurm.sh
# Slurm sends SIGTERM two minutes before the time is up; the run saves, exits with 0 and is queued again.
#SBATCH --job-name=fvgen-dmd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

OUT=${OUT:-runs/dmd}
ITERATIONS=${ITERATIONS:-5000}
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # jobs that share a machine need different ones
export WORLD_SIZE=$SLURM_NTASKS OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

# One process per GPU; srun passes signals on to all of them, which the deepspeed launcher does not.
srun --kill-on-bad-exit=1 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec .venv/bin/python \
    recipes/stage2_dmd.py --config "$0" --deepspeed recipes/deepspeed/zero2.json \
    device=cuda precision=bfloat16 checkpoint_activations=true "init=$1" "out=$2" "iterations=$3"' \
    "${CONFIG:-recipes/configs/tiny.yaml}" "${INIT:-runs/gan}" "$OUT" "$ITERATIONS"

if [ ! -f "$OUT/summary.json" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
