"""Keys of config.algorithm for algorithms that learn from what the policy itself writes; a part of configs/common.py."""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder


def teacher_keys() -> dict:
    """What following a teacher has in common, on given answers and on one's own."""
    return dict(
        temperature=1.0,  # all logits are divided by it
        objective="divergence",  # of whole distributions; iw_opd: of the tokens that stand there, early ones weighted more (IW-OPD)
        loss_top_k=0,  # divergence over so many tokens only; 0 is all
        loss_top_k_of="student",  # whose likeliest: student, teacher, both
        loss_add_tail=True,  # all other tokens are one more; else they are forgotten
        iw_opd_gamma=0.5,  # iw_opd: how much more the first token counts than the last; 0 is the sampled reverse KL
    )


def _online(name: str) -> dict:
    """What all online algorithms have in common."""
    return dict(
        name=name,
        # what answers are worth: a checkpoint folder or Hub id of a reward model, "package.module:function" with
        # (prompts, completions, **columns) -> list of float or None, "math" or "format" (aligner/rl/verifiers.py), or an http:// address
        reward_funcs=(),
        reward_weights=(),  # one number for each; () weighs all 1
        environment="",  # "package.module:Name" makes an episode of several turns (aligner/rl/environments.py); its rewards are added
        max_turns=4,  # of the policy in an episode, each of at most generation.max_new_tokens
        reward_timeout=60.0,  # seconds that a reward function may take for a rollout
        num_generations=8,  # answers to each prompt: a group
        num_iterations=1,  # passes over a rollout
        num_mini_batches=1,  # updates of a pass, each on config.data.batch_size prompts with all their answers
        beta=0.0,  # weight of the KL divergence from the reference; 0 needs no reference
        mask_truncated_completions=False,  # learn nothing from answers that were cut at generation.max_new_tokens
        # tokens before the longest answer that can be, of all turns, over which one loses up to overlong_penalty of its reward
        overlong_buffer=0,
        overlong_penalty=1.0,
    )


def _policy_gradient() -> dict:
    """What those have in common that learn by the ratio of the policy to the one that wrote."""
    return dict(
        epsilon=0.2,  # the ratio to the policy that wrote is held in [1 - epsilon, 1 + epsilon_high]
        epsilon_high=placeholder(float),  # None: epsilon
        delta=placeholder(float),  # two-sided clipping: the most that the unclipped ratio counts; None is off
        dual_clip=placeholder(float),  # > 1: the most that a bad answer's ratio counts; None is off
        entropy_coef=0.0,  # weight of the entropy of the next-token distributions, which is pushed up
    )


def grpo() -> ConfigDict:
    """config.algorithm for GRPO and its family; TRL's names and defaults."""
    more = dict(
        # grpo: mean over answers of the mean over tokens; bnpo, dapo: mean over tokens; dr_grpo: sum over tokens / the longest possible;
        # luspo: mean over answers of the sum; cispo, vespo: weighted REINFORCE, mean over tokens; sapo: soft gate, normalised as grpo
        loss_type="dapo",
        importance_sampling_level="token",  # token; sequence (GSPO: the mean over the answer); sequence_sum (RLOO's)
        scale_rewards="group",  # what a group's centred rewards are divided by: the deviation of the group, of the batch, or none
        multi_objective="sum",  # of several reward functions: sum, or normalise each in its group first (gdpo)
        top_entropy_quantile=1.0,  # learn only from this share of tokens, those where the policy was least sure
        off_policy_mask_threshold=placeholder(float),  # bad answers that have drifted further than this (mean log-ratio) are left out
        use_bias_correction_kl=True,  # the KL term is weighted by the ratio
        dynamic_sampling=0,  # so often a prompt whose answers are all worth the same is replaced by another one (DAPO)
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
    )
    return ConfigDict(_online("grpo") | _policy_gradient() | more)


def rloo() -> ConfigDict:
    """config.algorithm for RLOO: the others of the group are the baseline, the ratio is the answer's, the KL part of the reward."""
    config = grpo()
    config.update(dict(name="rloo", num_generations=2, beta=0.05, loss_type="grpo", importance_sampling_level="sequence_sum"))
    return config


def reinforce() -> ConfigDict:
    """config.algorithm for REINFORCE with the batch's mean as the baseline; the KL is part of the reward."""
    config = grpo()
    config.update(dict(name="reinforce", num_generations=1, beta=0.01, loss_type="dapo", use_bias_correction_kl=False))
    return config


