"""What the machine itself can do and how much memory a process held: the yardsticks of every comparison."""

from __future__ import annotations

import os
import time
from collections.abc import Callable


def best(call: Callable[[], object], repeats: int = 9) -> float:
    """Seconds of the fastest of `repeats` calls, after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def gemm_rates(shape: tuple[int, int, int] = (2048, 512, 1408)) -> dict[str, float]:
    """GFLOP/s of an [M,K] x [K,N] product in torch and jax, float32 and bfloat16 (jax: float32 result, its fast form on CPU)."""
    import jax
    import jax.numpy as jnp
    import torch

    m, k, n = shape
    rates = {}
    for dtype in ("float32", "bfloat16"):
        a, b = (torch.randn(s).to(getattr(torch, dtype)) for s in ((m, k), (k, n)))
        rates[f"torch {dtype}"] = 2e-9 * m * k * n / best(lambda a=a, b=b: a @ b)
        x, y = (jnp.ones(s, dtype) for s in ((m, k), (k, n)))
        dot = jax.jit(lambda x, y: jnp.dot(x, y, preferred_element_type=jnp.float32))
        rates[f"jax {dtype}"] = 2e-9 * m * k * n / best(lambda x=x, y=y, dot=dot: dot(x, y).block_until_ready())
    return rates


def cpu_name() -> str:
    """The processor's name and how many of its cores this process may use."""
    with open("/proc/cpuinfo") as file:
        name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown CPU")
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def resident_mib(peak: bool = False) -> float:
    """Resident memory of this process in MiB, now or the highest since the last `forget_peak` (Linux)."""
    key = "VmHWM:" if peak else "VmRSS:"
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(key))


def forget_peak() -> None:
    """Start the peak of `resident_mib` anew."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
