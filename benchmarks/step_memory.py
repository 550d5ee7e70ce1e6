"""Memory of a whole DPO step at a large vocabulary, against the same step with a dense head and nothing recomputed.

    python -m benchmarks.step_memory

Four pairs of 2 x 1024 tokens, all of them scored, a vocabulary of 128256. The steps are compiled as `aligner.run` compiles them, never
run and never allocated: printed is what arguments, results and temporaries take by the compiler's own account. The dense head makes all
logits at once, and of them log-probabilities alone, none of the statistics that are logged beside; LoRA leaves all else frozen.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from aligner import ahead, likelihood
from aligner.models import from_hf
from aligner.types import Head
from configs import common

PAIRS, LENGTH = 4, 1024
GIB = 2**30


def dense(hidden: jax.Array, head: Head, targets: jax.Array, names: tuple[str, ...] = ()) -> dict[str, jax.Array]:
    """In place of `aligner.logprobs.token_stats`: log-probabilities by way of all logits, differentiated by JAX."""
    weight = head.weight.T if head.transposed else head.weight
    logits = jnp.matmul(hidden, weight.astype(hidden.dtype), preferred_element_type=jnp.float32)
    logp = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    return dict.fromkeys(names, logp)


def make_config(dtype: str, remat: str, rank: int) -> Any:
    config = common.base()
    config.data.batch_size = PAIRS
    config.model.dtype, config.train.remat, config.lora.rank = dtype, remat, rank
    config.reference.kind = "base" if rank else "precomputed"
    return config


def bytes_of(model: Any, dtype: str, remat: str, rank: int, token_stats: Callable) -> int:
    """Of the compiled step, all told."""
    row = ahead.Row(tokens=2 * LENGTH, scored=2 * LENGTH)
    with mock.patch.object(likelihood, "token_stats", token_stats):
        step = ahead.make_step(make_config(dtype, remat, rank), model, jax.devices()[:1], row)
        memory = ahead.compile_step(step).memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + memory.temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", help="file to write the figures to")
    options = parser.parse_args()
    from transformers import LlamaConfig

    model = from_hf(
        LlamaConfig(
            vocab_size=options.vocabulary, hidden_size=options.width, intermediate_size=4 * options.width, num_hidden_layers=options.layers,
            num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=2 * LENGTH, tie_word_embeddings=True,
        )
    )  # fmt: skip
    figures = {}
    print(f"{'GiB':10} {'dense, no remat':>16} {'aligner':>8} {'ratio':>6} {'LoRA':>6} {'ratio':>6}", flush=True)
    for dtype in options.dtypes:
        sides = {"dense": ("none", 0, dense), "aligner": ("full", 0, likelihood.token_stats), "lora": ("full", 16, likelihood.token_stats)}
        found = figures[dtype] = {name: bytes_of(model, dtype, *side) / GIB for name, side in sides.items()}
        whole, ours, low = found.values()
        print(f"{dtype:10} {whole:16.2f} {ours:8.2f} {ours / whole:6.3f} {low:6.2f} {low / whole:6.3f}", flush=True)
    print("the bars: 0.25, LoRA 0.125")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
