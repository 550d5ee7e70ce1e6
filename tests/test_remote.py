"""A workdir in a bucket, here one in memory and one on disk: what is copied when, and what another machine finds."""

import json

import fsspec
import pytest

from aligner import remote, workdir
from aligner.types import UserError


def checkpoint(folder, step, whole=True):
    """What a save leaves: files, and their checksums when it is complete."""
    path = folder / "checkpoints" / str(step) / "d" / "data"
    path.parent.mkdir(parents=True)
    path.write_text(f"weights of step {step}")
    if whole:
        (folder / "checksums").mkdir(exist_ok=True)
        (folder / "checksums" / f"{step}.json").write_text("{}")


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["memory", "file"])
def bucket(request, tmp_path):
    """(address, file system, root)."""
    url = f"memory://{tmp_path.name}/runs/mine" if request.param == "memory" else f"file://{tmp_path}/bucket/runs/mine"
    return url, *remote._open(url)


def machine(monkeypatch, tmp_path, name):
    """Another home folder."""
    monkeypatch.setenv("HOME", str(tmp_path / name))


def test_another_machine_goes_on(bucket, tmp_path, monkeypatch):
    url, fs, root = bucket
    machine(monkeypatch, tmp_path, "one")
    with remote.local(url) as folder:
        folder = remote.folder_of(url)
        checkpoint(folder, 5)
        checkpoint(folder, 10)
        checkpoint(folder, 15, whole=False)
        (folder / "metrics.jsonl").write_text("lines")
        (folder / "config.json.host.1.tmp").write_text("half")
        here = contents(folder)
    there = {name: text for name, text in here.items() if not name.startswith("checkpoints/15") and not name.endswith(".tmp")}
    assert {name.removeprefix(root).lstrip("/"): fs.cat(name).decode() for name in fs.find(root)} == there

    machine(monkeypatch, tmp_path, "two")
    with remote.local(f"{url}/") as folder:
        assert contents(remote.folder_of(url)) == there
        (remote.folder_of(url) / "metrics.jsonl").write_text("more lines")
        for part in ("checkpoints/5/d/data", "checksums/5.json"):  # retention
            (remote.folder_of(url) / part).unlink()
    assert not [name for name in fs.find(root) if "5" in name.removeprefix(root)]
    assert fs.cat(f"{root}/metrics.jsonl") == b"more lines"

    machine(monkeypatch, tmp_path, "one")  # the first machine again, whose folder is as new: it stays
    with remote.local(url):
        assert contents(remote.folder_of(url)) == here


def test_half_a_copy_is_not_used(bucket, tmp_path, monkeypatch):
    """A checkpoint without its checksums, which are copied last, was cut off by a kill."""
    url, fs, root = bucket
    machine(monkeypatch, tmp_path, "one")
    with remote.local(url):
        checkpoint(remote.folder_of(url), 5)
        checkpoint(remote.folder_of(url), 10)
    fs.rm_file(f"{root}/checksums/10.json")
    machine(monkeypatch, tmp_path, "two")
    with remote.local(url):
        assert contents(remote.folder_of(url)).keys() == {"checkpoints/5/d/data", "checksums/5.json"}
    assert not [name for name in fs.find(root) if "checkpoints/10" in name]  # nobody will ask for it


def test_copied_in_the_order_that_a_kill_allows(tmp_path):
    """Whatever is there when the copying stops, the newest whole checkpoint has its lines of metrics, and its files before its checksums."""
    order = []

    class Recorder:
        def put_file(self, here, there):
            order.append(there)

    checkpoint(tmp_path, 5)
    (tmp_path / "metrics.jsonl").write_text("lines")
    sent = {}
    assert remote.new_checkpoint(tmp_path, sent)
    remote.push(tmp_path, Recorder(), "there", sent)
    assert order == ["there/metrics.jsonl", "there/checkpoints/5/d/data", "there/checksums/5.json"]
    assert not remote.new_checkpoint(tmp_path, sent)
    remote.push(tmp_path, Recorder(), "there", sent)
    assert len(order) == 3, "nothing was new"


def test_refused(tmp_path, monkeypatch):
    with remote.local(str(tmp_path / "plain")) as folder:
        assert folder == str(tmp_path / "plain") and not (tmp_path / "plain").exists()
    with pytest.raises(UserError, match="--workdir nosuch://bucket/run cannot be read: Protocol not known: nosuch"), remote.local("nosuch://bucket/run"):
        pass
    with pytest.raises(UserError, match="gs://bucket/run is remote, and only training works with that"):
        workdir.read_config("gs://bucket/run")
    machine(monkeypatch, tmp_path, "one")

    def refuse(self, *args, **more):
        raise PermissionError("no right to write")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "put_file", refuse)
    url = f"memory://{tmp_path.name}/run"
    with pytest.raises(UserError, match=r"could not be written \(no right to write\); all of it is in .*one"), remote.local(url):
        remote.folder_of(url).mkdir(parents=True)
        (remote.folder_of(url) / "config.json").write_text(json.dumps({}))
