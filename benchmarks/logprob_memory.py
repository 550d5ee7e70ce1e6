"""Memory of a log-probability and its gradients at a large vocabulary: `aligner.logprobs` against the dense computation.

    python -m benchmarks.logprob_memory

Both programs are compiled, never run and never allocated: value and gradients (of hidden states and head) of a weighted sum of
log-probabilities. Printed is `temp_size_in_bytes` of the compiled program, beside what arguments and results take in either.
"""

from __future__ import annotations

import argparse
import json

import jax
import jax.numpy as jnp

from aligner.logprobs import token_stats
from aligner.types import Head


def dense(hidden, weight, targets):
    """Log-probabilities by way of all logits at once, [B,S,V]; the leaner of the two usual ways (log-softmax keeps one array more)."""
    logits = jnp.matmul(hidden, weight, preferred_element_type=jnp.float32)
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)


def chunked(hidden, weight, targets):
    return token_stats(hidden, Head(weight), targets)["logp"]


def temporaries(logp, *, rows: int, tokens: int, width: int, vocabulary: int, dtype: str, head: bool = True) -> int:
    """Bytes of temporaries of value and gradients, by the compiler's own account."""
    shape = lambda size, dtype: jax.ShapeDtypeStruct(size, dtype)
    loss = lambda hidden, weight, targets, scale: jnp.sum(logp(hidden, weight, targets) * scale)
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1) if head else 0))
    arguments = (
        shape((rows, tokens // rows, width), dtype),
        shape((width, vocabulary), dtype),
        shape((rows, tokens // rows), jnp.int32),
        shape((rows, tokens // rows), jnp.float32),
    )
    return step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--json", help="file to write the figures to")
    options = parser.parse_args()
    sizes = dict(rows=options.rows, tokens=options.tokens, width=options.width, vocabulary=options.vocabulary)
    figures = {}
    print(f"{'':24} {'dense MiB':>10} {'chunked MiB':>12} {'ratio':>6}")
    for dtype in ("float32", "bfloat16"):
        for head in (True, False):
            both = [temporaries(logp, **sizes, dtype=dtype, head=head) / 2**20 for logp in (dense, chunked)]
            name = f"{dtype}, {'head trains' if head else 'frozen head'}"
            figures[name] = dict(zip(("dense", "chunked"), both))
            print(f"{name:24} {both[0]:10.0f} {both[1]:12.0f} {both[1] / both[0]:6.2f}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
