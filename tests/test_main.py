"""Bad input to the public command line: one clear sentence, exit status 2, no traceback, and no parameter is allocated before."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from absl import flags
from PIL import Image

from aligner import commandline, main, run
from aligner.stopping import Stopped
from aligner.types import SaveError, UserError
from configs import common
from tests.resume import runs
from tests.resume.runs import ROOT, demo


def arguments(workdir, settings=None):
    """A command line that is right, also for the eight devices of this process."""
    return runs.arguments(workdir, {"data.batch_size": 8} | (settings or {}))


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    """Whatever is wrong is told before the first parameter is read."""

    def load(*args):
        raise AssertionError("parameters were loaded before the input was known to be good")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(run, "load", load)
    monkeypatch.setattr("aligner.convert.assets.leave_pytorch_out", lambda settings: None)  # later tests of this process may need it


def forget_flags():
    """Flags as before the first command line of this process."""
    for name in list(flags.FLAGS):
        if name.startswith("config."):  # each --config.key is a flag of its own, made when it is met
            delattr(flags.FLAGS, name)
    for name in ("config", "workdir"):
        flags.FLAGS[name].unparse()


def call(*argv):
    """(exit status, stderr) of the command line, in this process."""
    forget_flags()
    told = io.StringIO()
    argv, before = ["main", *map(str, argv)], sys.argv
    sys.argv = argv
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as end:
            main.cli()
    finally:
        sys.argv = before
    return end.value.code, told.getvalue()


def refused(tmp_path, *phrases, argv=None, **settings):
    """The last line is one sentence that holds all the phrases."""
    given = {key.replace("__", "."): value for key, value in settings.items()}
    code, told = call(*(arguments(tmp_path / "run", given) if argv is None else argv))
    assert code == 2, told
    last = told.strip().splitlines()[-1]
    assert last.startswith("error: "), told
    assert "Traceback" not in told
    for phrase in phrases:
        assert phrase in last, last
    return last


@pytest.mark.parametrize(
    ("argv", "phrases"),
    [
        ([], ["--config is missing", "for example: python -m aligner.main"]),
        (["--config=configs/dpo_llava.py:tiny"], ["--workdir is missing"]),
        (["--config=configs/dpo_lava.py"], ["--config configs/dpo_lava.py does not exist", "did you mean configs/dpo_llava.py?"]),
        (["--config", "configs/dpo_llava.py:tinny"], ["unknown preset 'tinny'", "there is tiny"]),
        (["--confg=x"], ["confg", "Did you mean: config"]),
        (["runs/here"], ["unexpected argument 'runs/here'"]),
        (["--config.data.batchsize=3"], ["no key config.data.batchsize", "did you mean config.data.batch_size?"]),
        (["--config.dat.batch_size=3"], ["no key config.dat;", "did you mean config.data?"]),
        (["--config.log.zzz=3"], ["no key config.log.zzz", "the keys of config.log are completions, every, tensorboard, wandb"]),
        (["--config.optim=3"], ["config.optim is a section", "config.optim.learning_rate"]),
        (["--config.seed.x=3"], ["config.seed is a value"]),
        (["--config.data.batch_size=many"], ["config.data.batch_size must be a whole number", "not 'many'"]),
        (["--config.data.batch_size=None"], ["config.data.batch_size must be a whole number", "not 'None'"]),
        (["--config.data.batch_size=3.5"], ["config.data.batch_size must be a whole number", "not '3.5'"]),
        (["--config.optim.learning_rate", "fast"], ["config.optim.learning_rate must be a number", "not 'fast'"]),
        (["--config.checkpoint.export=perhaps"], ["config.checkpoint.export must be true or false", "not 'perhaps'"]),
    ],
)
def test_command_line(tmp_path, argv, phrases):
    if any(argument.startswith("--config.") for argument in argv):
        argv = ["--config=configs/dpo_llava.py:tiny", f"--workdir={tmp_path}", *argv]
    elif argv == ["runs/here"]:
        argv = [*arguments(tmp_path), *argv]
    refused(tmp_path, *phrases, argv=argv)


@pytest.mark.parametrize(
    ("given", "clipped"), [(["None"], None), (["0.3", "None"], None), (["None", "0.3"], 0.3), ([], 0.2)], ids=str
)
def test_a_setting_that_may_be_none_is_set_to_none(monkeypatch, given, clipped):
    """What `--help` prints of it, `--config.algorithm.cliprange_value=None` among others, can be given back; the last of several counts."""
    forget_flags()
    settings = [f"--config.algorithm.cliprange_value={value}" for value in given]
    monkeypatch.setattr(sys, "argv", ["main", "--config=configs/ppo_llama3.py", *settings, "--config.data.packed_length=None"])
    commandline.parse(sys.argv)
    config = flags.FLAGS.config
    assert (config.algorithm.cliprange_value, config.data.packed_length) == (clipped, None)


@pytest.mark.parametrize(
    ("key", "value", "phrases"),
    [
        ("data.batch_size", 6, ["config.data.batch_size 6 cannot be divided", "config.train.accumulate=4", "a multiple of 32"]),
        ("data.batch_size", 0, ["config.data.batch_size is 0; it must be at least 1"]),
        ("data.batch_size", 10**20, ["config.data.batch_size is 100000000000000000000; it must be below 2^31"]),
        ("generation.batch_size", 0, ["config.generation.batch_size is 0; it must be at least 1"]),
        ("data.max_bad_fraction", 5.0, ["config.data.max_bad_fraction is 5.0", "from 0 to 1"]),
        ("seed", -1, ["config.seed is -1"]),
        ("optim.learning_rate", "nan", ["config.optim.learning_rate is nan; it must be at least 0"]),
        ("optim.learning_rate", "inf", ["config.optim.learning_rate is inf", "finite"]),
        ("optim.schedule", "cosin", ["'cosin' is not a schedule", "did you mean 'cosine'?", "constant, linear, cosine"]),
        ("optim.freeze", "visoin_tower/.*", ["config.optim.freeze", "'visoin_tower/.*'", "matches no parameter", "model/"]),
        ("optim.freeze", "(", ["config.optim.freeze has '('", "no regex"]),
        ("optim.freeze", ".*", ["matches every parameter", "nothing would train"]),
        ("optim.groups", 3, ["config.optim.groups holds 3", "a pair (regex,"]),
        ("optim.groups", "(('lm_haed', {'learning_rate': 2.0}),)", ["config.optim.groups has 'lm_haed'", "matches no parameter"]),
        ("optim.groups", "(('.*', {'lr': 2.0}),)", ["'.*' sets 'lr'", "learning_rate and weight_decay"]),
        ("reference.kind", "frozen", ["config.reference.kind is 'frozen'", "precomputed, copy"]),
        ("reference.model", "nowhere/", ["nowhere"]),
        ("algorithm.name", "dppo", ["dppo", "dpo"]),
        ("train.remat", "ful", ["config.train.remat is 'ful'", "none", "full"]),
        ("model.dtype", "fp16", ["config.model.dtype is 'fp16'", "bfloat16"]),
        ("model.dtype", "float64", ["config.model.dtype float64 needs", "JAX_ENABLE_X64=1"]),
        ("model.path", "", ["config.model.path is empty"]),
        ("data.train.path", "", ["config.data.train.path is empty"]),
        ("data.train.formatter", "rlaif", ["config.data.train.formatter", "'rlaif'", "did you mean 'rlaif_v'?"]),
        ("data.train.size", 0, ["config.data.train.size is 0"]),
        ("data.max_length", 20, ["too long: 160", "config.data.max_length is 20", "none is left"]),
        ("mesh.fsdp", 3, ["config.mesh", "'fsdp': 3", "devices"]),
        ("mesh.data", 0, ["config.mesh", "must be positive"]),
        ("mesh.sequence", 8, ["tensor x sequence = 8 devices", "heads of keys", "make the product a divisor of"]),
        ("setup", "scripts.nothing:make", ["config.setup 'scripts.nothing:make' cannot be imported"]),
        ("setup", ":", ["config.setup ':' cannot be imported"]),
    ],
)
def test_settings(tmp_path, key, value, phrases):
    more = {"train.accumulate": 4} if value == 6 else {}
    refused(tmp_path, *phrases, **{key: value, **more})
    assert not (tmp_path / "run" / "config.json").exists(), "a first try that fails must leave no run behind"


@pytest.mark.parametrize(
    "settings", [{"data.pad_to_multiple": 12}, {"data.packed_length": 1001, "data.packing": True}, {"data.max_length": 1001, "algorithm.name": "cpt"}]
)
def test_lengths_of_rows_that_cannot_be_cut(tmp_path, settings):
    """Every device would else do all of them, silently."""
    key, length = next(iter(settings.items()))
    refused(tmp_path, f"config.{key} {length} cannot be cut over config.mesh.sequence=8", **settings | {"mesh.sequence": 8})


def test_model_folders(tmp_path):
    model = demo() / "model"
    near = refused(tmp_path, "there is no folder", "did you mean", model__path=demo() / "modle")
    assert str(model) in near
    refused(tmp_path, "has no config.json", "no Hugging Face checkpoint folder", model__path=demo() / "data")

    other = tmp_path / "model"
    shutil.copytree(model, other)
    weights = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(tmp_path, str(other / "model.safetensors"), "is corrupt or cut short", model__path=other)
    (other / "model.safetensors").write_bytes(b"not weights at all")
    refused(tmp_path, str(other / "model.safetensors"), "is corrupt or cut short", model__path=other)
    (other / "model.safetensors").unlink()
    refused(tmp_path, f"{other} holds no weights", model__path=other)

    config = json.loads((other / "config.json").read_text())

    def changed(*phrases, **settings):
        (other / "config.json").write_text(json.dumps(config | settings))
        refused(tmp_path, str(other / "config.json"), *phrases, model__path=other)

    changed("model_type 'llava_nxt', which is not supported", "supported, nearest first: llava_next", model_type="llava_nxt")
    changed("rope_type 'zigzag' is not supported", text_config=config["text_config"] | {"rope_parameters": {"rope_type": "zigzag"}})
    changed("'hidden_size'", "'big'", text_config=config["text_config"] | {"hidden_size": "big"})
    changed("vision_feature_layer -9", "has 2 layers", vision_feature_layer=-9)


def test_another_reference(tmp_path):
    """A reference of another shape is refused by its headers."""
    from scripts.make_tiny_checkpoint import make_llava

    make_llava(tmp_path / "larger", vocab_size=384, hidden_size=64, layers=1, heads=2, kv_heads=2, vision_hidden_size=16,
               vision_layers=2, vision_heads=2)  # fmt: skip
    refused(tmp_path, "config.reference.model", "not of the same shape", reference__model=tmp_path / "larger")


def test_data_files(tmp_path):
    said = refused(tmp_path, "does not exist", "did you mean", data__train__path=demo() / "data" / "trian.jsonl")
    assert str(demo() / "data" / "train.jsonl") in said
    refused(tmp_path, "config.data.train.image_folder", "is no folder", data__train__image_folder=demo() / "data" / "picture")

    rows = [json.loads(line) for line in (demo() / "data" / "train.jsonl").read_text().splitlines()[:20]]
    file = tmp_path / "rows.jsonl"
    here = {"data__train__path": file, "data__train__image_folder": demo() / "data"}

    file.write_text("".join(json.dumps({"picture": r["image"], "good": r["chosen"], "bad": r["rejected"]}) + "\n" for r in rows))
    refused(tmp_path, "the rows have the columns picture, good, bad", "'trl' needs chosen, rejected", **here)

    file.write_text("{}\n")
    refused(tmp_path, "the rows have no columns", **here)
    refused(tmp_path, "is a file, no folder", data__train__image_folder=file)

    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]) + '{"image": "x.png", "question": \n')
    refused(tmp_path, f"{file}, line 4: not valid JSON", **here)

    file.write_text("".join(json.dumps(row | ({"image": "missing.png"} if i < 3 else {})) + "\n" for i, row in enumerate(rows)))
    refused(tmp_path, "config.data.train: 3 of 20 rows", "max_bad_fraction allows 5.0%", "unreadable image: 3 (rows 0, 1, 2",
            "missing.png: does not exist", **here)  # fmt: skip


def test_image_that_does_not_decode(tmp_path):
    data = tmp_path / "data"
    shutil.copytree(demo() / "data", data)
    broken = sorted((data / "pictures" / "train").glob("*.png"))
    for picture in broken[:10]:
        picture.write_bytes(picture.read_bytes()[:60])
    Image.new("RGB", (8, 8)).save(broken[11])  # another size is no fault
    here = {"data.train.path": data / "train.jsonl"}
    refused(tmp_path, "10 of 160 rows", "unreadable image: 10 (rows 0, 1, 2, ..", "pictures/train/00000.png", **here)
    with pytest.raises(AssertionError, match="parameters were loaded"):  # nothing is wrong with it where a tenth may be bad
        call(*arguments(tmp_path / "run", here | {"data.max_bad_fraction": 0.1}))


def test_workdir_of_another_run(tmp_path, monkeypatch):
    """What differs is named, with both values; what may differ is no error."""
    from aligner import workdir

    forget_flags()
    monkeypatch.setattr(sys, "argv", ["main", *arguments(tmp_path / "run")])
    main.parse(sys.argv)
    config = workdir.resolve(main.CONFIG.value, tmp_path / "run")
    workdir.record(config, tmp_path / "run")
    with pytest.raises(AssertionError, match="parameters were loaded"):  # nothing was learned yet: memory was too small, say
        call(*arguments(tmp_path / "run", {"optim.learning_rate": 0.25}))
    workdir.record(config, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "split": "train"}\n')
    said = refused(tmp_path, "belongs to a run with another config", "config.optim.learning_rate was 0.0005 and is 0.5",
                   "Use another --workdir", optim__learning_rate=0.5, checkpoint__every=7)  # fmt: skip
    assert "checkpoint.every" not in said
    config.checkpoint.every, config.train.steps = 7, 99
    assert workdir.check(config, tmp_path / "run") == [
        "config.checkpoint.every was 5 and is now 7",
        "config.train.steps was 22 and is now 99",
    ]
    for broken in ("{", "[]"):
        (tmp_path / "run" / "config.json").write_text(broken)
        refused(tmp_path, "config.json cannot be read")
    (tmp_path / "file").write_text("")
    refused(tmp_path, "is a file; name a folder", argv=arguments(tmp_path / "file"))
    refused(tmp_path, "file/below cannot be made (Not a directory)", argv=arguments(tmp_path / "file" / "below"))


def test_workdir_of_an_earlier_aligner(tmp_path, monkeypatch):
    """Settings that the earlier one did not have count as their defaults: leaving them is no change, setting them is one."""
    from aligner import workdir

    forget_flags()
    monkeypatch.setattr(sys, "argv", ["main", *arguments(tmp_path / "run")])
    main.parse(sys.argv)
    before = workdir.resolve(main.CONFIG.value, tmp_path / "run").to_dict()
    del before["data"]["chat_template"], before["data"]["train"]["mixture"], before["quant"], before["data"]["loss_on"]
    workdir.write_json(tmp_path / "run" / "config.json", before)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "split": "train"}\n')
    said = refused(tmp_path, "another config: config.data.loss_on was 'assistant' and is 'all'. Use", data__loss_on="all")
    assert "chat_template" not in said
    assert workdir.read_config(tmp_path / "run")["quant"] == {"base": ""}

    workdir.write_json(tmp_path / "run" / "config.json", before)
    with pytest.raises(AssertionError, match="parameters were loaded"):  # nothing is wrong with it
        call(*arguments(tmp_path / "run"))
    refused(tmp_path, "config.data.train.template.enable_thinking was None and is False", argv=[
        f"--config={with_template(tmp_path)}", *arguments(tmp_path / "run")[1:]])  # fmt: skip


def test_workdir_with_settings_that_its_algorithm_never_read(tmp_path, capsys):
    """They are gone, and do not stop a run; those of another algorithm, whose command was given by mistake, stay in its record."""
    from aligner import workdir
    from configs import common

    config = common.base()
    config.algorithm = common.online_dpo()
    before = workdir.resolve(config, tmp_path).to_dict()
    before["algorithm"] |= dict(epsilon=0.2, epsilon_high=None, entropy_coef=0.0)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train"}\n')
    workdir.write_json(tmp_path / "config.json", before)
    workdir.bring_up_to_date(tmp_path, config)
    told = "which online_dpo never read, are gone: config.algorithm.epsilon, config.algorithm.epsilon_high, config.algorithm.entropy_coef"
    assert told in capsys.readouterr().err
    assert workdir.check(workdir.resolve(config, tmp_path), tmp_path) == []

    before["algorithm"] |= dict(name="grpo", epsilon=0.3)
    workdir.write_json(tmp_path / "config.json", before)
    workdir.bring_up_to_date(tmp_path, config)
    assert workdir.read_config(tmp_path)["algorithm"]["epsilon"] == 0.3


def with_template(tmp_path):
    """A config file that sets an argument of the chat template: a name of one's own, not one that an earlier aligner lacked."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from configs import dpo_llava\n\ndef get_config():\n    config = dpo_llava.get_config('tiny').unlock()\n"
        "    config.data.train.template.enable_thinking = False\n    return config.lock()\n"
    )
    return file


