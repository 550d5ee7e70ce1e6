"""Convert checkpoints from the command line: `python -m aligner.convert {to-hf,from-hf,verify,add-tokens,build} --help`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from aligner.commandline import arguments, ended
from aligner.convert.assets import leave_pytorch_out
from aligner.types import UserError

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    about = "Convert between Hugging Face checkpoint folders and aligner's own checkpoints."
    top = argparse.ArgumentParser("python -m aligner.convert", description=about)
    commands = top.add_subparsers(dest="command", required=True)

    to_hf = commands.add_parser("to-hf", help="write a run's checkpoint as a Hugging Face folder, adapters merged")
    to_hf.add_argument("--workdir", required=True, help="working directory of the run, such as runs/quickstart")
    to_hf.add_argument("--out", required=True, help="folder to write: new, empty, or a former export, which is replaced")
    to_hf.add_argument("--step", type=int, help="step of the checkpoint; the newest when left out")
    to_hf.add_argument("--dtype", choices=_DTYPES, help="dtype of the tensors; that of the model the run started from when left out")
    to_hf.add_argument("--adapter", action="store_true", help="write the adapter alone, as PEFT reads it, in float32 unless --dtype says")
    to_hf.add_argument("--max-shard-size", default="5GB", help="most bytes of a file, such as 500MB (default: %(default)s)")
    to_hf.set_defaults(run=run_to_hf)

    from_hf = commands.add_parser("from-hf", help="write a Hugging Face checkpoint as an Orbax checkpoint of our parameter tree")
    from_hf.add_argument("--model", required=True, help="local folder or Hub id")
    from_hf.add_argument("--out", required=True, help="folder to write; its assets/ receives config, tokenizer and processor")
    from_hf.add_argument("--dtype", choices=_DTYPES, help="dtype of the parameters; that on disk when left out")
    from_hf.add_argument("--revision", help="Hub revision")
    from_hf.set_defaults(run=run_from_hf)

    verify = commands.add_parser("verify", help="read a checkpoint, write it again, compare every tensor byte for byte")
    verify.add_argument("--model", required=True, help="local folder or Hub id")
    verify.add_argument("--dry-run", action="store_true", help="check names, shapes and dtypes by the files' headers alone")
    verify.add_argument("--scratch", help="where the copy is written meanwhile (default: the system's temporary folder)")
    verify.set_defaults(run=run_verify)

    add = commands.add_parser("add-tokens", help="add tokens to a checkpoint's vocabulary; their rows are the mean of the old ones")
    add.add_argument("--model", required=True, help="local folder or Hub id")
    add.add_argument("--tokens", required=True, nargs="+", help="tokens to add, such as '<tool>' '</tool>'")
    add.add_argument("--out", required=True, help="folder to write")
    add.add_argument("--pad-to-multiple", type=int, default=1, help="round the number of rows up (default: %(default)s)")
    add.set_defaults(run=run_add_tokens)

    build = commands.add_parser("build", help="put a vision-language model together from a decoder and a vision tower")
    build.add_argument("--text", required=True, help="folder or Hub id of the decoder")
    build.add_argument("--vision", required=True, help="folder or Hub id of the tower: CLIP, SigLIP or DINOv2")
    build.add_argument("--out", required=True, help="folder to write")
    build.add_argument("--projector", default="mlp", choices=("linear", "mlp", "transformer", "perceiver"), help="(default: %(default)s)")
    build.add_argument("--mmca", action="store_true", help="text reads text and images by two softmaxes")
    build.add_argument("--latents", type=int, default=64, help="features of an image with the perceiver (default: %(default)s)")
    build.add_argument("--layer", type=int, default=-2, help="hidden state of the tower that is used (default: %(default)s)")
    build.add_argument("--image-token", default="<image>", help="(default: %(default)s)")
    build.add_argument("--dtype", choices=_DTYPES, help="dtype of the tensors; the decoder's when left out")
    build.set_defaults(run=run_build)
    return top


def run_to_hf(args: argparse.Namespace) -> int:
    from aligner.convert.export import save
    from aligner.workdir import read_config, restore_params, restore_trainable

    if args.adapter:
        from aligner.convert import peft

        model, adapters, trainable, step = restore_trainable(args.workdir, args.step)
        if adapters is None:
            raise UserError(f"the run in {args.workdir} has no adapters (its config.lora.rank is 0); leave --adapter out.")
        base = read_config(args.workdir)["model"]["path"]
        peft.write(args.out, model, adapters, trainable, base, args.dtype or "float32")
        print(f"adapter of step {step} of {args.workdir} written to {args.out} in {args.dtype or 'float32'}")
        return 0
    model, params, step = restore_params(args.workdir, args.step)
    save(model, params, args.out, dtype=args.dtype, max_shard_size=args.max_shard_size)
    print(f"step {step} of {args.workdir} written to {args.out} in {args.dtype or model.source_dtype}")
    return 0


def run_from_hf(args: argparse.Namespace) -> int:
    from aligner.checkpoint import save_params
    from aligner.convert.hf import load_params, open_model

    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; choose another folder or remove it.")
    model, checkpoint = open_model(args.model, args.revision)
    if (args.dtype or model.source_dtype) == "float64":
        _enable_x64()
    params = load_params(model, checkpoint, args.dtype)
    save_params(out, params)
    model.assets.copy_to(out / "assets")
    print(f"{args.model} written to {out} in {args.dtype or model.source_dtype}")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    from aligner.convert.verify import verify

    _enable_x64()  # so that a float64 checkpoint survives too; arrays keep the dtype that they are made with
    report = verify(args.model, args.dry_run, args.scratch)
    print(report)
    if report.different:
        print(f"DIFFERENT after reading and writing: {len(report.different)}", *report.different, sep="\n  ")
        return 1
    if args.dry_run:
        print("headers fit the config: names, shapes and dtypes are right; no tensor was read")
    else:
        print(f"written again: all tensors are byte-identical, and so are {report.companions} companion files")
    return 0


def run_add_tokens(args: argparse.Namespace) -> int:
    from aligner.convert.vocabulary import add_tokens

    add_tokens(args.model, args.tokens, args.out, args.pad_to_multiple)
    print(f"{args.model} with {' '.join(args.tokens)} written to {args.out}")
    return 0


def run_build(args: argparse.Namespace) -> int:
    from aligner.convert.build import build

    kind = build(args.text, args.vision, args.out, projector=args.projector, mmca=args.mmca, latents=args.latents, layer=args.layer,
                 image_token=args.image_token, dtype=args.dtype)  # fmt: skip
    print(f"{args.text} and {args.vision} written to {args.out} as {kind}; its projector is new")
    return 0


def check_folder(out: str) -> None:
    """Whether a folder can be made there; told before the work whose result it is to hold."""
    there = next(path for path in (Path(out).absolute(), *Path(out).absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"--out {out} cannot be made: {there} is a file.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--out {out} cannot be made: you may not write in {there}.")


def _enable_x64() -> None:
    import jax

    jax.config.update("jax_enable_x64", True)


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 verify found a difference, 2 bad input, 130 Ctrl-C."""
    args = arguments(parser(), argv)

    def run() -> int:
        if getattr(args, "out", None):
            check_folder(args.out)
        return args.run(args)

    return ended(run)


if __name__ == "__main__":
    leave_pytorch_out(" ".join(sys.argv))
    sys.exit(main())
