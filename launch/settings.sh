# XLA and NCCL settings by chip, for sourcing: . launch/settings.sh CHIP
# CHIP: a100, h100, h200, b200, v4, v5e, v5p, v6e, cpu. What is set already in the environment comes later in XLA_FLAGS and so wins.
# Sources: JAX's GPU performance guide, NVIDIA's JAX-Toolbox, Google's GPU and TPU recipes.

case "${1:-}" in
a100 | h100 | h200 | b200)
    export JAX_OPTIMIZATION_LEVEL="${JAX_OPTIMIZATION_LEVEL:-O1}" # latency-hiding scheduler, pipelined collectives
    export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}"
    export NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-1}" # reductions in the switch, where NVLink has them
    settings="--xla_gpu_enable_triton_gemm=false --xla_gpu_enable_while_loop_double_buffering=true"
    # one collective for at least all the weights of a layer
    settings="$settings --xla_gpu_all_gather_combine_threshold_bytes=1073741824"
    settings="$settings --xla_gpu_reduce_scatter_combine_threshold_bytes=1073741824"
    settings="$settings --xla_gpu_all_reduce_combine_threshold_bytes=1073741824"
    case "$1" in
    a100) unset NCCL_NVLS_ENABLE ;;
    h100 | h200) export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" ;;
    b200) settings="$settings --xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL" ;;
    esac
    export XLA_FLAGS="$settings ${XLA_FLAGS:-}"
    ;;
v4 | v5e | v5p | v6e)
    settings="--xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
    settings="$settings --xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true"
    case "$1" in v6e) settings="$settings --xla_tpu_scoped_vmem_limit_kib=98304" ;; esac
    export LIBTPU_INIT_ARGS="$settings ${LIBTPU_INIT_ARGS:-}"
    ;;
cpu)
    export JAX_PLATFORMS=cpu
    ;;
*)
    echo "launch/settings.sh: chip '${1:-}' is not known; known are a100, h100, h200, b200, v4, v5e, v5p, v6e, cpu" >&2
    return 2 2>/dev/null || exit 2
    ;;
esac
unset settings
