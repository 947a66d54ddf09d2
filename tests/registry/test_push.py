"""The way up: blobs and manifests, and what breaks on it."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path

import pytest

from lumed.errors import RegistryFailed
from lumed.images.auth import Credentials
from lumed.images.oci import OCI_MANIFEST, ConnectionLost, digest_of
from lumed.threads import Stopped
from tests.registry.faults import FaultProxy
from tests.registry.test_registry import connect, refer
from tests.registry.world import PASSWORD, USER, RunningRegistry

REPOSITORY = "org/deep/web"


class File:
    """A new file that no registry has, and its digest."""

    def __init__(self, folder: Path, size: int = 3_000_000) -> None:
        self.content = random.randbytes(size)  # noqa: S311
        self.path = folder / "blob"
        self.path.write_bytes(self.content)
        self.digest = digest_of(self.content)
        self.told: list[int] = []

    def is_stored(self, registry: RunningRegistry) -> bool:
        target = f"/v2/{REPOSITORY}/blobs/{self.digest}"
        status, _, body = registry.request("GET", target)
        return status == 200 and body == self.content


@pytest.fixture
def file(tmp_path: Path) -> File:
    """Three million bytes that no registry has."""
    return File(tmp_path)


def test_a_blob_and_a_manifest_arrive(registry: RunningRegistry, file: File) -> None:
    with connect(registry.host) as client:
        assert not client.has_blob(REPOSITORY, file.digest)
        client.upload_blob(REPOSITORY, file.path, file.digest, report=file.told.append)
        assert client.has_blob(REPOSITORY, file.digest)
        part = {"mediaType": "x/y", "digest": file.digest, "size": len(file.content)}
        body = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": part, "layers": [part]}
        raw = json.dumps(body).encode()
        digest = client.put_manifest(refer(registry.host, tag="up"), OCI_MANIFEST, raw)
        assert client.get_manifest(refer(registry.host, tag="up"), []).digest == digest
    assert digest == digest_of(raw)
    assert file.is_stored(registry)
    assert file.told == sorted(file.told)
    assert file.told[-1] == len(file.content)


def test_an_empty_blob_arrives(registry: RunningRegistry, tmp_path: Path) -> None:
    file = File(tmp_path, 0)
    with connect(registry.host) as client:
        client.upload_blob(REPOSITORY, file.path, file.digest, report=file.told.append)
        assert client.has_blob(REPOSITORY, file.digest)


def test_an_upload_goes_on_where_it_broke(
    proxy: FaultProxy, registry: RunningRegistry, file: File
) -> None:
    proxy.cut_upload(after=1_000_000, keep=True)
    proxy.cut_upload(after=1_500_000, keep=True)
    with connect(proxy.host) as client:
        client.upload_blob(REPOSITORY, file.path, file.digest, report=file.told.append)
    assert file.is_stored(registry)
    assert proxy.uploaded == len(file.content)
    ranges = [
        seen.headers.get("Content-Range") for seen in proxy.requests if seen.method == "PATCH"
    ]
    assert ranges == [None, "1000000-2999999", "2500000-2999999"]


def test_an_upload_that_the_registry_forgot_begins_again(
    proxy: FaultProxy, registry: RunningRegistry, file: File
) -> None:
    proxy.cut_upload(after=1_000_000)
    with connect(proxy.host) as client:
        client.upload_blob(REPOSITORY, file.path, file.digest, report=file.told.append)
    assert file.is_stored(registry)
    assert proxy.count("POST", "/uploads/") == 2
    assert 0 in file.told


def test_an_upload_that_always_breaks_is_given_up(proxy: FaultProxy, file: File) -> None:
    proxy.cut_upload(after=1_000_000, times=0)
    with connect(proxy.host) as client, pytest.raises(ConnectionLost):
        client.upload_blob(REPOSITORY, file.path, file.digest, report=file.told.append)
    assert proxy.count("PATCH", "/uploads/") == 5


def test_an_upload_that_always_gets_further_is_not_given_up(
    proxy: FaultProxy, registry: RunningRegistry, file: File
) -> None:
    proxy.cut_upload(after=300_000, times=9, keep=True)
    with connect(proxy.host) as client:
        client.upload_blob(REPOSITORY, file.path, file.digest, report=file.told.append)
    assert file.is_stored(registry)
    assert proxy.uploaded == len(file.content)


def test_a_busy_registry_gets_it_later(
    proxy: FaultProxy, registry: RunningRegistry, file: File
) -> None:
    for path in ("/blobs/uploads/", "/uploads/", "digest="):
        proxy.answer(path, 503, retry_after=0)
    with connect(proxy.host) as client:
        client.upload_blob(REPOSITORY, file.path, file.digest, report=file.told.append)
    assert file.is_stored(registry)


def test_a_lost_answer_to_the_last_request_is_no_failure(
    proxy: FaultProxy, registry: RunningRegistry, file: File
) -> None:
    # Its body is empty: what is lost is the whole answer.
    proxy.swallow("digest=")
    with connect(proxy.host) as client:
        client.upload_blob(REPOSITORY, file.path, file.digest, report=file.told.append)
    assert file.is_stored(registry)


def test_each_step_of_an_upload_can_need_a_new_token(
    proxy: FaultProxy, registry: RunningRegistry, file: File
) -> None:
    proxy.ask_token(uses=1, login=(USER, PASSWORD))
    with connect(proxy.host, credentials=Credentials(USER, PASSWORD)) as client:
        client.upload_blob(REPOSITORY, file.path, file.digest, report=file.told.append)
        assert client.has_blob(REPOSITORY, file.digest)
    assert file.is_stored(registry)
    # Of the four requests each came twice, the first time without or with a spent token.
    assert [proxy.count(method, "") for method in ("POST", "PATCH", "PUT")] == [2, 2, 2]


def test_one_token_does_for_the_question_and_the_push(proxy: FaultProxy, file: File) -> None:
    proxy.ask_token()
    with connect(proxy.host) as client:
        assert not client.has_blob(REPOSITORY, file.digest)
        client.upload_blob(REPOSITORY, file.path, file.digest, report=file.told.append)
    # Though the challenge to a HEAD asks for no more than pull.
    assert proxy.count("GET", "/token") == 1


def test_a_file_of_another_digest_is_refused_by_the_registry(
    registry: RunningRegistry, file: File
) -> None:
    with connect(registry.host) as client, pytest.raises(RegistryFailed, match="DIGEST_INVALID"):
        client.upload_blob(REPOSITORY, file.path, digest_of(b"other"), report=file.told.append)


def test_who_may_not_push_is_told(proxy: FaultProxy, file: File) -> None:
    body = b'{"errors":[{"code":"DENIED","message":"read only"}]}'
    proxy.answer("/uploads/", 403, times=0, body=body)
    with connect(proxy.host) as client, pytest.raises(RegistryFailed, match="DENIED: read only"):
        client.upload_blob(REPOSITORY, file.path, file.digest, report=file.told.append)


def test_a_manifest_whose_blobs_are_missing_is_refused(registry: RunningRegistry) -> None:
    part = {"mediaType": "x/y", "digest": digest_of(b"never stored"), "size": 12}
    body = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": part, "layers": [part]}
    with connect(registry.host) as client, pytest.raises(RegistryFailed, match="BLOB_UNKNOWN"):
        client.put_manifest(refer(registry.host), OCI_MANIFEST, json.dumps(body).encode())


def test_an_upload_ends_when_it_is_told_to(proxy: FaultProxy, file: File) -> None:
    stop, forever = threading.Event(), threading.Event()
    proxy.hold("/uploads/", forever, times=0)
    caught: list[BaseException] = []

    def work() -> None:
        try:
            with connect(proxy.host, stop=stop) as client:
                client.upload_blob(REPOSITORY, file.path, file.digest, report=file.told.append)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert proxy.noticed.wait(10)
    stop.set()
    thread.join(5)
    forever.set()
    assert [type(error) for error in caught] == [Stopped]
