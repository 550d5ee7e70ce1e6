"""aligner: align models of any modality with human preferences, in JAX.

The public face beside the command line: `load(path)` -> (model, params), `model.logits(params, inputs)`, `save(model, params, out)`.
"""

__version__ = "0.1.0"

__all__ = ["load", "save"]


def load(path, dtype="float32", mesh=None):
    """Read a Hugging Face checkpoint (local folder or Hub id). See `aligner.convert.load`."""
    from aligner.convert import load  # imported late: `import aligner` stays quick

    return load(path, dtype=dtype, mesh=mesh)


def save(model, params, out_dir, dtype=None):
    """Write a Hugging Face checkpoint folder. See `aligner.convert.save`."""
    from aligner.convert import save

    return save(model, params, out_dir, dtype=dtype)
