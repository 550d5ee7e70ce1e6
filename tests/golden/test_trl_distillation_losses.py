"""Distillation in all its forms against numbers that the real TRL computed from the same logits: values, and gradients by the logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner.algorithms import distillation, grpo
from aligner.logprobs import TopK, divergence
from aligner.losses import partial_distillation as partial
from aligner.losses.distillation import generalized_jsd
from aligner.losses.supervised import nll
from aligner.types import Head, Scores
from configs import common
from scripts.trl_vectors.distillation import LONGEST, SHARED
from tests.golden.trl_vectors import BATCHES, check, of, reduced
from tests.models import tiny


def log_softmax(x, temperature=1.0):
    return jax.nn.log_softmax(jnp.asarray(x) / temperature)


def at(log_p, token):
    return jnp.take_along_axis(log_p, jnp.asarray(token)[..., None], axis=-1)[..., 0]


def mask_of(arrays):
    return arrays["mask"][: len(arrays["student"])]


def per_answer(losses, mask):
    """The mean over answers of the mean over their tokens."""
    return jnp.mean(jnp.sum(losses * mask, 1) / jnp.maximum(jnp.sum(mask, 1), 1))


@pytest.mark.parametrize(("name", "record"), of("distillation", "few_tokens"))
def test_divergence(name, record):
    """By `divergence`, as the algorithm computes it; of tokens that a server tells, from their distributions."""
    arrays, c = BATCHES[record["batch"]], record["settings"]
    mask, teacher, tail = mask_of(arrays), arrays["teacher"], c.get("add_tail", True)

    def loss(student):
        head = Head(jnp.eye(student.shape[-1]))
        if c.get("of") == "written":
            log_p, log_q = log_softmax(student, c["temperature"]), log_softmax(teacher, c["temperature"])
            support = jnp.asarray(arrays["token"])[..., None]
            support = support if c["beta"] == 1 else jnp.concatenate([jnp.argmax(log_q, -1, keepdims=True), support], -1)
            found = partial.few_tokens_jsd(log_p, log_q, support, c["beta"], tail)
        else:
            top_k = TopK(c["k"], c["of"], tail) if "k" in c else None
            found = divergence(student, head, jnp.asarray(teacher), head, c["beta"], c["temperature"], top_k=top_k)["divergence"]
        return jnp.sum(found * mask) / jnp.sum(mask), {}

    check(record, loss, arrays["student"])


@pytest.mark.parametrize(("name", "record"), of("iw_opd"))
def test_iw_opd(name, record):
    """By the algorithm's objective, an answer a row."""
    arrays, c, mask = BATCHES[record["batch"]], record["settings"], mask_of(BATCHES[record["batch"]]).astype(np.int32)
    batch = {"score_segment": mask, "score_role": mask, "example_id": np.arange(len(mask))[:, None]}
    if c.get("written"):
        batch["old_logps"] = jnp.asarray(arrays["written"])
    config = tiny.config()
    config.algorithm = common.distillation()
    config.algorithm.update(objective="iw_opd", iw_opd_gamma=c.get("gamma", 0.5), temperature=c.get("temperature", 1.0))
    objective = distillation.distil(config, None, None).objective

    def loss(student):
        logps = [jnp.where(mask > 0, at(log_softmax(x, config.algorithm.temperature), arrays["token"]), 0) for x in (student, arrays["teacher"])]
        return reduced(objective, Scores(None, None, {"logp": logps[0], "teacher_logp": logps[1]}, {}), batch)

    check(record, loss, arrays["student"])


