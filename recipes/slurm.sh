#!/bin/bash
# Stage 2 on two machines with eight GPUs each: CONFIG=X.yaml INIT=runs/gan OUT=runs/dmd sbatch recipes/slurm.sh
# (batch_size must be a multiple of the 16 processes.) Slurm sends SIGTERM two minutes before the time is up; the run
# saves, exits with 0 and is queued again. That is the time for one iteration and its checkpoint.
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

: "${CONFIG:?give CONFIG=X.yaml, the settings}" "${INIT:?give INIT=DIR, a finished stage 1}"
OUT=${OUT:-runs/dmd}
ITERATIONS=${ITERATIONS:-5000}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # not head: a broken pipe would end the script
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a machine need different ones
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

# One process per GPU; srun passes signals on to all of them, which the deepspeed launcher does not. Since Slurm 22.05
# it must be told --cpus-per-task again, or each process gets one core.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 bash -c '
    WORLD_SIZE=$SLURM_NTASKS RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec .venv/bin/python \
    recipes/stage2_dmd.py --config "$0" --deepspeed recipes/deepspeed/zero2.json \
    device=cuda precision=bfloat16 checkpoint_activations=true "init=$1" "out=$2" "iterations=$3"' \
    "$CONFIG" "$INIT" "$OUT" "$ITERATIONS"

if [ ! -f "$OUT/summary.json" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
