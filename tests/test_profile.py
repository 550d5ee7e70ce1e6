"""`--config.profile=steps`: a trace that Perfetto opens, and names in it that read like the code."""

import gzip
import json
import re

import jax
import jax.numpy as jnp
import pytest

from aligner.console import tracing
from tests.invariance.step import build, keep_gradient, one_device, put
from tests.models import tiny
from tests.resume import runs


def events(directory):
    """What Perfetto shows of the one trace in a workdir."""
    [path] = directory.glob("profile/plugins/profile/*/perfetto_trace.json.gz")
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def test_steps_are_traced_after_two_warm_ones(tmp_path):
    work = jax.jit(lambda x: jnp.tanh(x @ x))
    x = work(jnp.ones((64, 64)))
    with tracing(2, tmp_path) as trace:
        for step in range(6):
            trace(step)
            with jax.profiler.TraceAnnotation(f"step {step}"):
                jax.block_until_ready(work(x))
    found = {event.get("name") for event in events(tmp_path)}
    assert {f"step {step}" for step in range(6)} & found == {"step 2", "step 3"}


def test_a_short_run_ends_its_trace(tmp_path, capsys):
    with tracing(10, tmp_path) as trace:
        for step in range(3):
            trace(step)
    assert events(tmp_path) is not None
    with pytest.raises(KeyboardInterrupt), tracing(10, tmp_path / "stopped") as trace:
        for step in range(3):
            trace(step)
        raise KeyboardInterrupt
    assert events(tmp_path / "stopped") is not None
    with tracing(10, tmp_path / "none") as trace:
        trace(0)
    assert "no profile: it begins with the third step after a start, and there were 1" in capsys.readouterr().err
    with tracing(0, tmp_path / "none") as trace:
        for step in range(5):
            trace(step)
    assert not (tmp_path / "none").exists()


def test_names_read_like_the_code(llava):
    """Every large piece of the step is found by the name of its module or function, forward and backward."""
    mesh = one_device()
    with jax.set_mesh(mesh):
        step, state, fixed = build(llava, tiny.config(), keep_gradient(), mesh)
        text = step.lower(state, fixed, put(tiny.make_batch(llava), mesh)).as_text(debug_info=True)
    for names in (("vision_tower", "encoder"), ("layers", "self_attn", "attention"), ("layers", "mlp", "gate_proj"), ("token_stats",)):
        assert re.search(r"loc\(\"[^\"]*" + r"[^\"]*".join(names), text), names
    # the backward pass of the layers themselves is a function of its own, which gets its names when it is compiled
    for name in ("embed_tokens", "scanned", "norm", "Projector"):
        assert re.search(rf"transpose\([^\"]*{name}", text), name


@pytest.mark.slow
def test_a_run_leaves_a_trace(tmp_path):
    runs.complete(tmp_path / "run", {"train.steps": 6, "profile": 2, "train.eval_every": 0})
    assert len(events(tmp_path / "run")) > 100
