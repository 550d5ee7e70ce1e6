#!/bin/bash
# Open MPI 4 or 5, one process for each slot of a host:
#     HOSTS=node1:8,node2:8 launch/mpi.sh --config configs/dpo_llava.py --workdir /shared/runs/dpo --config.mesh.data=2 --config.mesh.fsdp=8

HOSTS="${HOSTS:?HOSTS is missing: such as HOSTS=node1:8,node2:8}"
CHIP="${CHIP:-h100}" # see launch/settings.sh
PORT="${PORT:-12321}"
. "$(dirname "$0")/settings.sh" "$CHIP" || exit

first="${HOSTS%%,*}"
export JAX_COORDINATOR_ADDRESS="${first%%:*}:$PORT"
# what mpirun gives the processes on other hosts: among it where `python` is, and who may read a gated checkpoint
variables=(PATH LD_LIBRARY_PATH HF_HOME HF_TOKEN HF_HUB_OFFLINE)
variables+=(JAX_COORDINATOR_ADDRESS XLA_FLAGS JAX_OPTIMIZATION_LEVEL XLA_PYTHON_CLIENT_MEM_FRACTION NCCL_NVLS_ENABLE CUDA_DEVICE_MAX_CONNECTIONS JAX_PLATFORMS)
passed=()
for name in "${variables[@]}"; do [ -n "${!name:-}" ] && passed+=(-x "$name"); done

# each process takes the GPU of its place on the host
exec mpirun --host "$HOSTS" "${passed[@]}" bash -c \
    '[ "$JAX_PLATFORMS" = cpu ] || export CUDA_VISIBLE_DEVICES="$OMPI_COMM_WORLD_LOCAL_RANK"; exec python -m aligner.main "$@"' aligner "$@"