def test_a_path_may_be_written_another_way(tmp_path, monkeypatch):
    """As the shell completes it, with a slash at its end, or from the root: the run is the same."""
    from aligner import workdir
    from configs import dpo_llava

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine" / "demo" / "model").mkdir(parents=True)
    config = dpo_llava.get_config("tiny")
    workdir.record(workdir.resolve(config, "runs/mine"), "runs/mine")
    (tmp_path / "runs" / "mine" / "metrics.jsonl").write_text('{"step": 1, "split": "train"}\n')
    before = workdir.read_config("runs/mine")["model"]["path"]
    for other in ("runs/mine/", tmp_path / "runs" / "mine"):
        now = workdir.resolve(config, other)
        assert now.model.path != before
        now.data = workdir.resolve(config, "runs/mine").data  # files that were not made here
        assert workdir.check(now, other) == []
    (tmp_path / "another").mkdir()
    with now.unlocked():
        now.model.path = "another"
    with pytest.raises(UserError, match=r"config\.model\.path was 'runs/mine/demo/model' and is 'another'"):
        workdir.check(now, "runs/mine")


def test_rows_without_images_are_told(tmp_path, capsys):
    """A column of another name would leave the pictures out of training without a word."""
    rows = [json.loads(line) for line in (demo() / "data" / "train.jsonl").read_text().splitlines()[:20]]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"img" if key == "image" else key: row[key] for key in row}) + "\n" for row in rows))
    said = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError, match="parameters were loaded"):
        patch.setattr(run, "say", lambda *lines: said.extend(lines))
        call(*arguments(tmp_path / "run", {"data.train.path": file}))
    assert "  20 rows without an image: no row has one in a column `image` or `images`" in said


