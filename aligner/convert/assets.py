"""The files beside the weights: config, tokenizer, processor, chat template. They travel unchanged."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from aligner.types import UserError

# transformers advises at its import to install PyTorch, which is not needed here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# All that `from_pretrained` of a model, tokenizer or processor may look for beside weights.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template*",
    "additional_chat_templates/*",
)

# What a family's processor asks of its image processor at every call, whatever the file of that one says; InternVL's say "no tiles".
ASKED = {"internvl": {"crop_to_patches": True}, "gemma3": {"do_pan_and_scan": False}, "llava_next": {"do_pad": True}}


def leave_pytorch_out(settings: str) -> None:
    """Have transformers take PyTorch for not installed: to import it takes seconds of every start, and nothing here computes with it.

    For programs, before anything reads a checkpoint: in this process transformers has no PyTorch models from then on, while
    `import torch` works as before. Nothing happens where somebody may want those: where either is imported already, or where the
    program's settings, as one text, name a function ("package.module:function", a reward or a formatter).
    """
    if sys.modules.keys() & {"torch", "transformers"} or re.search(r"\b[\w.]+:[A-Za-z_]", settings):
        return
    sys.modules["torch"] = None  # which reads as "not installed"
    try:
        from transformers.utils import is_torch_available

        is_torch_available()  # remembers its answer
    finally:
        del sys.modules["torch"]


class Processor(NamedTuple):
    """What is used of a Hugging Face processor."""

    image_processor: Any
    image_token: str
    chat_template: str | None
    video_token: str = "<video>"


@dataclasses.dataclass(frozen=True)
class Assets:
    """A folder's companion files.

    Attributes:
        folder: where they are.
        dtypes: Hugging Face name -> dtype of the tensors whose dtype on disk is not the model's `source_dtype`.
        config_changes: what config.json shall say otherwise than in the folder, where a model was given another head.
        chat_template: Jinja text instead of the folder's; it travels with the files.
    """

    folder: Path
    dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config_changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    chat_template: str | None = None

    @property
    def files(self) -> list[Path]:
        """Paths of the companion files relative to the folder, sorted."""
        found = {path for pattern in COMPANIONS for path in self.folder.glob(pattern) if path.is_file()}
        return sorted(path.relative_to(self.folder) for path in found)

    @functools.cached_property
    def config_dict(self) -> dict[str, Any]:
        """config.json with its changes. Raises UserError when it is missing or no JSON object."""
        path = self.folder / "config.json"
        try:
            config = json.loads(path.read_text())
        except FileNotFoundError:
            if (self.folder / "adapter_config.json").exists():
                raise UserError(f"{self.folder} is a PEFT adapter; give its base here, and the folder as config.lora.adapter.") from None
            raise UserError(f"{self.folder} has no config.json, so it is no Hugging Face checkpoint folder.") from None
        except ValueError as error:
            raise UserError(f"{path} is no valid JSON ({error}); fetch it again.") from None
        if not isinstance(config, dict):
            raise UserError(f"{path} holds a {type(config).__name__} where a JSON object is needed.")
        if {"algorithm", "checkpoint"} <= config.keys():  # a run's config
            export, command = self.folder / "export", f"python -m aligner.convert to-hf --workdir {self.folder} --out DIR"
            there = f"give {export}" if export.is_dir() else f"write its model with {command}, and give that"
            raise UserError(f"{self.folder} is the workdir of a run; {there}.")
        return {**config, **self.config_changes}

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer, read on first use."""
        from transformers import AutoTokenizer

        return self._pretrained(AutoTokenizer.from_pretrained, "tokenizer")

    @functools.cached_property
    def processor(self) -> Any:
        """The Hugging Face processor, read on first use; None for text models.

        Several families' processors want torchvision because they also take videos; of those what images need is put together here.
        """
        if not any((self.folder / name).exists() for name in ("preprocessor_config.json", "processor_config.json")):
            return None
        made = self._processor()
        for name, value in ASKED.get(self.config_dict.get("model_type"), {}).items():
            setattr(made.image_processor, name, value)
        return made

    def _processor(self) -> Any:
        from transformers import AutoImageProcessor, AutoProcessor

        by_pillow = functools.partial(AutoImageProcessor.from_pretrained, backend="pil")
        try:
            made = self._pretrained(AutoProcessor.from_pretrained, "processor")
            if importlib.util.find_spec("torchvision") and hasattr(made, "image_processor"):  # whose pixels differ a little from Pillow's
                made.image_processor = self._pretrained(by_pillow, "image processor")
            return made
        except UserError as error:
            if "orchvision" not in str(error.__cause__) and not isinstance(error.__cause__, RecursionError):
                raise
        images = self._pretrained(by_pillow, "image processor")
        return Processor(images, self._token("image"), self.chat_template or self._template(), self._token("video"))

    @functools.cached_property
    def video_settings(self) -> dict[str, Any]:
        """What the video processor's files say (`size`, `image_mean`, ..); the image processor's where they are silent."""
        nested, own = self.folder / "processor_config.json", self.folder / "video_preprocessor_config.json"
        found = json.loads(nested.read_text()).get("video_processor") if nested.is_file() else None
        if found is None and own.is_file():
            found = json.loads(own.read_text())
        return {**self.processor.image_processor.to_dict(), **(found or {})}

    def _token(self, kind: str) -> str:
        """The token of a kind of media by its id in the config."""
        ids = [self.config_dict[name] for name in (f"{kind}_token_id", f"{kind}_token_index") if name in self.config_dict]
        return self.tokenizer.convert_ids_to_tokens(ids[0]) if ids else f"<{kind}>"

    def _template(self) -> str | None:
        """The chat template: its own file, the processor's old one, or the tokenizer's."""
        own, old = self.folder / "chat_template.jinja", self.folder / "chat_template.json"
        if own.is_file():
            return own.read_text()
        return json.loads(old.read_text())["chat_template"] if old.is_file() else self.tokenizer.chat_template

    def copy_to(self, folder: str | Path) -> None:
        """Copy the companion files, byte for byte; only a changed config or template is written anew."""
        for file in self.files:
            target = Path(folder) / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / file, target)
        if self.chat_template is not None:
            for old in Path(folder).glob("chat_template*"):
                old.unlink()
            (Path(folder) / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        if self.config_changes:
            (Path(folder) / "config.json").write_text(json.dumps(self.config_dict, indent=2) + "\n")

    def _pretrained(self, load: Callable[[Path], Any], what: str) -> Any:
        try:
            made = load(self.folder)
        except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"{self.folder} has no {what} that transformers can load ({reason}).") from error
        if self.chat_template is not None:
            made.chat_template = self.chat_template
        return made
