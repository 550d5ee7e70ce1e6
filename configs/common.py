"""Every key of a config, with its default and what it means. Experiments start from `base()` and change what they need."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

# every algorithm is a function of this module
from configs.online import (  # noqa: F401
    grpo,
    nash_md,
    on_policy_distillation,
    online_dpo,
    ppo,
    ppo_lagrangian,
    reinforce,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    remax,
    rloo,
    teacher_keys,
    xpo,
)


def data_source() -> ConfigDict:
    """One dataset: where the rows are and how a row becomes a sample."""
    return ConfigDict(
        dict(
            # local .json, .jsonl, .csv, .tsv, .parquet, .arrow, .array_record or .txt (texts also with .gz), a folder of them, a Hub
            # dataset id, or tfds:NAME@FOLDER of tensorflow-datasets; "" means none
            path="",
            split="train",  # split of a Hub dataset; of local folders: files so named. The Hub's slices too: "train[:10%]"
            streaming=False,  # of a Hub dataset: download only the first `size` rows
            subset=placeholder(str),  # configuration name of a Hub dataset
            sample_by="paragraph",  # of .txt files: a document is a "line", a "paragraph" (blank lines between) or the whole "document"
            formatter="auto",  # how a row becomes a sample; "auto" goes by the columns (aligner/data/formatters.py)
            image_folder="",  # images, sounds and clips named in the rows are looked up here; "" is the folder of the file
            size=placeholder(int),  # use only the first rows
            fraction=placeholder(float),  # how much of the rows stands in an epoch: 0.25 a random quarter, 2.0 all of them twice; None all
            seed=placeholder(int),  # of the rows that a fraction or weight takes; None goes by config.seed
            template=ConfigDict(),  # arguments for the chat template, such as enable_thinking; a row's chat_template_kwargs come on top
            mixture=(),  # several datasets instead of `path`: dicts of these keys, and `weight` (aligner/data/mixture.py)
        )
    )


def dpo() -> ConfigDict:
    """config.algorithm for direct preference optimisation and its kin, on pairs."""
    return ConfigDict(
        dict(
            name="dpo",
            beta=0.1,  # strength of the pull towards the reference
            # one loss or several: sigmoid, hinge, ipo (scores per token, as TRL), ipo_sum (scores summed), exo_pair, nca_pair, robust,
            # bco_pair (no reward shift), bco (shift: running mean of rewards), sppo_hard, aot, aot_unpaired, apo_zero, apo_down,
            # discopop, sigmoid_norm (scores per token), sft (negative log-likelihood of the chosen)
            loss_type=("sigmoid",),
            loss_weights=(),  # one number a loss; () weighs all 1
            # probability that a label is wrong; read by exo_pair, robust, aot, aot_unpaired, and by sigmoid and sigmoid_norm, TRL's do not
            label_smoothing=0.0,
            f_divergence_type="reverse_kl",  # or forward_kl, js_divergence, alpha_divergence
            f_alpha_divergence_coef=0.5,  # of alpha_divergence
            discopop_tau=0.05,  # temperature of discopop's blend
            ld_alpha=placeholder(float),  # LD-DPO: weight in [0, 1] of tokens beyond the shorter answer's length; None is off
            use_weighting=False,  # WPO: weigh pairs by how likely the policy itself is to write them
            sync_ref_model=False,  # TR-DPO: move the reference towards the policy; needs config.reference.kind="copy"
            ref_model_mixup_alpha=0.6,  # reference <- a * policy + (1 - a) * reference
            ref_model_sync_steps=512,  # every so many steps
        )
    )


def dpo_ranked() -> ConfigDict:
    """config.algorithm for DPO on rankings of several answers (Plackett-Luce)."""
    return ConfigDict(
        dict(
            name="dpo_ranked",
            beta=0.1,  # strength of the pull towards the reference
            answers=4,  # the most answers that a row has
        )
    )


def kto() -> ConfigDict:
    """config.algorithm for single answers labelled good or bad."""
    return ConfigDict(
        dict(
            name="kto",
            loss_type="kto",  # kto; apo_zero_unpaired (reference point 0); bco (classifier with the running mean of rewards as its shift)
            beta=0.1,  # strength of the pull towards the reference
            desirable_weight=1.0,  # of good answers; with n good and m bad ones, KTO wants weight * n / m in [1, 1.33]
            undesirable_weight=1.0,  # of bad answers
        )
    )


def orpo() -> ConfigDict:
    """config.algorithm for ORPO."""
    return ConfigDict(
        dict(
            name="orpo",
            beta=0.1,  # weight of the odds ratio (lambda in the paper)
            nll_over="prompt_and_completion",  # tokens of the supervised term: as TRL, or "completion" alone
        )
    )


def cpo() -> ConfigDict:
    """config.algorithm for CPO, TRL's defaults."""
    return ConfigDict(
        dict(
            name="cpo",
            loss_type="sigmoid",  # sigmoid, hinge: log-probabilities summed; ipo, simpo: averaged per token
            beta=0.1,
            label_smoothing=0.0,  # probability that a label is wrong; sigmoid and simpo
            cpo_alpha=1.0,  # weight of the negative log-likelihood per token of the chosen answers
            simpo_gamma=0.5,  # simpo: margin of rewards, subtracted after beta
            alpha=0.0,  # AlphaPO: reward (1 - p^-alpha) / alpha; 0 is log p
        )
    )