def test_ctrl_c_before_there_is_a_state(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", interrupted)
    monkeypatch.setattr(main.os, "_exit", sys.exit)
    code, told = call(*arguments(tmp_path / "run"))
    assert (code, told.strip()) == (130, "stopped at once; the same command goes on from the newest checkpoint")


def test_the_second_ctrl_c_shows_nothing_of_the_save_that_it_broke_off():
    """Orbax's threads go on with it while the interpreter ends, where they find nothing any more."""
    program = """
import threading
from aligner import main
def work(argv):
    wait = threading.Event()
    threading.Thread(target=lambda: wait.wait(1) or 1 / 0).start()  # a save that fails once its run has gone
    raise KeyboardInterrupt
main.cli(work)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (130, "stopped at once; the same command goes on from the newest checkpoint\n")


def test_ctrl_c_ends_any_command_with_a_word(capsys):
    """Those that save nothing between; `plan`, `preview`, `convert`, `data` and the rest end by the same function."""

    def interrupted():
        raise KeyboardInterrupt

    assert commandline.ended(interrupted, stopped="stopped half way") == 130
    assert capsys.readouterr() == ("", "stopped half way\n")
    assert commandline.ended(lambda: None) == 0 and commandline.ended(lambda: 1) == 1


def test_as_a_program(tmp_path):
    """The same in a process of its own, as a user calls it."""
    command = [sys.executable, "-m", "aligner.main", "--config=configs/dpo_llava.py:tiny", f"--workdir={tmp_path}"]
    done = subprocess.run([*command, "--config.data.batchsize=3"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: the config has no key config.data.batchsize; did you mean config.data.batch_size?\n"
    shown = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "Train a model as a config file says." in shown.stdout
    assert "--workdir" in shown.stdout and "--config.optim.learning_rate=0.0005" in shown.stdout and shown.returncode == 0


@pytest.mark.parametrize("program", ["aligner.preview", "aligner.iterate"])
def test_a_reader_who_leaves_is_no_fault(program):
    """`python -m aligner.preview --help | head -1`."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", program, "--help"], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, timeout=300)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_another_broken_pipe_is_a_fault():
    def lost():
        raise BrokenPipeError(32, "Broken pipe")  # of a server, say

    with pytest.raises(BrokenPipeError):
        commandline.ended(lost)


