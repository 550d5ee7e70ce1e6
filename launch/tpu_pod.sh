#!/bin/bash
# Cloud TPU machines, the same command on every worker; aligner is installed there, `pip install '.[tpu]'`, in the folder DIRECTORY:
#     TPU=my-pod ZONE=us-east5-a launch/tpu_pod.sh --config configs/dpo_llava.py --workdir /mnt/bucket/runs/dpo --config.mesh.fsdp=32

TPU="${TPU:?TPU is missing: the name of the TPU}"
ZONE="${ZONE:?ZONE is missing: such as ZONE=us-east5-a}"
CHIP="${CHIP:-v5e}" # see launch/settings.sh
DIRECTORY="${DIRECTORY:-aligner}"

# the workers know of each other through their metadata server, which JAX asks
printf -v arguments '%q ' "$@"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command \
    "cd $DIRECTORY && . launch/settings.sh $CHIP && ALIGNER_DISTRIBUTED=1 python -m aligner.main $arguments"