def simpo() -> ConfigDict:
    """config.algorithm for SimPO as its paper has it, without the likelihood of the chosen; beta and gamma are TRL's defaults."""
    config = cpo()
    config.update(dict(loss_type="simpo", cpo_alpha=0.0))
    return config


def alphapo() -> ConfigDict:
    """config.algorithm for AlphaPO: SimPO with another reward."""
    config = simpo()
    config.alpha = 0.25
    return config


def tpo() -> ConfigDict:
    """config.algorithm for TPO, TRL's defaults: pairs and a third, gold answer."""
    return ConfigDict(
        dict(
            name="tpo",
            loss_type="sigmoid",  # sigmoid, hinge: log-probabilities summed; ipo, tpo-l: averaged per token
            beta=0.01,
            label_smoothing=0.0,  # probability that a label is wrong; sigmoid and tpo-l
            tpo_alpha=1.0,  # weight of the negative log-likelihood per token of the gold answers
            tpo_l_gamma=0.5,  # tpo-l: margin of rewards, subtracted after beta
        )
    )


def sso() -> ConfigDict:
    """config.algorithm for SSO's two-sided loss."""
    return ConfigDict(
        dict(
            name="sso",
            beta=0.1,  # strength of the pull towards the reference
            label_smoothing=0.0,  # probability that a label is wrong
            gamma=0.1,  # weight of log p per token of the preferred answers
        )
    )


def sft() -> ConfigDict:
    """config.algorithm for supervised fine-tuning; with name="cpt" for continued pre-training on running text."""
    return ConfigDict(
        dict(
            name="sft",  # sft: conversations, prompts with completions; cpt: documents, cut into full rows of data.max_length
            loss_type="nll",  # nll: cross-entropy; dft: each token's weighted by its own probability (arXiv 2508.05629)
            # uniform noise of +-alpha / sqrt(length * width) on the embeddings while training (NEFTune); draws differ with train.accumulate
            neftune_noise_alpha=0.0,
            z_loss=0.0,  # weight of the mean squared log-sum-exp of the logits, which keeps them from drifting
        )
    )


def cpt() -> ConfigDict:
    """config.algorithm for continued pre-training: SFT's, on running text."""
    config = sft()
    config.name = "cpt"
    return config


def reward() -> ConfigDict:
    """config.algorithm for a reward model: a score head on the model, fresh where the checkpoint has none."""
    return ConfigDict(
        dict(
            name="reward",
            loss_type="bradley_terry",  # bradley_terry: pairs, with their `margin` where rows have one; plackett_luce: ranked lists;
            # mse: answers with `scores`
            answers=2,  # the most answers that a row has; pairs have two
            center_rewards_coefficient=0.0,  # weight of (sum of a group's rewards)^2, which keeps them around zero; TRL recommends 0.01
            regularization=0.0,  # weight of the mean square of all rewards; align-anything's is 0.001
        )
    )


