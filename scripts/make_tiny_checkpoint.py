"""Make, from code alone, a small checkpoint in Hugging Face layout and a demo preference set of drawn pictures.

    python scripts/make_tiny_checkpoint.py --out runs/tiny/model --data-out runs/tiny/data
    python scripts/make_tiny_checkpoint.py --family llama --out runs/tiny/llama

No network and no PyTorch: weights are drawn with NumPy, the tokenizer is trained on the demo's own sentences. The same
arguments give the same files. `setup_llava_demo` is what the `:tiny` preset calls before it reads anything.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")  # their ids are their places here
PAD, IMAGE = SPECIAL_TOKENS.index("<pad>"), SPECIAL_TOKENS.index("<image>")
BOS, EOS = SPECIAL_TOKENS.index("<s>"), SPECIAL_TOKENS.index("</s>")

# Plain English, so that the tokenizer has merges beyond the demo; byte-level, so that it takes any text at all.
ENGLISH = """\
The quick brown fox jumps over the lazy dog, and then the dog sleeps in the sun.
What is in the picture? There are two people walking along the street with a small child.
How many apples are there? I can see three apples and one orange on the table.
Please answer the question in one sentence. Yes, it is. No, it is not. I do not know.
Which of these is the better answer, and why do you think that it is better than the other?
"""

# As LLaVA-1.5's own: pictures first, then the text, whichever way a message's content is written. The tokenizer adds <s>.
LLAVA_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] != 'system' -%}{{ message['role'] | upper + ': ' }}{%- endif -%}
{%- if message['content'] is string -%}{%- set text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] | selectattr('type', 'equalto', 'image') -%}{{ '<image>\\n' }}{%- endfor -%}
{%- set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') -%}
{%- endif -%}
{{ text }}{{ eos_token if message['role'] == 'assistant' else ' ' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""

# In the manner of Llama 2 and 3, the template writes <s> itself; the tokenizer would add it to bare text as well.
LLAMA_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['content'] is string -%}{%- set text = message['content'] -%}
{%- else -%}{%- set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') -%}
{%- endif -%}
{{ '[' + message['role'] + ']\\n' + text }}{{ eos_token if message['role'] == 'assistant' }}{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '[assistant]\\n' }}{%- endif -%}
"""


# ---- the demo preference set: one coloured shape on a plain ground, and a question about it

COLOURS = {"red": (215, 35, 35), "green": (30, 165, 60), "blue": (40, 70, 220), "yellow": (235, 205, 30)}
SHAPES = ("ring", "square", "cross")
COLUMNS = ("left", "right")
ROWS = ("top", "bottom")

# attribute asked about -> (question, {value: answer})
QUESTIONS = {
    "colour": ("What colour is the shape?", {colour: f"It is {colour}." for colour in COLOURS}),
    "shape": ("Which shape is it?", {shape: f"It is a {shape}." for shape in SHAPES}),
    "column": ("Is it on the left or on the right?", {column: f"It is on the {column}." for column in COLUMNS}),
    "row": ("Is it at the top or at the bottom?", {row: f"It is at the {row}." for row in ROWS}),
}
VALUES = {attribute: tuple(answers) for attribute, (_, answers) in QUESTIONS.items()}


def draw(attributes: dict[str, str], rng: np.random.Generator, size: int = 32):
    """One shape on a plain light ground; what the attributes leave open (place, size, shade) is drawn from `rng`.

    Args:
        attributes: a value for each of colour, shape, column, row.
        rng: where the free choices come from.
        size: width and height in pixels.

    Returns:
        A PIL image, RGB, [size, size].
    """
    from PIL import Image, ImageDraw

    ground = rng.integers(200, 256)
    shade = np.clip(np.array(COLOURS[attributes["colour"]]) + rng.integers(-20, 21, 3), 0, 255)
    radius = size * rng.uniform(0.19, 0.23)
    offset = size * rng.uniform(0.21, 0.29, 2)  # of the shape's middle from the nearest corner: it stays in its quarter, or nearly
    x = offset[0] if attributes["column"] == "left" else size - offset[0]
    y = offset[1] if attributes["row"] == "top" else size - offset[1]

    scale = 4  # drawn larger and shrunk, which smooths the edges
    image = Image.new("RGB", (size * scale, size * scale), (int(ground),) * 3)
    box = [scale * v for v in (x - radius, y - radius, x + radius, y + radius)]
    pen, fill = ImageDraw.Draw(image), tuple(int(v) for v in shade)
    if attributes["shape"] == "ring":
        pen.ellipse(box, outline=fill, width=round(scale * radius / 2))
    elif attributes["shape"] == "square":
        pen.rectangle(box, fill=fill)
    else:
        arm = scale * radius / 3
        pen.rectangle([box[0], scale * y - arm, box[2], scale * y + arm], fill=fill)
        pen.rectangle([scale * x - arm, box[1], scale * x + arm, box[3]], fill=fill)
    return image.resize((size, size), Image.Resampling.BOX)