def test_a_save_that_failed_ends_the_process_at_once(monkeypatch, capsys):
    """Without waiting for Orbax's threads, some of which would wait for minutes."""
    ended = []

    def fail(*args, **kwargs):
        raise SaveError("a checkpoint could not be written")

    monkeypatch.setattr(main.app, "run", fail)
    monkeypatch.setattr(main.os, "_exit", ended.append)
    with pytest.raises(SystemExit):
        main.cli()
    assert ended == [2] and "error: a checkpoint could not be written" in capsys.readouterr().err


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_any_program_that_trains_tells_that_it_was_stopped(monkeypatch, capsys, number, code):
    """`aligner.iterate`, too, whose rounds are runs."""

    def stop(*args, **kwargs):
        raise Stopped(number)

    monkeypatch.setattr(main.app, "run", stop)
    monkeypatch.setattr(main, "WORKDIR", SimpleNamespace(value="runs/rounds"))
    monkeypatch.setattr(main, "CONFIG", SimpleNamespace(value=common.base()))
    main.CONFIG.value.checkpoint.requeue_code = 75
    with pytest.raises(SystemExit) as end:
        main.cli(lambda argv: 0)
    assert end.value.code == code and capsys.readouterr().err == "stopped; the same command goes on from here: runs/rounds\n"