def cost() -> ConfigDict:
    """config.algorithm for a cost model (Safe RLHF): `chosen` is the safer answer, the sign says whether an answer is safe."""
    return ConfigDict(
        dict(
            name="cost",
            scale=1.0,  # weight of the sign of both answers against their order
            regularization=0.001,  # weight of the mean square of all costs
        )
    )


def distillation() -> ConfigDict:
    """config.algorithm for following a teacher's next-token distributions on given answers."""
    return ConfigDict(
        dict(
            name="distillation",
            teacher="",  # checkpoint folder or Hub id, of the same vocabulary; "{workdir}" stands for the working directory
            beta=0.5,  # 0: forward KL(teacher || student); 1: reverse KL(student || teacher); between: generalised Jensen-Shannon
            **teacher_keys(),
        )
    )


def base() -> ConfigDict:
    """The defaults of every section; those of `optim` are TRL's for DPO, which has no warm-up though."""
    config = ConfigDict()

    config.model = ConfigDict()
    config.model.path = ""  # local checkpoint folder or Hub id; "{workdir}" stands for the working directory
    config.model.revision = placeholder(str)  # Hub revision
    config.model.dtype = "bfloat16"  # dtype of the computation
    config.model.param_dtype = "float32"  # dtype of the master parameters that train; frozen ones are kept in `dtype`

    # reference: plain; pallas: kernels for TPUs, cudnn: cuDNN's for GPUs, in bfloat16 and not yet measured on one; both are an error where
    # they cannot do what a model needs; auto: on TPUs pallas where it can
    config.model.attention = "auto"

    config.reference = ConfigDict()
    # precomputed: log-probabilities once before training (online algorithms: as copy); copy: a frozen copy in memory; base: the base
    # with its adapters off
    config.reference.kind = "precomputed"
    config.reference.model = ""  # another checkpoint as the reference; "" is the policy at step 0
    config.reference.cache = ""  # folder for precomputed columns; "" is WORKDIR/reference

    config.algorithm = dpo()

    config.data = ConfigDict()
    config.data.train = data_source()
    config.data.eval = data_source()
    config.data.ptx = data_source()  # supervised rows that PPO goes on learning beside its own answers; see algorithm.ptx_coef
    config.data.evals = ConfigDict()  # more evaluation sets, NAME = data_source(), told under "dataset": NAME; one without a path is none
    config.data.max_length = 1024  # tokens of prompt + longer answer; longer examples are dropped and counted, never cut
    config.data.batch_size = 8  # examples per optimizer step on all devices; a pair is one
    config.data.packing = False  # put several examples into a row; batch_size then counts rows. Changes speed, not what is learned from one
    config.data.packed_length = placeholder(int)  # columns of a packed row; None: max_length, or the longest pair if that is longer
    config.data.chat_template = ""  # instead of the checkpoint's: a .jinja file, Jinja text, or a name (aligner/data/catalogue.py)
    config.data.default_template = ""  # a name, where the checkpoint has no template; "" is USER: / ASSISTANT:
    config.data.loss_on = "assistant"  # of conversations: assistant (all its turns), last (its last turn), all (every token)
    config.data.shared_prompt = True  # compute a prompt once for all its answers: the same, faster; ropes that go by length are refused
    config.data.shuffle = True  # a new order every epoch, a function of `seed`
    config.data.max_bad_fraction = 0.05  # stop when more rows than this are broken, unreadable or too long
    config.data.pad_to_multiple = 64  # rows are padded to the longest of the dataset, rounded up to this
    config.data.video_frames = 8  # frames taken of a video, evenly; of a shorter one all
    config.data.workers = 8  # threads that decode media ahead; text has one, more would wait for each other

    config.optim = ConfigDict()
    config.optim.learning_rate = 1e-6
    config.optim.schedule = "linear"  # constant, linear or cosine decay to zero
    config.optim.warmup = 0.1  # below 1 a fraction of all steps, else a number of steps
    config.optim.beta1 = 0.9
    config.optim.beta2 = 0.999
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.0  # not of norms and biases, unless a group sets theirs
    config.optim.max_grad_norm = 1.0  # 0 turns clipping off
    config.optim.freeze = ()  # regexes on tree paths ("vision_tower/.*"): no gradient, no optimizer memory
    config.optim.groups = ()  # (regex, {"learning_rate": factor, "weight_decay": factor}) pairs; the first match wins

    config.generation = ConfigDict()  # how answers are written, in online training
    config.generation.max_new_tokens = 256  # an answer's tokens at most
    config.generation.temperature = 1.0  # log-probabilities are taken at this temperature in training too
    config.generation.top_k = 0  # only the k likeliest tokens; 0 is off
    config.generation.top_p = 1.0  # only the fewest tokens of this probability together; 1 is off
    config.generation.min_p = 0.0  # only tokens so likely relative to the likeliest; 0 is off
    config.generation.repetition_penalty = 1.0  # divides logits of tokens that stand there already; 1 is off
    config.generation.stop_strings = ()  # texts that end an answer
    config.generation.batch_size = 32  # texts written at once
    config.generation.server = ""  # "vllm:http://HOST:8000" or "sglang:http://HOST:30000" writes instead of this process
    config.generation.server_every = 1  # rollouts after which the server's weights are refreshed from WORKDIR/served
    config.generation.importance_cap = 3.0  # a server's tokens weigh as much as the policy thinks them likelier than it did, at most this

    config.lora = ConfigDict()
    config.lora.rank = 0  # 0: no adapters, the model itself trains; else only adapters of this rank (and modules_to_save) do
    config.lora.alpha = 32.0  # the adapters' product is multiplied by alpha / rank, rslora: by alpha / sqrt(rank)
    config.lora.dropout = 0.0  # of the adapters' inputs; draws differ with `train.accumulate`
    config.lora.variant = "lora"  # lora, rslora, dora
    config.lora.init = "kaiming"  # of lora_a: kaiming (as PEFT), gaussian; lora_b is zero
    # regexes on tree paths, such as (".*(q|v)_proj",); ("all-linear",); () is all of the decoder's layers; routers only where named
    config.lora.targets = ()
    config.lora.layers_to_transform = ()  # indices of the layers that get adapters; () is all
    config.lora.modules_to_save = ()  # regexes on tree paths: modules that train whole beside the adapters
    config.lora.adapter = ""  # folder of a PEFT adapter to go on from: its rank, alpha and variant must be those above, its targets count

    config.quant = ConfigDict()
    config.quant.base = ""  # nf4 or int8: how the frozen kernels of the decoder's layers are held (QLoRA); "" keeps them in model.dtype

    config.train = ConfigDict()
    config.train.steps = placeholder(int)  # optimizer steps; wins over epochs
    config.train.epochs = 1.0  # passes over the rows; steps come to the whole number below, where TRL's Trainer takes a smaller last one
    config.train.accumulate = 1  # micro-batches per step; changes memory, never the result, but for what is drawn: dropout, NEFTune's noise
    config.train.eval_every = 0  # steps between evaluations; 0 evaluates only at the end
    config.train.remat = "none"  # none, dots, context, full: what the backward pass recomputes
    config.train.max_nonfinite = 3  # stop after so many steps in a row whose loss or gradient is not finite
    # after so many seconds without a step, evaluations and compilation aside, write the stacks of all threads and end with status 124;
    # 0 is off. Online, a rollout counts as part of a step
    config.train.watchdog = 0.0

    config.mesh = ConfigDict()
    config.mesh.data = -1  # -1: all devices that the other axes leave
    config.mesh.fsdp = 1  # weights are spread over it
    config.mesh.sequence = 1  # long rows are cut over it, and weights spread
    config.mesh.tensor = 1  # heads, the MLPs' inner width and the vocabulary are cut over it

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 500  # steps between saves; the last step is always saved
    config.checkpoint.keep = 2  # newest ones that are kept
    config.checkpoint.requeue_code = 0  # exit status after SIGTERM or SIGUSR1, state saved: what the launcher starts again on, such as 75
    config.checkpoint.export = False  # write WORKDIR/export in Hugging Face layout at the end

    config.log = ConfigDict()
    config.log.every = 10  # steps between lines of metrics.jsonl
    config.log.completions = 2  # answers of a rollout shown as a table at every log; all of them go to WORKDIR/completions
    config.log.tensorboard = False
    config.log.wandb = False

    config.profile = 0  # trace so many steps for Perfetto, from the third after a start; 0 is off
    config.seed = 0
    config.setup = ""  # "module:function", called with the config before anything is read; presets make their demo input with it
    return config


