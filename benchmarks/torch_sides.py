"""The other sides of the DPO comparison: TRL's own training loop, and a DPO step written by hand in plain torch."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

LEARNING_RATE, BETA, MAX_GRAD_NORM = 1e-6, 0.1, 1.0


def make_checkpoint(
    folder: Path, *, hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int, rope_theta: float = 1e4
) -> None:
    """Write a random Llama in Hugging Face layout, with a tokenizer whose token `i` is the word `w{i}`."""
    import torch
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = special + [f"w{i}" for i in range(len(special), vocabulary)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=4096,
                         rope_parameters={"rope_type": "default", "rope_theta": rope_theta}, pad_token_id=0, bos_token_id=1,
                         eos_token_id=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def step_clock(after_step: Callable[[float, float], None], wait: Callable[[], None] = lambda: None) -> Any:
    """A callback for a trainer of TRL.

    Args:
        after_step: called with the seconds and CPU seconds of each step; others may take their turn in it.
        wait: returns when the device has done what it was asked for.
    """
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            wait()
            self.start = time.perf_counter(), time.process_time()

        def on_step_end(self, *args, **kwargs):
            wait()
            after_step(time.perf_counter() - self.start[0], time.process_time() - self.start[1])

    return Clock()


def run_trl(folder: Path, pairs: list[dict], dtype: str, steps: int, after_step: Callable[[float, float], None]) -> None:
    """Train with TRL's DPOTrainer for `steps` steps; the reference model is computed in the step.

    Its own loop runs; a callback times each step from `on_step_begin` to `on_step_end`: forward of policy and reference, backward,
    clipping, fused AdamW, scheduler and zeroing of gradients. Data loading lies outside.

    Args:
        pairs: rows of strings with `prompt, chosen, rejected`; all of them are the batch of every step.
        after_step: as `step_clock` takes it.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    policy = AutoModelForCausalLM.from_pretrained(folder)
    assert all(p.dtype.itemsize == 4 for p in policy.parameters())  # float32 master weights also with bf16=True
    with tempfile.TemporaryDirectory() as out:
        args = DPOConfig(
            out, use_cpu=True, bf16=dtype == "bfloat16", gradient_checkpointing=False, max_length=None, beta=BETA,
            per_device_train_batch_size=len(pairs), max_steps=steps, learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
            max_grad_norm=MAX_GRAD_NORM, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        DPOTrainer(
            model=policy, ref_model=AutoModelForCausalLM.from_pretrained(folder), args=args, train_dataset=Dataset.from_list(pairs),
            processing_class=AutoTokenizer.from_pretrained(folder), callbacks=[step_clock(after_step)],
        ).train()  # fmt: skip


def bare_step(folder: Path, tokens, prompt: int, dtype: str, answers_only: bool = False) -> Callable[[], float]:
    """A DPO step as one writes it by hand: transformers' Llama with fused attention, log-softmax, clip, fused AdamW.

    Args:
        tokens: [2n,T] int array, chosen rows first, answers from column `prompt` on.
        dtype: of the computation; master weights are float32 (autocast otherwise).
        answers_only: apply the head only to the hidden states that predict answer tokens.
    """
    import torch
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    ids = torch.as_tensor(tokens, dtype=torch.long)
    scored = slice(prompt - 1, ids.shape[1] - 1)  # states that predict the answer

    def logps(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            if answers_only:
                logits = model.lm_head(model.model(ids, use_cache=False).last_hidden_state[:, scored])
            else:
                logits = model(ids, use_cache=False).logits
        all_logps = torch.log_softmax(logits.float(), -1)
        if not answers_only:
            all_logps = all_logps[:, scored]
        return all_logps.gather(-1, ids[:, prompt:, None])[..., 0].sum(-1)

    def step() -> float:
        with torch.no_grad():
            ratio = -logps(reference)
        ratio = ratio + logps(policy)
        chosen, rejected = ratio.chunk(2)
        loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step
