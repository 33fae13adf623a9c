#!/bin/sh
# One run over the nodes of a SLURM job: on each node the launcher once, which starts a process for each of its GPUs.
#   from the root of this repository, with the virtual environment active, edit the lines below and
#   MODEL=/models/MiniCPM-V-2 DATA=my/train.json sbatch finetune/slurm.sh --resume_from_checkpoint true
# The launcher's variables are passed on, and so are further flags.
#SBATCH --job-name=minicpmv
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
# The last line has SLURM send SIGTERM to the run, not to this script, 120 seconds before its time is over.

LAUNCHER="${LAUNCHER:-finetune/finetune_lora.sh}" # or finetune/finetune_ds.sh

# SLURM runs a copy of this script from a folder of its own: paths begin where sbatch was called.
cd "${SLURM_SUBMIT_DIR:?is not set: start this script with sbatch}" || exit 1
NODES="$(scontrol show hostnames "$SLURM_JOB_NODELIST")" || exit 1
NNODES="$SLURM_JOB_NUM_NODES"
MASTER_ADDR="$(echo "$NODES" | head -n 1)"
MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}" # jobs that share a node want different ones
export NNODES MASTER_ADDR MASTER_PORT

# srun does not take --cpus-per-task from sbatch (since SLURM 22.05).
# shellcheck disable=SC2016 # SLURM_NODEID is known only on the nodes
exec srun --ntasks-per-node=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=1 \
  sh -c 'NODE_RANK="$SLURM_NODEID" exec sh "$0" "$@"' "$LAUNCHER" "$@"
