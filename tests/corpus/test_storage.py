"""Files of an object store: the same documents as from a folder; what a store refuses is one error without a secret."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter, sleep

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs
from pydantic import ValidationError

from raymill.corpus.document import Document
from raymill.corpus.readers import ReadLimits, read
from raymill.corpus.sources import Source, fingerprint, group, list_files
from raymill.errors import DataError, RaymillError, UsageError

LIMITS = ReadLimits(1000, 1 << 20)
ROWS = b"".join(json.dumps({"text": f"row {row}"}).encode() + b"\n" for row in range(300))


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[fs.S3FileSystem]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    store = fs.S3FileSystem(endpoint_override=endpoint, scheme="http", region="us-east-1", allow_bucket_creation=True)
    store.create_dir("shelf")
    write(store, "shelf/books/rows.jsonl", ROWS)
    write(store, "shelf/books/deep/a b.txt", b"in a folder")
    write(store, "shelf/books/deep/photo.jpg", b"no text")
    write(store, "shelf/books/.hidden.txt", b"hidden")
    with store.open_output_stream("shelf/books/t.parquet") as sink:
        pq.write_table(pa.table({"text": ["one", "two"]}), sink)
    yield store


def write(store: fs.S3FileSystem, path: str, content: bytes) -> None:
    with store.open_output_stream(path) as sink:
        sink.write(content)


def uri(endpoint: str, path: str) -> str:
    return f"s3://{path}?endpoint_override={endpoint}&scheme=http&region=us-east-1"


def names(endpoint: str, path: str) -> list[str]:
    return [file.name for file in list_files([Source(path=uri(endpoint, path))])]


def test_folders_globs_and_single_files(endpoint: str, bucket: fs.S3FileSystem) -> None:
    everything = ["deep/a b.txt", "rows.jsonl", "t.parquet"]
    assert names(endpoint, "shelf/books") == names(endpoint, "shelf/books/") == everything
    assert names(endpoint, "shelf") == [f"books/{name}" for name in everything]
    assert names(endpoint, "shelf/books/rows.jsonl") == ["rows.jsonl"]
    assert names(endpoint, "shelf/books/*.jsonl") == ["rows.jsonl"]
    assert names(endpoint, "shelf/books/**/*.[tp]*") == ["deep/a b.txt", "t.parquet"]
    assert names(endpoint, "shelf/b*") == [f"books/{name}" for name in everything]


def test_the_same_documents_as_from_a_folder(endpoint: str, bucket: fs.S3FileSystem, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in names(endpoint, "shelf/books"):
        (tmp_path / name).write_bytes(bucket.open_input_stream(f"shelf/books/{name}").read())
    found = []
    for path in (uri(endpoint, "shelf/books"), str(tmp_path)):
        shards = group(list_files([Source(path=path, name="s")]), 700)
        assert len(shards) > 5
        found.append([record for shard in shards for file in shard.files for record in read(file, LIMITS)])
    assert found[0] == found[1]
    assert all(isinstance(record, Document) for record in found[0])
    assert len(found[0]) == 303


def test_an_object_that_changed_is_noticed(endpoint: str, bucket: fs.S3FileSystem) -> None:
    write(bucket, "shelf/one/a.txt", b"before")
    listed = list_files([Source(path=uri(endpoint, "shelf/one"))])
    write(bucket, "shelf/one/a.txt", b"and after")
    with pytest.raises(DataError, match=r"s3://shelf/one/a.txt changed while it was read"):
        list(read(listed[0], LIMITS))
    assert fingerprint(listed) != fingerprint(list_files([Source(path=uri(endpoint, "shelf/one"))]))


def test_what_is_not_there(endpoint: str, bucket: fs.S3FileSystem) -> None:
    with pytest.raises(UsageError, match=r"there is no s3://shelf/nowhere\n"):
        list_files([Source(path=uri(endpoint, "shelf/nowhere"))])
    with pytest.raises(RaymillError) as caught:
        list_files([Source(path=uri(endpoint, "no-such-bucket/x/*.txt"))])
    assert "no-such-bucket" in str(caught.value)
    assert "?" not in caught.value.what


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: every connection is refused
        begin = perf_counter()
        with pytest.raises(DataError) as caught:
            list_files([Source(path=uri(f"127.0.0.1:{closed.getsockname()[1]}", "shelf/books"))])
    assert perf_counter() - begin < 60
    message = str(caught.value)
    assert "prepare.sources: s3://shelf/books cannot be read" in message
    assert "check the endpoint" in message
    assert "hush" not in message
    assert "AKIA" not in message
    assert len(message) < 600


def test_a_store_that_accepts_and_stays_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    from raymill.corpus import storage

    monkeypatch.setattr(storage, "_ANSWER_TIMEOUT_S", 1.0)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begin = perf_counter()
        with pytest.raises(DataError, match=r"no answer within 1 s"):
            list_files([Source(path=uri(f"127.0.0.1:{silent.getsockname()[1]}", "shelf/books"))])
    assert perf_counter() - begin < 10


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://AKIAKEY:hush@shelf/x", "carries credentials"),
        ("s3://shelf/x?secret_key=hush", "carries credentials"),
        ("abfs://box:hush@account.dfs.core.windows.net/x", "carries credentials"),
        ("gs://hush@shelf/x", "carries credentials"),
        ("s3://anonymous@shelf/x", "carries credentials"),
        ("s3://key:hu/hush@shelf/x", "carries credentials"),
        ("s3://key:h?hush@shelf/x", "carries credentials"),
        ("s3://shelf/x?endpoint_override=http://u:hush@h", "carries credentials"),
        ("s3://shelf/x?endpoint_override=http%3A%2F%2Fu%3Ahush%40h", "carries credentials"),
        ("s3://shelf/x?endpoint_override=u:hu/hush@h&scheme=http", "carries credentials"),
        ("abfs://box@account.dfs.core.windows.net/x?client_secret=hush", "carries credentials"),
        ("s3://shelf/x?region=a&colour=hush", r"the option colour of s3://shelf/x is not known"),
        ("gs://shelf/x?region=hush", r"the option region of gs://shelf/x is not known"),
        ("abfs://box@account.dfs.core.windows.net/x?sv=hush", r"the option sv of abfs://box@account\.dfs"),
        ("s3://shelf/x?region=a&hush", r"an option of s3://shelf/x has no value"),
        ("s3://shelf/x?AKIAhush=1", r"an option of s3://shelf/x is not known"),
        ("https://example.com/x.jsonl", "no place text is read from"),
        ("hf://models/a/b", "names no dataset"),
        ("hf://datasets/a", "names no dataset"),
    ],
)
def test_uris_that_are_refused(path: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        Source(path=path)
    assert "hush" not in caught.value.errors()[0]["msg"]


@pytest.mark.parametrize(
    "path",
    [
        "s3://shelf/x?region=us-east-1&scheme=http&endpoint_override=h:1&tls_ca_file_path=/a@b/c.pem",
        "gs://anonymous@shelf/x?project_id=p",
        "abfs://box@account.dfs.core.windows.net/x?enable_tls=false&credential_kind=anonymous",
    ],
)
def test_options_that_are_known(path: str) -> None:
    assert Source(path=path).shown == path.partition("?")[0].replace("anonymous@", "")


def test_a_question_mark_is_any_character_and_a_hash_is_itself(endpoint: str, bucket: fs.S3FileSystem) -> None:
    for name in ("a#1.txt", "a#2.txt", "a#10.txt", "b?x=1.txt"):
        write(bucket, f"shelf/marks/{name}", name.encode())
    assert names(endpoint, "shelf/marks/a#?.txt") == ["a#1.txt", "a#2.txt"]
    assert names(endpoint, "shelf/marks/?#10.txt") == ["a#10.txt"]
    assert names(endpoint, "shelf/marks/b[?]x=1.txt") == ["b?x=1.txt"]
    (file,) = list_files([Source(path=uri(endpoint, "shelf/marks/a#1.txt"))])
    assert [record.text for record in read(file, LIMITS) if isinstance(record, Document)] == ["a#1.txt"]
    assert (file.shown, Source(path="s3://shelf/a#?.txt?region=x").shown) == (
        "s3://shelf/marks/a#1.txt",
        "s3://shelf/a#?.txt",
    )


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("abfs://box@account.dfs.core.windows.net/a%20b/c#?.txt?enable_tls=false", "box/a b/c#?.txt"),
        ("abfs://account.dfs.core.windows.net/box/a", "box/a"),
        ("abfs://box@account.dfs.core.windows.net", "box"),
    ],
)
def test_the_path_within_an_azure_store(path: str, expected: str) -> None:
    from raymill.corpus import storage

    assert storage._connect(path)[1] == expected


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset as the hub's client keeps it: blobs, a snapshot of links to them, and what main stands for."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    repo = cache / "datasets--acme--books"
    snapshot = repo / "snapshots" / ("0" * 40)
    (snapshot / "data").mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    for name, content in (
        ("data/train.jsonl", ROWS),
        ("data/test.jsonl", ROWS[: ROWS.index(b"9") + 3]),
        ("README.md", b"# Books"),
    ):
        blob = repo / "blobs" / name.replace("/", "-")
        blob.write_bytes(content)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("hf://datasets/acme/books", ["README.md", "data/test.jsonl", "data/train.jsonl"]),
        ("hf://datasets/acme/books@main/data/tr*.jsonl", ["data/train.jsonl"]),
        ("hf://datasets/acme/books/**/*.jsonl", ["data/test.jsonl", "data/train.jsonl"]),
        ("hf://datasets/acme/books/data", ["data/test.jsonl", "data/train.jsonl"]),
    ],
)
def test_a_dataset_in_the_hubs_cache(hub_cache: Path, path: str, expected: list[str]) -> None:
    files = list_files([Source(path=path)])
    assert [file.name for file in files] == expected
    assert files[0].source == "books" if path.endswith("books") else True
    assert all(isinstance(record, Document) for file in files for record in read(file, LIMITS))


def test_a_dataset_that_is_not_in_the_cache(hub_cache: Path) -> None:
    with pytest.raises(DataError, match=r"hf://datasets/acme/films cannot be had(.|\n)*HF_HUB_OFFLINE"):
        list_files([Source(path="hf://datasets/acme/films")])
