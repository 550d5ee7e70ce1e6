"""A tiny tokenizer, processor and model description, made in memory: enough of a checkpoint for the data side."""

import dataclasses
from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from aligner.types import Media
from configs import common

CORPUS = ["what is this picture of a cat and a dog in the house", "USER: ASSISTANT: yes no the answer is one two three"] * 4

CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# In the manner of llava-hf: list contents, images first, no EOS.
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def tokenizer(template=CHATML, bos=False, pad="<pad>"):
    """A byte-level BPE tokenizer with a few merges; `bos` makes it put <s> first, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token=pad)
    made.chat_template = template
    return made


@dataclasses.dataclass
class Model:
    """As much of a model as the data side reads."""

    family: str
    media: Any
    assets: Any


def text_model(template=CHATML, **options):
    """A model that takes text only."""
    return Model("llama", None, SimpleNamespace(tokenizer=tokenizer(template, **options), processor=None))


def image_model(template=CHATML, size=8, patch=4, **options):
    """A model with (size / patch)^2 features an image."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = tokenizer(None, **options)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    processor = LlavaProcessor(
        pictures, words, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=template
    )
    media = Media(words.convert_tokens_to_ids("<image>"), (size // patch) ** 2, size, size)
    return Model("llava", media, SimpleNamespace(tokenizer=words, processor=processor, folder="model"))


def source(path, **changes):
    """A `config.data.train` section."""
    made = common.data_source()
    made.update(dict(path=str(path)) | changes)
    return made


DATA = dict(max_length=4096, max_bad_fraction=1.0, shared_prompt=True, pad_to_multiple=8, workers=2, packing=False, packed_length=None,
            loss_on="assistant", shuffle=True)  # fmt: skip


def config(path, seed=0, **changes):
    """As much of a config as `load_dataset` reads; `changes` are keys of `config.data` or of `config.data.train`."""
    data = DATA | {key: changes.pop(key) for key in [*changes] if key in DATA}
    return ConfigDict(dict(data=data | dict(train=source(path, **changes)), seed=seed))
