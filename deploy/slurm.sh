#!/bin/bash
# Several GPU nodes under SLURM; a run that is stopped (time limit, pre-emption, scancel --signal=TERM) is queued again and goes on:
#   sbatch deploy/slurm.sh --config configs/qwen2_7b_instruct.yaml --run.directory /shared/runs/mine
# Submit it from the repository, on a file system that all nodes see, with an environment that has sso_jax's requirements and
# jax[cuda13]: activate it first, or name its Python in PYTHON. run.directory must be on such a file system too. Adapt the lines of
# #SBATCH to the cluster, or override them on sbatch's command line. scancel without --signal=TERM ends the job for good.
# One task per GPU: under SLURM jax gives each task the GPU of its number on the node, so that --gpus-per-task must not be used.
# How far this was checked: shellcheck, and tests/deploy/test_scripts.py runs it with stand-ins for srun and scontrol and a real
# train.py that is stopped, queued again and finished. No SLURM cluster was at hand.
#SBATCH --job-name=sso
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u
cd "${SLURM_SUBMIT_DIR:?submit this file with sbatch}" || exit 1

# SIGTERM reaches the tasks, not this script. All stop after the same step and exit with 75; none is killed because another has ended.
srun --kill-on-bad-exit=0 --wait=300 "${PYTHON:-python}" train.py --checkpoint.stop_seconds 280 "$@" --hosts.initialize true
status=$?

if [ "$status" -eq 75 ]; then
    echo "stopped; job $SLURM_JOB_ID is queued again and goes on where it stopped"
    scontrol requeue "$SLURM_JOB_ID" || echo "scontrol requeue failed; submit the same command again to go on" >&2
fi
exit "$status"
