"""Every key of a config, with its default and what it means. Experiments start from `base()` and change what they need."""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def data_source() -> ConfigDict:
    """One dataset: where the rows are and how a row becomes a sample."""
    return ConfigDict(
        dict(
            path="",  # local .json, .jsonl, .parquet, a folder of them, or a Hub dataset id; "" means none
            split="train",  # split of a Hub dataset
            subset=placeholder(str),  # configuration name of a Hub dataset
            formatter="auto",  # how a row becomes a sample; "auto" goes by the columns (aligner/data/formatters.py)
            image_folder="",  # images named in the rows are looked up here; "" is the folder of the file
            size=placeholder(int),  # use only the first rows
        )
    )


def dpo() -> ConfigDict:
    """config.algorithm for direct preference optimisation."""
    return ConfigDict(
        dict(
            name="dpo",
            beta=0.1,  # strength of the pull towards the reference
            label_smoothing=0.0,  # probability that a label is wrong (conservative DPO)
        )
    )


def base() -> ConfigDict:
    """The defaults of every section; TRL's values where TRL has the setting."""
    config = ConfigDict()

    config.model = ConfigDict()
    config.model.path = ""  # local checkpoint folder or Hub id; "{workdir}" stands for the working directory
    config.model.revision = placeholder(str)  # Hub revision
    config.model.dtype = "bfloat16"  # dtype of the computation
    config.model.param_dtype = "float32"  # dtype of the master parameters that train; frozen ones are kept in `dtype`

    config.reference = ConfigDict()
    # precomputed: log-probabilities once before training; copy: a frozen copy in memory; base: the base with its adapters off
    config.reference.kind = "precomputed"
    config.reference.model = ""  # another checkpoint as the reference; "" is the policy at step 0
    config.reference.cache = ""  # folder for precomputed columns; "" is WORKDIR/reference

    config.algorithm = dpo()

    config.data = ConfigDict()
    config.data.train = data_source()
    config.data.eval = data_source()
    config.data.max_length = 1024  # tokens of prompt + longer answer; longer examples are dropped and counted, never cut
    config.data.batch_size = 8  # examples per optimizer step on all devices; a pair is one
    config.data.shared_prompt = True  # compute the prompt once for all its answers; the result is the same, only faster
    config.data.shuffle = True  # a new order every epoch, a function of `seed`
    config.data.max_bad_fraction = 0.05  # stop when more rows than this are broken, unreadable or too long
    config.data.pad_to_multiple = 64  # rows are padded to the longest of the dataset, rounded up to this
    config.data.workers = 8  # threads that read and decode ahead

    config.optim = ConfigDict()
    config.optim.learning_rate = 1e-6
    config.optim.schedule = "linear"  # constant, linear or cosine decay to zero
    config.optim.warmup = 0.1  # below 1 a fraction of all steps, else a number of steps
    config.optim.beta1 = 0.9
    config.optim.beta2 = 0.999
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.0
    config.optim.max_grad_norm = 1.0  # 0 turns clipping off
    config.optim.freeze = ()  # regexes on tree paths ("vision_tower/.*"): no gradient, no optimizer memory
    config.optim.groups = ()  # (regex, {"learning_rate": factor, "weight_decay": factor}) pairs; the first match wins

    config.lora = ConfigDict()
    config.lora.rank = 0  # 0: no adapters, the model itself trains; else only adapters of this rank (and modules_to_save) do
    config.lora.alpha = 32.0  # the adapters' product is multiplied by alpha / rank, rslora: by alpha / sqrt(rank)
    config.lora.dropout = 0.0  # of the adapters' inputs; draws differ with `train.accumulate`
    config.lora.variant = "lora"  # lora, rslora, dora
    config.lora.init = "kaiming"  # of lora_a: kaiming (as PEFT), gaussian; lora_b is zero
    config.lora.targets = ()  # regexes on tree paths, such as (".*(q|v)_proj",); ("all-linear",); () is all of the decoder's layers
    config.lora.layers_to_transform = ()  # indices of the layers that get adapters; () is all
    config.lora.modules_to_save = ()  # regexes on tree paths: modules that train whole beside the adapters
    config.lora.adapter = ""  # folder of a PEFT adapter to go on from: its rank, alpha and variant must be those above, its targets count

    config.quant = ConfigDict()
    config.quant.base = ""  # nf4 or int8: how the frozen kernels of the decoder's layers are held (QLoRA); "" keeps them in model.dtype

    config.train = ConfigDict()
    config.train.steps = placeholder(int)  # optimizer steps; wins over epochs
    config.train.epochs = 1.0
    config.train.accumulate = 1  # micro-batches per step; changes memory, never the result
    config.train.eval_every = 0  # steps between evaluations; 0 evaluates only at the end
    config.train.remat = "none"  # none, full, dots: what the backward pass recomputes
    config.train.max_nonfinite = 3  # stop after so many steps in a row whose loss or gradient is not finite

    config.mesh = ConfigDict()
    config.mesh.data = -1  # -1: all devices that the other axes leave
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 500  # steps between saves; the last step is always saved
    config.checkpoint.keep = 2  # newest ones that are kept
    config.checkpoint.export = False  # write WORKDIR/export in Hugging Face layout at the end

    config.log = ConfigDict()
    config.log.every = 10  # steps between lines of metrics.jsonl
    config.log.tensorboard = False
    config.log.wandb = False

    config.profile = 0  # trace so many steps for Perfetto; 0 is off
    config.seed = 0
    config.setup = ""  # "module:function", called with the config before anything is read; presets make their demo input with it
    return config


def apply_preset(config: ConfigDict, preset: str, presets: Mapping[str, Callable[[ConfigDict], ConfigDict]]) -> ConfigDict:
    """The config changed by the preset named behind the colon of --config, locked."""
    if preset and preset not in presets:
        raise ValueError(f"unknown preset {preset!r}; there is {', '.join(presets)}")
    return (presets[preset](config) if preset else config).lock()