@pytest.mark.parametrize(("name", "record"), of("self_distillation"))
def test_self_distillation(name, record):
    """SDFT; and SDPO, which mixes it with GRPO and leaves out the third answer."""
    arrays, mask = BATCHES[record["batch"]], mask_of(BATCHES[record["batch"]])
    c = {"trainer": "sdft", "distillation_mode": "topk_logits", "distillation_alpha": 0.5, "distillation_add_tail": True, "loss_type": "dapo",
         "distillation_is_clip": None, "distillation_weight": 1.0} | record["settings"]  # fmt: skip
    config = tiny.config()
    config.algorithm = common.reinforce()  # GRPO's objective, an answer a prompt
    config.algorithm.update(reward_funcs=("math",), beta=0.0, loss_type=c["loss_type"])
    config.generation.max_new_tokens = LONGEST
    there = mask.astype(np.int32)
    batch = {"score_segment": there, "score_role": there, "example_id": np.arange(len(mask))[:, None], "learn": mask}
    batch |= {"advantages": arrays["advantages"][: len(mask), None] * mask}

    def loss(student):
        log_p, log_q = log_softmax(student), log_softmax(arrays["teacher"])
        logps, old = at(log_p, arrays["token"]), jnp.asarray(arrays["written"])
        if c["distillation_mode"] == "sampled_token":
            losses = partial.sampled_reverse_kl(logps, at(log_q, arrays["token"]))
        elif c["distillation_mode"] == "full_logits":
            losses = generalized_jsd(log_p, log_q, c["distillation_alpha"])
        else:
            support = partial.likeliest(log_p, log_q, 3, "student")
            losses = partial.few_tokens_jsd(log_p, log_q, support, c["distillation_alpha"], c["distillation_add_tail"])
        if c["distillation_is_clip"]:
            losses *= partial.importance(logps, old, c["distillation_is_clip"])
        total = per_answer(losses, mask * np.array([[1], [1], [c["trainer"] == "sdft"], [1]]))
        if c["distillation_weight"] < 1:
            tokens = {"logp": logps, "entropy": jnp.zeros(mask.shape)}
            behind = {name: jnp.asarray(x) for name, x in batch.items()} | {"old_logps": old, "sampling_logps": old}
            policy, _ = reduced(grpo.make(config, tiny.family("llama").model).objective, Scores(None, None, tokens, {}), behind)
            total = (1 - c["distillation_weight"]) * policy + c["distillation_weight"] * total
        return total, {}

    check(record, loss, arrays["student"])


def groups_of(ends, other_ends):
    """([T] group of every token, of every token of the teacher, how many): a group closes where both tokenizers end a token."""
    shared = sorted({*ends} & {*other_ends})
    return np.searchsorted(shared, ends), np.searchsorted(shared, other_ends), len(shared)


@pytest.mark.parametrize(("name", "record"), of("uld"))
def test_uld(name, record):
    arrays, c = BATCHES[record["batch"]], record["settings"]
    ours, theirs = (np.array(SHARED[key]) for key in ("ours", "theirs"))
    weights = c.get("weights") and tuple(c["weights"])

    def of_answer(student, row):
        n, m = (int(arrays[key][row].sum()) - c.get("skip_eos", False) for key in ("mask", "other_mask"))
        if not n or not m:
            return 0.0
        p = jnp.exp(log_softmax(student[row, :n], c.get("student_temperature", 1.0)))
        q = jnp.exp(log_softmax(arrays["other_teacher"][row, :m], c.get("teacher_temperature", 1.0)))
        if c.get("extended", True):
            group, other_group, groups = groups_of(arrays["ends"][row, :n], arrays["other_ends"][row, :m])
            last = c.get("strategy") == "bayesian"
            p = partial.merge_tokens(p, at(p, arrays["token"][row, :n]), group, groups, last)
            q = partial.merge_tokens(q, at(q, arrays["other_token"][row, :m]), other_group, groups, last)
        else:
            p, q = p[: min(n, m)], q[: min(n, m)]
        found = partial.hybrid_uld(p, q, ours, theirs, c["beta"], weights) if c.get("hybrid") else partial.uld(p, q)
        return jnp.mean(found)

    def loss(student):
        total = sum(of_answer(student, row) for row in range(len(student))) / len(student)
        if c.get("crossentropy_weight"):  # TRL's logits stand at the token itself here: its predecessor's are the row before
            mask = mask_of(arrays)
            before = jnp.pad(student, ((0, 0), (1, 0), (0, 0)))[:, :-1]
            total += c["crossentropy_weight"] * jnp.sum(nll(at(log_softmax(before), arrays["token"])) * mask) / mask.sum()
        return total, {}

    check(record, loss, arrays["student"])
