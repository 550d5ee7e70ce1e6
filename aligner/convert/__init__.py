"""Hugging Face checkpoints <-> our parameter trees, byte for byte.

tables.py says which tensors a tree consists of, disk.py reads and writes them, assets.py carries the files beside them; hf.py puts the
three together to read a folder, export.py to write one.
"""

from aligner.convert.assets import Assets
from aligner.convert.disk import Checkpoint, fingerprint, open_checkpoint
from aligner.convert.export import save
from aligner.convert.hf import abstract_params, find_folder, load, load_params, model_from_folder, open_model

__all__ = ["Assets", "Checkpoint", "abstract_params", "find_folder", "fingerprint", "load", "load_params", "model_from_folder",
           "open_checkpoint", "open_model", "save"]  # fmt: skip
