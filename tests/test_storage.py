"""Paths and URLs, atomic writes, and shards read from a real HTTP server."""

import functools
import http.server
import threading

import pytest
import torch

from audiotext_dist import storage
from audiotext_dist.data.index import load_shards
from audiotext_dist.data.loader import EvaluationBatches, iterate
from audiotext_dist.data.sets import DataConfig
from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError
from tests.clips import SAMPLE_RATE_HZ, make_sample, write_shards


@pytest.fixture
def folder(tmp_path):
    for name in ("00000.tar", "00001.tar", "00010.tar", "00000.index.json"):
        (tmp_path / name).write_bytes(b"")
    return str(tmp_path)


@pytest.fixture
def server(tmp_path):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("", ["00000.tar", "00001.tar", "00010.tar"]),
        ("/", ["00000.tar", "00001.tar", "00010.tar"]),
        ("/0000*.tar", ["00000.tar", "00001.tar"]),
        ("/000{00..01}.tar", ["00000.tar", "00001.tar"]),
        ("/00010.tar", ["00010.tar"]),
    ],
)
def test_shards_are_named_by_folder_glob_braces_or_file(folder, pattern, names):
    assert storage.expand(folder + pattern, ".tar") == [f"{folder}/{name}" for name in names]


def test_two_specs_are_joined_by_colons(folder):
    spec = f"{folder}/00010.tar::{folder}/00000.tar"
    assert storage.expand(spec, ".tar") == [f"{folder}/00010.tar", f"{folder}/00000.tar"]


@pytest.mark.parametrize("pattern", ["/nowhere", "/*.zip", "/00002.tar", "/000{00..03}.tar"])
def test_what_is_not_there_is_named(folder, pattern):
    with pytest.raises(UserError, match="no "):
        storage.expand(folder + pattern, ".tar")


def test_credentials_stay_out_of_names():
    assert storage.public_name("s3://key:secret@bucket/a.tar") == "s3://bucket/a.tar"
    assert storage.public_name("https://host/a.tar?X-Signature=secret") == "https://host/a.tar"
    assert storage.public_name("/folder/a?b.tar") == "/folder/a?b.tar"


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "file"
    storage.write_bytes(str(path), b"old")

    def fail():
        with storage.atomic_local_file(path) as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_shards_on_a_server_give_the_local_clips_and_are_fetched_once(tmp_path, server, monkeypatch):
    local = write_shards(tmp_path / "set", [[make_sample(4 * shard + row) for row in range(4)] for shard in range(2)])
    monkeypatch.setattr(storage.local_copy, "__defaults__", (str(tmp_path / "cache"),))
    data = DataConfig(sample_rate_hz=SAMPLE_RATE_HZ, clip_seconds=1.0)
    decode = data.decode_config(frames="none", frame_pixels=0, random=False)

    def batches(spec):
        found = EvaluationBatches(load_shards(spec), decode, world=World(), batch_size=3)
        return list(iterate(found, range(len(found)), num_workers=0, device=torch.device("cpu")))

    for here, there in zip(batches(local), batches(f"{server}/set/{{00000..00001}}.tar"), strict=True):
        assert here.keys == there.keys
        assert torch.equal(here.waveform_BS, there.waveform_BS)
    fetched = {path.name: path.stat().st_ino for path in (tmp_path / "cache").glob("*.tar")}
    batches(f"{server}/set/{{00000..00001}}.tar")
    assert len(fetched) == 2
    assert fetched == {path.name: path.stat().st_ino for path in (tmp_path / "cache").glob("*.tar")}
