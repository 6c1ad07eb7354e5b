"""Paths, URLs and atomic writes."""

import os
import subprocess
import sys

import pytest
import trustme

from audiotext_dist import storage
from audiotext_dist.errors import UserError
from tests.web import web_server


@pytest.fixture
def folder(tmp_path):
    for name in ("00000.tar", "00001.tar", "00010.tar", "00000.index.json"):
        (tmp_path / name).write_bytes(b"")
    return str(tmp_path)


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
    assert storage.public_name("s3://key:sec/r+et@bucket/a.tar") == "s3://bucket/a.tar"
    assert storage.public_name("https://host:8080/v@1/a.tar") == "https://host:8080/v@1/a.tar"
    assert storage.public_name("s3://bucket/v@1/a.tar") == "s3://bucket/v@1/a.tar"
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


def test_a_web_server_is_believed_by_its_certificate_only(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "a.tar").write_bytes(b"12345")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    code = (
        "import sys; from audiotext_dist import errors, storage; "
        "errors.run_for_people(lambda: print(len(storage.read_bytes(sys.argv[1]))))"
    )

    def read(address, **environment):
        # Another process, since Python reads the authorities once.
        return subprocess.run(
            [sys.executable, "-c", code, f"{address}/a.tar"],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    with web_server(tmp_path / "site", authority.issue_cert("127.0.0.1")) as address:
        known, unknown = read(address, SSL_CERT_FILE=str(tmp_path / "authority.pem")), read(address)
    assert known.stdout == "5\n", known.stderr
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr.startswith(f"error: cannot read {address}/a.tar ([SSL: CERTIFICATE_VERIFY_FAILED]")
    assert unknown.stderr.count("\n") == 1
