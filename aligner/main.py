"""Train a model as a config file says.

    python -m aligner.main --config configs/dpo_llava.py:tiny --workdir runs/quickstart
    python -m aligner.main --config configs/dpo_llava.py --workdir runs/dpo \\
        --config.model.path=DIR --config.data.train.path=rows.jsonl --config.data.train.image_folder=DIR

Every setting of the config can be overridden, --config.section.key=value; configs/common.py explains each. The same command again
goes on where the run stopped.
"""

import gc
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from aligner.allocator import restart_with_huge_pages
from aligner.stopping import Stopped, end_quietly, nothing_to_save

if __name__ == "__main__":  # first of all: what is imported below takes its time
    end_quietly()
    restart_with_huge_pages()
    gc.set_threshold(50_000, 20, 20)  # imports and traces make millions of objects that stay: nothing to look for every 700

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from aligner.commandline import defaults, ended, parse
from aligner.processes import EXAMPLE, failing_together, world
from aligner.types import SaveError, UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with :ARGUMENT if it takes one.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps all that it makes.")


def start_jax() -> None:
    """Compile cache on, and all processes joined where a launcher started several."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        # Each simulated device holds a thread for every collective it waits in, and XLA has no more threads than cores or devices: where
        # two collectives of a step do not depend on each other, all may wait for one that finds no thread, and the run dies.
        os.environ.setdefault("NPROC", "32")
    import jax

    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "aligner" / "jax"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    arguments = world(os.environ)
    if arguments is not None:
        try:
            jax.distributed.initialize(**arguments)
        except ValueError as error:
            raise UserError(f"the processes of this run cannot find each other ({error}); {EXAMPLE}") from None


def main(argv: list[str]) -> int:
    if CONFIG.value is None or WORKDIR.value is None:
        missing = "--config" if CONFIG.value is None else "--workdir"
        example = "python -m aligner.main --config configs/dpo_llava.py:tiny --workdir runs/quickstart"
        raise UserError(f"{missing} is missing; for example: {example}")
    with nothing_to_save(CONFIG.value.checkpoint.requeue_code):
        start_jax()
        from aligner import remote

        with failing_together(), remote.local(WORKDIR.value) as folder:
            train(CONFIG.value, folder)
    return 0


def train(config: ConfigDict, directory: str) -> None:
    """Run as the config says, in a folder of this machine."""
    from aligner import algorithms, workdir  # after the flags, so that a typo is told at once
    from aligner.convert.assets import leave_pytorch_out

    workdir.bring_up_to_date(directory, defaults(sys.argv))
    leave_pytorch_out(config.to_json_best_effort())
    if config.algorithm.name in algorithms.ONLINE:
        from aligner.online import run
    else:
        from aligner.run import run
    with workdir.alone(directory):
        run(config, directory)


def cli(program: Callable[[list[str]], int] = main) -> None:
    """Run a program that trains; whatever ends it before its time is told in a sentence, and by the exit status."""

    def run() -> None:
        try:
            app.run(program, flags_parser=parse)
        except Stopped as stopped:
            print(f"stopped; the same command goes on from here: {WORKDIR.value}", file=sys.stderr)
            sys.exit(130 if stopped.args[0] == signal.SIGINT else CONFIG.value.checkpoint.requeue_code)
        except SaveError as error:
            import jax

            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            jax.distributed.shutdown()  # once the other processes have heard of it
            os._exit(2)

    # Ctrl-C before there is a state to save, or the second one
    code = ended(run, stopped="stopped at once; the same command goes on from the newest checkpoint")
    if code == 128 + signal.SIGINT:
        os._exit(code)  # the threads of a save that was broken off would show tracebacks while the interpreter ends
    sys.exit(code)


if __name__ == "__main__":
    cli()
