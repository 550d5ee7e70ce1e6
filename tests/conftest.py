"""Eight simulated devices for the whole suite, a compile cache, no Hub, and the small models that several rooms' tests use."""

import gc
import os
import signal
from pathlib import Path

# Before the first import of jax by anything; a test's subprocess inherits them.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("NPROC", "32")  # threads of XLA: see aligner.main.start_jax
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from tests.models import tiny

# A script's background jobs ignore Ctrl-C, and what they start does as well; programs of tests are to heed it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    """Every day XLA compiles all programs in a hurry, which is most of the time of the suite; `-m slow` as users' programs are compiled.

    What the caller sets in XLA_FLAGS comes later and wins: `--xla_backend_optimization_level=3 --xla_llvm_disable_expensive_passes=false`.
    """
    if "not slow" in config.option.markexpr:
        hurry = " ".join(f"--{name}={str(value).lower()}" for name, value in tiny.QUICK.items())
        os.environ["XLA_FLAGS"] = f"{hurry} {os.environ['XLA_FLAGS']}"


def pytest_collection_finish(session):
    """What is imported by now stays: the garbage collector need not go through PyTorch and transformers again and again."""
    gc.freeze()


@pytest.fixture(scope="session", params=["llama", "llava"])
def family(request) -> tiny.Family:
    """A tiny model with perturbed parameters and pairs to train it on: once text, once with images."""
    return tiny.family(request.param)


@pytest.fixture(scope="session")
def llama() -> tiny.Family:
    return tiny.family("llama")


@pytest.fixture(scope="session")
def llava() -> tiny.Family:
    return tiny.family("llava")
