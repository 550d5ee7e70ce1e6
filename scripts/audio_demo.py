"""A demo set of sounds, and a small Qwen2-Audio that hears them: how many tones are there, and are they high or low?

Rows are pairs, the right answer and a wrong one, with the sound in `audios`; fine-tuning reads the right one.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np

from scripts.make_tiny_checkpoint import (
    BOS,
    EOS,
    LLAVA_TEMPLATE,
    PAD,
    linear,
    llama_config,
    llama_weights,
    make_tokenizer,
    new_folder,
    own,
    write_model,
)

RATE = 16_000
AUDIO = "<|AUDIO|>"
QUESTIONS = {"number": "How many tones are there?", "pitch": "Are the tones high or low?"}
VALUES = {"number": ("one", "two", "three"), "pitch": ("high", "low")}
TEMPLATE = LLAVA_TEMPLATE.replace("<image>", AUDIO).replace("'image'", "'audio'")


def play(number: str, pitch: str, rng: np.random.Generator) -> np.ndarray:
    """Up to 0.9 seconds: so many tones, each a little otherwise, with noise."""
    made = [np.zeros(rng.integers(200, 1600))]
    for _ in range(1 + VALUES["number"].index(number)):
        hertz, seconds = rng.uniform(*{"high": (1500, 3000), "low": (150, 400)}[pitch]), rng.uniform(0.1, 0.16)
        times = np.arange(int(seconds * RATE)) / RATE
        made += [rng.uniform(0.3, 0.9) * np.sin(2 * np.pi * hertz * times), np.zeros(int(0.08 * RATE))]
    sound = np.concatenate(made)
    return (sound + rng.normal(scale=0.003, size=len(sound))).astype(np.float32)


def make_sounds(folder: str | Path, n_train: int = 512, n_heldout: int = 96, seed: int = 0) -> None:
    """Write train.jsonl and heldout.jsonl (keys audios, prompt, chosen, rejected) and their sounds.

    Args:
        folder: must not exist yet; appears whole or not at all.
        n_train, n_heldout: rows of each split.
        seed: everything random follows from it.

    Raises:
        UserError: the folder is there already.
    """
    import soundfile

    rng = np.random.default_rng([seed, 5])
    with new_folder(folder) as folder:
        for split, count in (("train", n_train), ("heldout", n_heldout)):
            (folder / "sounds" / split).mkdir(parents=True)
            asked, lines = itertools.cycle(QUESTIONS), []
            for i in range(count):
                what, heard = next(asked), {name: str(rng.choice(values)) for name, values in VALUES.items()}
                name = f"sounds/{split}/{i:05d}.wav"
                soundfile.write(folder / name, play(**heard, rng=rng), RATE)
                wrong = str(rng.choice([value for value in VALUES[what] if value != heard[what]]))
                prompt = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": QUESTIONS[what]}]}]
                answers = {key: [{"role": "assistant", "content": word}] for key, word in (("chosen", heard[what]), ("rejected", wrong))}
                lines.append(json.dumps({"audios": [name], "prompt": prompt, **answers}))
            (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_qwen2_audio(
    folder: str | Path,
    *,
    seed: int = 0,
    seconds: int = 1,
    vocab_size: int = 512,
    hidden_size: int = 128,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    audio_hidden_size: int = 64,
    audio_layers: int = 2,
    audio_heads: int = 4,
    bands: int = 16,
) -> None:
    """Write a small random Qwen2-Audio: config, generation config, weights, tokenizer, processor, chat template.

    Args:
        folder: must not exist yet; appears whole or not at all.
        seed: the weights follow from it.
        seconds: the longest sound that it hears.
        vocab_size, hidden_size, layers, heads, kv_heads: of the decoder, as in `make_llama`.
        audio_hidden_size, audio_layers, audio_heads: of the encoder.
        bands: of the spectrogram.

    Raises:
        UserError: the folder is there already.
    """
    from transformers import Qwen2AudioConfig, Qwen2AudioEncoderConfig, Qwen2AudioProcessor, WhisperFeatureExtractor

    with new_folder(folder) as folder:
        tokenizer = make_tokenizer(vocab_size, [text for asked in (QUESTIONS.values(), *VALUES.values()) for text in asked])
        tokenizer.add_tokens([AUDIO], special_tokens=True)
        text = llama_config("qwen2", vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=None, layers=layers, heads=heads,
                            kv_heads=kv_heads)  # fmt: skip
        extractor = WhisperFeatureExtractor(feature_size=bands, chunk_length=seconds)
        encoder = Qwen2AudioEncoderConfig(
            num_mel_bins=bands, d_model=audio_hidden_size, encoder_layers=audio_layers, encoder_attention_heads=audio_heads,
            encoder_ffn_dim=2 * audio_hidden_size, max_source_positions=extractor.nb_max_frames // 2,
        )  # fmt: skip
        config = Qwen2AudioConfig(
            text_config=text, audio_config=encoder, audio_token_index=tokenizer.convert_tokens_to_ids(AUDIO), pad_token_id=PAD,
            bos_token_id=BOS, eos_token_id=EOS, dtype="float32", architectures=["Qwen2AudioForConditionalGeneration"],
        )  # fmt: skip
        rng = np.random.default_rng([seed, 0])
        weights = whisper_weights(rng, encoder, "audio_tower.") | llama_weights(rng, text, "language_model.")
        weights["multi_modal_projector.linear.weight"] = linear(rng, hidden_size, audio_hidden_size)
        weights["multi_modal_projector.linear.bias"] = np.zeros(hidden_size, np.float32)
        write_model(folder, config, weights)
        Qwen2AudioProcessor(extractor, tokenizer, TEMPLATE).save_pretrained(folder)


def whisper_weights(rng: np.random.Generator, config, prefix: str) -> dict[str, np.ndarray]:
    """Random weights of Whisper's encoder by their names on disk, with its sinusoids; `config` is its Hugging Face config."""
    width, mlp, bands = config.d_model, config.encoder_ffn_dim, config.num_mel_bins
    residual = (2 * config.encoder_layers) ** -0.5
    zeros = lambda n: np.zeros(n, np.float32)
    norm = lambda name: {name + ".weight": np.ones(width, np.float32), name + ".bias": zeros(width)}
    dense = lambda name, out, into, gain=1.0: {name + ".weight": linear(rng, out, into, gain), name + ".bias": zeros(out)}
    rates = np.exp(-np.log(10_000) * np.arange(width // 2) / (width // 2 - 1))
    angles = np.arange(config.max_source_positions)[:, None] * rates
    weights = {
        "conv1.weight": linear(rng, width, 3 * bands).reshape(width, bands, 3),
        "conv1.bias": zeros(width),
        "conv2.weight": linear(rng, width, 3 * width).reshape(width, width, 3),
        "conv2.bias": zeros(width),
        "embed_positions.weight": np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32),
        **norm("layer_norm"),
    }
    for i in range(config.encoder_layers):
        layer = f"layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj"):
            weights |= dense(layer + f"self_attn.{name}", width, width)
        del weights[layer + "self_attn.k_proj.bias"]
        weights |= dense(layer + "self_attn.out_proj", width, width, residual)
        weights |= norm(layer + "self_attn_layer_norm") | norm(layer + "final_layer_norm")
        weights |= dense(layer + "fc1", mlp, width) | dense(layer + "fc2", width, mlp, residual)
    return {prefix + name: value for name, value in weights.items()}


def setup_qwen2_audio_demo(config) -> None:
    """Make the model and the sounds that a config names, where they are not there yet."""
    model, data = Path(config.model.path), Path(config.data.train.path).parent
    if own(model) and not model.exists():
        make_qwen2_audio(model, seed=config.seed)
        print(f"made a small Qwen2-Audio in {model} (from code, seed {config.seed})", flush=True)
    if own(data) and not data.exists():
        make_sounds(data, seed=config.seed)
        print(f"made the demo sounds in {data} (from code, seed {config.seed})", flush=True)
