"""Import torch for a golden test: on Python 3.11 it must be there, on newer versions (no CPU build) the module is skipped."""

import sys

import pytest

if sys.version_info >= (3, 12):
    pytest.skip("golden tests run on Python 3.11, where the CPU build of torch is", allow_module_level=True)

import torch

__all__ = ["torch"]