def reinforce_plus_plus() -> ConfigDict:
    """config.algorithm for REINFORCE++ (arXiv 2501.03262): rewards less the KL from each token on, normalised over the batch."""
    config = reinforce()
    config.name = "reinforce_plus_plus"
    return config


def reinforce_plus_plus_baseline() -> ConfigDict:
    """config.algorithm for REINFORCE++ with the group's mean as the baseline; the KL (k2) stands in the loss."""
    config = reinforce()
    config.update(dict(name="reinforce_plus_plus_baseline", num_generations=4))
    return config


def remax() -> ConfigDict:
    """config.algorithm for ReMax: the reward of the greedy answer is the baseline."""
    config = reinforce()
    config.name = "remax"
    return config


def ppo() -> ConfigDict:
    """config.algorithm for PPO with a critic; TRL's defaults."""
    config = ConfigDict(_online("ppo") | _policy_gradient())
    config.update(dict(num_generations=1, num_iterations=4, beta=0.05))
    config.kl_estimator = "k1"  # of the KL that is taken off the reward at each token: k1, k2, k3
    config.kl_target = placeholder(float)  # adaptive: beta is moved so that an answer's KL comes to this; None keeps beta
    config.kl_horizon = 10000  # answers over which it is moved
    config.gamma = 1.0
    config.lam = 0.95
    config.vf_coef = 0.1  # weight of the critic's loss
    config.cliprange_value = FieldReference(0.2)  # the critic's values are held so near the old ones; None does not
    config.whiten_rewards = False  # rewards at tokens are divided by their deviation
    config.missing_eos_penalty = placeholder(float)  # taken off the reward of answers that were cut
    config.reward_clip = placeholder(float)  # rewards are held in [-reward_clip, reward_clip]
    config.standardize_rewards = False  # rewards are divided by their running deviation, less their running mean
    config.critic = ""  # checkpoint that the critic starts from, of the policy's tokenizer; "" is the policy with a fresh score head
    config.critic_warmup = 0  # first updates, in which the critic learns and the policy is held
    config.ptx_coef = 0.0  # weight of the negative log-likelihood per token of the rows of data.ptx, as many at an update as prompts
    return config


def ppo_lagrangian() -> ConfigDict:
    """config.algorithm for PPO under a bound on costs (Safe RLHF, arXiv 2310.12773)."""
    config = ppo()
    config.cost_funcs = ()  # as reward_funcs: what answers cost; positive is harmful
    config.cost_limit = 0.0  # the mean cost that is aimed at
    config.lagrangian_init = 1.0  # the multiplier at first: the reward is (reward - multiplier * cost) / (1 + multiplier)
    config.lagrangian_lr = 0.1  # the logarithm of the multiplier moves so much for each unit of mean cost above the limit
    config.lagrangian_max = 20.0
    return config


def online_dpo() -> ConfigDict:
    """config.algorithm for DPO on pairs that the policy writes and the rewards judge; TRL's defaults."""
    config = ConfigDict(_online("online_dpo"))
    config.update(dict(num_generations=2, beta=0.1))
    config.loss_type = "sigmoid"  # or ipo; both on summed log-ratios
    config.xpo_alpha = 0.0  # XPO: weight of making less likely what the reference writes, which then writes one of the two answers
    return config


def xpo() -> ConfigDict:
    """config.algorithm for XPO."""
    config = online_dpo()
    config.xpo_alpha = 1e-5
    return config


def nash_md() -> ConfigDict:
    """config.algorithm for Nash-MD (arXiv 2312.00886): answers that are preferred to those of a mixture with the reference."""
    config = ConfigDict(_online("nash_md"))
    config.update(dict(num_generations=2, beta=0.1))  # one answer by the policy, which learns, and one by the mixture
    config.mixture_coef = 0.5  # the reference's share of the logits that the mixture draws from
    return config


def on_policy_distillation() -> ConfigDict:
    """config.algorithm for following a teacher on what the student itself writes (GKD, arXiv 2306.13649, with lambda = 1)."""
    config = ConfigDict(_online("on_policy_distillation"))
    config.update(dict(num_generations=1, beta=1.0))  # as in `distillation`: 1 is the reverse KL
    config.teacher = ""  # checkpoint folder or Hub id, of the same vocabulary
    config.update(teacher_keys())
    return config