def balanced_choices(n: int, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """(attribute, true value, false value) of `n` rows in random order: for each pair of answers, either is right equally often.

    Every row has a twin, the same question with the answers exchanged, so a model that does not see is right in exactly one of the two.
    """
    from aligner.types import UserError

    if n <= 0 or n % 2:
        raise UserError(f"a balanced split needs an even number of rows (each has a twin), but {n} were asked for; use {max(2, n + 1)}")
    pairs = {attribute: itertools.cycle(itertools.combinations(values, 2)) for attribute, values in VALUES.items()}
    kinds = itertools.cycle(VALUES)
    choices = []
    for _ in range(n // 2):
        attribute = next(kinds)
        a, b = next(pairs[attribute])
        choices += [(attribute, a, b), (attribute, b, a)]
    return [choices[i] for i in rng.permutation(n)]


def make_pictures(folder: str | Path, n_train: int = 1024, n_heldout: int = 192, seed: int = 0, size: int = 32) -> None:
    """Write train.jsonl and heldout.jsonl (keys image, question, chosen, rejected) and their pictures, no picture twice.

    Args:
        folder: must not exist yet; appears whole or not at all.
        n_train, n_heldout: rows of each split, even numbers.
        seed: everything random follows from it.
        size: width and height of the pictures in pixels.

    Raises:
        UserError: the folder is there already, or a split's size is odd.
    """
    rng = np.random.default_rng([seed, 1])
    seen = set()
    with new_folder(folder) as folder:
        for split, n in (("train", n_train), ("heldout", n_heldout)):
            (folder / "pictures" / split).mkdir(parents=True)
            lines = []
            for i, (attribute, true, false) in enumerate(balanced_choices(n, rng)):
                attributes = {name: str(rng.choice(values)) for name, values in VALUES.items()} | {attribute: true}
                while (picture := draw(attributes, rng, size)) and (digest := hashlib.sha256(picture.tobytes()).digest()) in seen:
                    pass
                seen.add(digest)
                name = f"pictures/{split}/{i:05d}.png"
                picture.save(folder / name)
                question, answers = QUESTIONS[attribute]
                lines.append(json.dumps(dict(image=name, question=question, chosen=answers[true], rejected=answers[false])))
            (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def blank_pictures(source: str | Path, folder: str | Path) -> None:
    """Copy a demo set with every picture replaced by the same grey one: what is left to learn then is chance."""
    from PIL import Image

    source = Path(source)
    with new_folder(folder) as folder:
        for path in sorted(source.rglob("*")):
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".png":
                Image.new("RGB", Image.open(path).size, (128, 128, 128)).save(target)
            elif path.is_file():
                shutil.copyfile(path, target)


# ---- the checkpoints


def make_tokenizer(vocab_size: int, texts: Iterable[str] = ()):
    """A byte-level BPE trained on the demo's sentences; it adds <s> in front and takes any text.

    Args:
        vocab_size: upper bound on its tokens, special ones included; at least 261 (bytes and special tokens).
        texts: more to train it on.

    Returns:
        A `transformers` fast tokenizer.

    Raises:
        UserError: a vocabulary too small for the bytes and the special tokens.
    """
    from aligner.types import UserError

    if vocab_size < (least := 256 + len(SPECIAL_TOKENS)):
        raise UserError(f"vocab_size {vocab_size} is too small for the 256 bytes and the special tokens; use at least {least}")

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Once with a space in front and once without, as the words stand in a conversation; the demo's words weigh most.
    words = [text for question, answers in QUESTIONS.values() for text in (question, *answers.values())]
    sentences = 20 * [text for word in words for text in (word, " " + word, "USER: \n" + word + " ASSISTANT: ")]
    tokenizer.train_from_iterator([*sentences, *ENGLISH.splitlines(), *texts], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )


def normal(rng: np.random.Generator, *shape: int, std: float) -> np.ndarray:
    return (std * rng.standard_normal(shape)).astype(np.float32)


def linear(rng: np.random.Generator, out: int, into: int, gain: float = 1.0) -> np.ndarray:
    """[out, into], keeps the variance of its input times gain squared."""
    return normal(rng, out, into, std=gain / into**0.5)


def llama_weights(rng: np.random.Generator, config, prefix: str = "") -> dict[str, np.ndarray]:
    """Random weights of a Llama or Qwen 2 by their names on disk; `config` is its `LlamaConfig` or `Qwen2Config`."""
    width, mlp, heads, kv = config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads
    head = width // heads
    residual = (2 * config.num_hidden_layers) ** -0.5  # so that the stream does not grow with depth
    weights = {"model.embed_tokens.weight": normal(rng, config.vocab_size, width, std=0.5)}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        weights |= {
            layer + "input_layernorm.weight": np.ones(width, np.float32),
            layer + "self_attn.q_proj.weight": linear(rng, heads * head, width),
            layer + "self_attn.k_proj.weight": linear(rng, kv * head, width),
            layer + "self_attn.v_proj.weight": linear(rng, kv * head, width),
            layer + "self_attn.o_proj.weight": linear(rng, width, heads * head, residual),
            layer + "post_attention_layernorm.weight": np.ones(width, np.float32),
            layer + "mlp.gate_proj.weight": linear(rng, mlp, width),
            layer + "mlp.up_proj.weight": linear(rng, mlp, width),
            layer + "mlp.down_proj.weight": linear(rng, width, mlp, residual),
        }
        if config.model_type == "qwen2":
            sizes = {"q_proj": heads * head, "k_proj": kv * head, "v_proj": kv * head}
            weights |= {f"{layer}self_attn.{name}.bias": np.zeros(size, np.float32) for name, size in sizes.items()}
    weights["model.norm.weight"] = np.ones(width, np.float32)
    if not config.tie_word_embeddings:
        weights["lm_head.weight"] = linear(rng, config.vocab_size, width, 0.5)
    return {prefix + name: value for name, value in weights.items()}


def clip_weights(rng: np.random.Generator, config, prefix: str) -> dict[str, np.ndarray]:
    """Random weights of a CLIP vision tower by their names on disk; `config` is its `CLIPVisionConfig`."""
    width, mlp, patch = config.hidden_size, config.intermediate_size, config.patch_size
    patches = (config.image_size // patch) ** 2
    residual = (2 * config.num_hidden_layers) ** -0.5
    zeros = lambda n: np.zeros(n, np.float32)
    norm = lambda name: {name + ".weight": np.ones(width, np.float32), name + ".bias": zeros(width)}
    dense = lambda name, out, into, gain=1.0: {name + ".weight": linear(rng, out, into, gain), name + ".bias": zeros(out)}
    weights = {
        "embeddings.class_embedding": normal(rng, width, std=1.0),
        "embeddings.patch_embedding.weight": linear(rng, width, 3 * patch * patch).reshape(width, 3, patch, patch),
        "embeddings.position_embedding.weight": normal(rng, patches + 1, width, std=1.0),
        **norm("pre_layrnorm"),
    }
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj"):
            weights |= dense(layer + f"self_attn.{name}", width, width)
        weights |= dense(layer + "self_attn.out_proj", width, width, residual)
        weights |= norm(layer + "layer_norm1") | norm(layer + "layer_norm2")
        weights |= dense(layer + "mlp.fc1", mlp, width) | dense(layer + "mlp.fc2", width, mlp, residual)
    weights |= norm("post_layernorm")
    return {prefix + name: value for name, value in weights.items()}


def llama_config(
    model_type: str = "llama", *, vocab_size: int, hidden_size: int, intermediate_size: int | None, layers: int, heads: int, kv_heads: int,
    tie: bool = False,
):  # fmt: skip
    """The Hugging Face config of these sizes, with the tokenizer's special tokens and float32 weights."""
    from transformers import AutoConfig

    from aligner.types import UserError

    if heads % kv_heads:
        raise UserError(f"{heads} heads cannot share {kv_heads} heads of keys; use a divisor of {heads}")
    return AutoConfig.for_model(
        model_type,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or 2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=tie,
        dtype="float32",
    )


def write_model(folder: Path, config, weights: dict[str, np.ndarray]) -> None:
    """config.json, generation_config.json and model.safetensors."""
    from safetensors.numpy import save_file
    from transformers import GenerationConfig

    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=32).save_pretrained(folder)
    save_file({name: np.ascontiguousarray(value) for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def make_llama(
    folder: str | Path,
    model_type: str = "llama",
    *,
    seed: int = 0,
    vocab_size: int = 512,
    hidden_size: int = 128,
    intermediate_size: int | None = None,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    tie_word_embeddings: bool = False,
    tokenizer=None,
) -> None:
    """Write a small random Llama or Qwen: config, generation config, weights, tokenizer, chat template.

    Args:
        folder: must not exist yet; appears whole or not at all.
        model_type: llama or qwen2.
        seed: the weights follow from it.
        vocab_size: rows of the embedding; the tokenizer has at most so many tokens.
        hidden_size, intermediate_size, layers, heads, kv_heads, tie_word_embeddings: of the decoder; intermediate None is 2 * hidden_size.
        tokenizer: another than the demo's, with its own chat template; its size is that of the vocabulary.

    Raises:
        UserError: the folder is there already.
    """
    with new_folder(folder) as folder:
        vocab_size = len(tokenizer) if tokenizer else vocab_size
        config = llama_config(model_type, vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=intermediate_size,
                              layers=layers, heads=heads, kv_heads=kv_heads, tie=tie_word_embeddings)  # fmt: skip
        config.architectures = [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[model_type]]
        write_model(folder, config, llama_weights(np.random.default_rng([seed, 0]), config))
        if tokenizer is None:
            tokenizer = make_tokenizer(vocab_size)
            tokenizer.chat_template = LLAMA_TEMPLATE
        tokenizer.save_pretrained(folder)


def make_llava(
    folder: str | Path,
    *,
    seed: int = 0,
    vocab_size: int = 512,
    hidden_size: int = 128,
    intermediate_size: int | None = None,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    image_size: int = 32,
    patch_size: int = 8,
    vision_hidden_size: int = 64,
    vision_intermediate_size: int | None = None,
    vision_layers: int = 3,
    vision_heads: int = 4,
    tokenizer=None,
    template: str = LLAVA_TEMPLATE,
) -> None:
    """Write a small random LLaVA-1.5: config, generation config, weights, tokenizer, processor, chat template.

    The tensors are named as in the public releases: `language_model.model.*`, `language_model.lm_head`, `vision_tower.vision_model.*`,
    `multi_modal_projector.*`. Its features are the tower's layer -2 without the class token, as LLaVA-1.5's are.

    Args:
        folder: must not exist yet; appears whole or not at all.
        seed: the weights follow from it.
        vocab_size, hidden_size, intermediate_size, layers, heads, kv_heads: of the decoder, as in `make_llama`.
        image_size, patch_size: pixels; an image has (image_size / patch_size) ** 2 features.
        vision_hidden_size, vision_intermediate_size, vision_layers, vision_heads: of the vision tower; None as above.
        tokenizer, template: others than the demo's; the tokenizer's size is that of the vocabulary.

    Raises:
        UserError: the folder is there already.
    """
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlavaConfig, LlavaProcessor

    with new_folder(folder) as folder:
        tokenizer = tokenizer or make_tokenizer(vocab_size)
        vocab_size = max(len(tokenizer), vocab_size if template == LLAVA_TEMPLATE else 0)
        text = llama_config(vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=intermediate_size, layers=layers,
                            heads=heads, kv_heads=kv_heads)  # fmt: skip
        vision = CLIPVisionConfig(
            hidden_size=vision_hidden_size,
            intermediate_size=vision_intermediate_size or 2 * vision_hidden_size,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_heads,
            image_size=image_size,
            patch_size=patch_size,
            projection_dim=vision_hidden_size,
        )
        config = LlavaConfig(
            text_config=text,
            vision_config=vision,
            image_token_index=IMAGE,
            image_seq_length=(image_size // patch_size) ** 2,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
            pad_token_id=PAD,
            dtype="float32",
            architectures=["LlavaForConditionalGeneration"],
        )
        rng = np.random.default_rng([seed, 0])
        projector = {
            "linear_1.weight": linear(rng, hidden_size, vision_hidden_size),
            "linear_1.bias": np.zeros(hidden_size, np.float32),
            "linear_2.weight": linear(rng, hidden_size, hidden_size),
            "linear_2.bias": np.zeros(hidden_size, np.float32),
        }
        weights = clip_weights(rng, vision, "vision_tower.vision_model.") | llama_weights(rng, text, "language_model.")
        write_model(folder, config, weights | {"multi_modal_projector." + name: value for name, value in projector.items()})
        processor = LlavaProcessor(
            image_processor=CLIPImageProcessorPil(
                size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
            ),
            tokenizer=tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,  # the class token, which "default" takes away again
            chat_template=template,
        )
        processor.save_pretrained(folder)


# ---- what the preset and the command line call


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well, so that a half-made one is never seen.

    Raises:
        UserError: the folder is there already and not empty.
    """
    from aligner.types import UserError

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already; name a new folder, or remove it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's own is for one user only
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():
                raise
            # Another process of the same run was quicker and, the seed being the same, made the same.
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def own(path: str | Path) -> bool:
    """Whether a path is one of those at which presets make what is missing, DIR/demo/NAME; any other was given by somebody, who is told
    that nothing is there."""
    return Path(path).parent.name == "demo"


def setup_llava_demo(config) -> None:
    """Make the checkpoint and the demo set that a config names, where they are not there yet, and say so in one line.

    Args:
        config: reads `model.path`, `data.train.path`, `data.eval.path` (DIR/demo/model, DIR/demo/data/train.jsonl and heldout.jsonl;
            other paths are left alone) and `seed`.
    """
    made = []
    if own(config.model.path) and not Path(config.model.path).exists():
        make_llava(config.model.path, seed=config.seed)
        made.append(f"a small LLaVA in {config.model.path}")
    for path in map(Path, filter(None, (config.data.train.path, config.data.eval.path))):
        if own(path.parent) and path.name in ("train.jsonl", "heldout.jsonl") and not path.exists():
            make_pictures(path.parent, seed=config.seed)
            made.append(f"the demo pictures in {path.parent}")
    if made:
        print(f"made {' and '.join(made)} (from code, seed {config.seed})", flush=True)


def setup_llama_demo(config, model_type: str = "llama") -> None:
    """The same in words alone: a small Llama, and the demo set of `scripts.text_demo` in the folder of `data.train.path`."""
    from scripts.text_demo import make_text

    made, folder = [], Path(config.data.train.path).parent
    if own(config.model.path) and not Path(config.model.path).exists():
        make_llama(config.model.path, model_type, seed=config.seed)
        made.append(f"a small {model_type} in {config.model.path}")
    if own(folder) and not folder.exists():
        make_text(folder, seed=config.seed)
        made.append(f"the demo texts in {folder}")
    if made:
        print(f"made {' and '.join(made)} (from code, seed {config.seed})", flush=True)


def setup_qwen_demo(config) -> None:
    """The same with a small Qwen 2."""
    setup_llama_demo(config, "qwen2")


def setup_teacher_demo(config) -> None:
    """The same with a teacher in `algorithm.teacher`, a Llama of other weights and another width."""
    setup_llama_demo(config)
    if own(config.algorithm.teacher) and not Path(config.algorithm.teacher).exists():
        make_llama(config.algorithm.teacher, seed=config.seed + 1, hidden_size=64)
        print(f"made another small llama in {config.algorithm.teacher} (from code, seed {config.seed + 1})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="new folder for the checkpoint")
    parser.add_argument("--family", choices=("llava", "llama"), default="llava")
    parser.add_argument("--data-out", help="new folder for the demo preference set; without it none is made")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-rows", type=int, default=1024, help="rows of train.jsonl (even; default 1024)")
    parser.add_argument("--heldout-rows", type=int, default=192, help="rows of heldout.jsonl (even; default 192)")
    sizes = parser.add_argument_group("sizes of the model; what is not given keeps its default in make_llava or make_llama")
    for name in ("vocab-size", "hidden-size", "intermediate-size", "layers", "heads", "kv-heads"):
        sizes.add_argument(f"--{name}", type=int)
    for name in ("image-size", "patch-size", "vision-hidden-size", "vision-intermediate-size", "vision-layers", "vision-heads"):
        sizes.add_argument(f"--{name}", type=int, help="llava only")
    args = vars(parser.parse_args())
    out, family, data_out, seed = (args.pop(name) for name in ("out", "family", "data_out", "seed"))
    n_train, n_heldout = args.pop("train_rows"), args.pop("heldout_rows")
    given = {name: value for name, value in args.items() if value is not None}
    if data_out and (odd := [n for n in (n_train, n_heldout) if n < 2 or n % 2]):
        parser.error(f"{odd[0]} rows: the number must be even, because each row has a twin, and at least 2")
    if low := [name for name, value in given.items() if value < 1]:
        parser.error(f"--{low[0].replace('_', '-')} is {given[low[0]]}; it must be at least 1")
    if family == "llama" and (wrong := [name for name in given if name.startswith(("image", "patch", "vision"))]):
        parser.error(f"--{wrong[0].replace('_', '-')} is for --family llava only")

    from huggingface_hub.errors import StrictDataclassError

    from aligner.types import UserError

    try:
        {"llava": make_llava, "llama": make_llama}[family](out, seed=seed, **given)
        print(f"made a small {family} in {out}")
        if data_out:
            make_pictures(data_out, n_train, n_heldout, seed, size=given.get("image_size", 32))
            print(f"made {n_train} training and {n_heldout} held-out rows in {data_out}")
    except (UserError, StrictDataclassError) as error:  # the latter from transformers: sizes that do not go together
        parser.error(str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: "))


if __name__ == "__main__":
    main()