def experiment(algorithm: ConfigDict, model: str, dataset: str, train: str = "train", held_out: str = "") -> ConfigDict:
    """`base()` for a run on a mesh of accelerators: an algorithm, a checkpoint, a Hub dataset and its splits; locked.

    Args:
        algorithm: one of those above.
        model: checkpoint folder or Hub id.
        dataset: file, folder or Hub id.
        train, held_out: splits of a Hub dataset; "" evaluates nothing.
    """
    config = base()
    config.algorithm = algorithm
    config.model.path = model
    config.data.train.path, config.data.train.split = dataset, train
    if held_out:
        config.data.eval.path, config.data.eval.split = dataset, held_out
    config.data.max_length = 2048
    config.data.batch_size = 64
    config.generation.batch_size = 256
    config.optim.schedule = "constant" if "reward_funcs" in algorithm else "cosine"
    config.train.remat = "full"
    config.checkpoint.export = True
    return config.lock()


# Demos that online training learns from (scripts/online_demo.py): files of prompts for training and for greedy answers
PROMPTS = {"sums": ("train", "train"), "colours": ("train", "heldout")}


def finish(config: ConfigDict, preset: str, family: str, rows: str = "pairs") -> ConfigDict:
    """The config as it is or, for the preset behind the colon of --config, "tiny", as a minute's run on two CPU cores, offline.

    Args:
        config: of `experiment`.
        preset: "" or "tiny".
        family: whose small random checkpoint is made: llama, qwen, llava, qwen2_audio; or a demo of online training, sums or colours.
        rows: the demo set of a text family (scripts/text_demo.py): sft, pairs, unpaired, ranked, text. A LLaVA's are pairs about pictures,
            a Qwen2-Audio's about sounds (scripts/audio_demo.py).
    """
    if preset not in ("", "tiny"):
        raise ValueError(f"unknown preset {preset!r}; there is tiny")
    if not preset:
        return config
    seeing, online = family in ("llava", "qwen2_audio"), family in PROMPTS
    script = "online_demo" if online else "audio_demo" if family == "qwen2_audio" else "make_tiny_checkpoint"
    prefix, ending = ("" if seeing or online else f"{rows}_"), "txt" if rows == "text" else "jsonl"
    config.setup = f"scripts.{script}:setup_{family}{'' if online else '_demo'}"
    config.model.path = "{workdir}/demo/model"
    config.model.dtype = "float32"
    for split, file in zip(("train", "eval"), PROMPTS.get(family, ("train", "heldout"))):
        config.data[split] = data_source()
        config.data[split].path = f"{{workdir}}/demo/data/{prefix}{file}.{ending}"
    config.data.max_length = 160
    config.data.batch_size = 32 if seeing else 16
    config.data.pad_to_multiple = 8
    config.generation.max_new_tokens = 2
    config.generation.batch_size = 512
    config.optim.learning_rate = 5e-4 if seeing else 1e-3
    config.optim.schedule = "constant" if online else "linear"
    config.optim.freeze = ()  # a random tower has to learn too
    config.train.steps = 200
    config.train.eval_every = 50
    config.train.accumulate = 1
    config.train.remat = "none"
    config.checkpoint.every = 50
    config.log.every = 10 if online else 1
    return config


def qlora(config: ConfigDict, *, rank: int, alpha: float, learning_rate: float, batch_size: int) -> ConfigDict:
    """A finished config on one GPU: the frozen base in 4 bits, adapters on every linear map of its layers; off, they are the reference."""
    tiny = bool(config.setup)
    config.quant.base = "nf4"
    config.lora.rank, config.lora.alpha = (8, 16.0) if tiny else (rank, alpha)
    config.lora.dropout = 0.05
    config.reference.kind = "base"
    config.optim.learning_rate = 2e-3 if tiny else learning_rate
    if not tiny:
        config.data.batch_size, config.train.accumulate = batch_size, batch_size // 4
    config.checkpoint.export = False  # merging needs the whole base in memory; `aligner.convert to-hf` does it where there is enough
    return config
