"""The client against a real registry, and against one that fails."""

from __future__ import annotations

import random
import socket
import threading

import pytest

from lumed.errors import RegistryFailed
from lumed.images.auth import Credentials
from lumed.images.oci import (
    OCI_CONFIG,
    ConnectionLost,
    Descriptor,
    digest_of,
)
from lumed.images.reference import ImageReference
from lumed.images.registry import NoSuchPlatform, Registry
from lumed.threads import Stopped
from tests.registry.faults import FaultProxy
from tests.registry.world import PASSWORD, USER, Layer, RunningRegistry

BLOB = random.Random(1).randbytes(3_000_000)  # noqa: S311
DIGEST = digest_of(BLOB)
DESCRIPTOR = Descriptor("application/octet-stream", DIGEST, len(BLOB))
REPOSITORY = "org/deep/web"
LOGIN = Credentials(USER, PASSWORD)


@pytest.fixture
def image(registry: RunningRegistry) -> str:
    """The manifest digest of org/deep/web:1, whose one layer is BLOB."""
    return registry.store_image(f"{REPOSITORY}:1", [Layer(BLOB)], config=Layer(b"{}", OCI_CONFIG))


def connect(host: str, **options: object) -> Registry:
    """A client that does not wait long between tries."""
    return Registry(host, first_delay_s=0.001, **options)  # type: ignore[arg-type]


def refer(host: str, repository: str = REPOSITORY, **what: str) -> ImageReference:
    return ImageReference(host, repository, **(what or {"tag": "1"}))


def read_all(client: Registry, offset: int = 0, blob: Descriptor = DESCRIPTOR) -> bytes:
    """One try, by a buffer whose size divides nothing."""
    buffer, found = memoryview(bytearray(70_001)), b""
    with client.open_blob(REPOSITORY, blob, offset) as stream:
        assert stream.offset == offset
        while count := stream.readinto(buffer):
            found += buffer[:count]
    return found


def read_with_resume(client: Registry, tries: int = 10) -> bytes:
    """What a pull does: go on at the offset after each break."""
    buffer, found = memoryview(bytearray(64 << 10)), bytearray()
    for _ in range(tries):
        try:
            with client.open_blob(REPOSITORY, DESCRIPTOR, len(found)) as stream:
                del found[stream.offset :]
                while count := stream.readinto(buffer):
                    found += buffer[:count]
            return bytes(found)
        except ConnectionLost:
            continue
    raise AssertionError(f"not within {tries} tries")


def test_a_manifest_and_its_blobs_come_as_they_were_stored(
    registry: RunningRegistry, image: str
) -> None:
    with connect(registry.host) as client:
        by_tag = client.get_manifest(refer(registry.host), ["amd64"])
        by_digest = client.get_manifest(refer(registry.host, digest=image), ["amd64"])
        assert by_tag == by_digest
        assert by_tag.digest == image
        assert client.get_blob(REPOSITORY, by_tag.config) == b"{}"
        assert read_all(client) == BLOB
        assert read_all(client, 2_999_999) == BLOB[-1:]


def test_one_connection_serves_one_request_after_the_other(proxy: FaultProxy, image: str) -> None:
    with connect(proxy.host) as client:
        manifest = client.get_manifest(refer(proxy.host), ["amd64"])
        client.get_blob(REPOSITORY, manifest.config)
        read_all(client)
        read_all(client)
        assert len(client._http._idle) == 1
    # And what finds out that it is plain HTTP is one request.
    assert proxy.count("GET", "") == 5


def test_an_index_is_followed_by_preference(registry: RunningRegistry, image: str) -> None:
    other = registry.store_image(f"{REPOSITORY}:arm", [Layer(b"arm")])
    windows = registry.store_image(f"{REPOSITORY}:win", [Layer(b"win")])
    registry.store_index(
        f"{REPOSITORY}:both",
        {"windows/amd64": windows, "linux/amd64": image, "linux/arm64": other},
    )
    registry.store_index(f"{REPOSITORY}:one", {"linux/arm64": other})
    both, one = (refer(registry.host, tag=tag) for tag in ("both", "one"))
    with connect(registry.host) as client:
        assert client.get_manifest(both, ["amd64", "arm64"]).digest == image
        assert client.get_manifest(both, ["arm64", "amd64"]).digest == other
        assert client.get_manifest(one, ["amd64", "arm64"]).digest == other
        with pytest.raises(NoSuchPlatform, match="not made for amd64 or s390x") as caught:
            client.get_manifest(one, ["amd64", "s390x"])
    assert caught.value.architectures == ("arm64",)
    assert caught.value.hint == "it is made for: arm64"


def test_what_is_not_there_is_named(registry: RunningRegistry, image: str) -> None:
    with connect(registry.host) as client:
        with pytest.raises(RegistryFailed, match=r"^Image not found: 127.*/org/deep/web:9$"):
            client.get_manifest(refer(registry.host, tag="9"), ["amd64"])
        gone = Descriptor("x", digest_of(b"gone"), 4)
        with pytest.raises(RegistryFailed, match=f"has no blob {gone.digest}"):
            client.get_blob(REPOSITORY, gone)
        with pytest.raises(RegistryFailed, match=f"has no blob {gone.digest}"):
            read_all(client, blob=gone)


def test_a_manifest_with_other_bytes_is_refused(proxy: FaultProxy, image: str) -> None:
    proxy.flip("/manifests/", at=60, times=2)
    with connect(proxy.host) as client:
        for reference in (refer(proxy.host), refer(proxy.host, digest=image)):
            with pytest.raises(RegistryFailed, match="wrong bytes"):
                client.get_manifest(reference, ["amd64"])


def test_a_manifest_of_another_digest_is_refused(proxy: FaultProxy) -> None:
    proxy.answer("/manifests/", 200, body=b"{}")
    with connect(proxy.host) as client, pytest.raises(RegistryFailed, match="wrong bytes"):
        client.get_manifest(refer(proxy.host, digest=DIGEST), ["amd64"])


def test_a_stream_that_is_left_early_disturbs_nothing(
    registry: RunningRegistry, image: str
) -> None:
    with connect(registry.host) as client:
        with client.open_blob(REPOSITORY, DESCRIPTOR) as stream:
            assert stream.readinto(memoryview(bytearray(10))) == 10
        assert read_all(client) == BLOB


def test_a_small_blob_with_other_bytes_is_refused(proxy: FaultProxy, image: str) -> None:
    proxy.flip(at=1)
    with (
        connect(proxy.host) as client,
        pytest.raises(RegistryFailed, match="other bytes than those of sha256"),
    ):
        client.get_blob(REPOSITORY, Descriptor("x", digest_of(b"{}"), 2))


def test_a_manifest_without_end_is_refused(proxy: FaultProxy) -> None:
    proxy.answer("/manifests/", 200, body=b" " * (5 << 20))
    with (
        connect(proxy.host) as client,
        pytest.raises(RegistryFailed, match="more than 4194304 bytes"),
    ):
        client.get_manifest(refer(proxy.host), ["amd64"])


def test_an_encoded_body_is_refused(proxy: FaultProxy) -> None:
    proxy.answer("/manifests/", 200, headers={"Content-Encoding": "gzip"}, body=b"x")
    with connect(proxy.host) as client, pytest.raises(RegistryFailed, match="encoded as 'gzip'"):
        client.get_manifest(refer(proxy.host), ["amd64"])


@pytest.mark.parametrize("reset", [False, True])
def test_a_broken_blob_goes_on_where_it_broke(proxy: FaultProxy, image: str, reset: bool) -> None:
    proxy.cut(after=1_000_001, reset=reset)
    proxy.cut(after=1_500_000, reset=reset)
    with connect(proxy.host) as client:
        assert read_with_resume(client) == BLOB
    if not reset:
        # An orderly end loses nothing: no byte came twice.
        assert proxy.served[DIGEST] == len(BLOB)
    ranges = [seen.headers.get("Range") for seen in proxy.requests if DIGEST in seen.target]
    assert ranges[0] is None
    assert len(ranges) == 3
    assert None not in ranges[1:]


def test_a_server_without_ranges_sends_it_whole_again(proxy: FaultProxy, image: str) -> None:
    proxy.cut(after=1_000_000)
    proxy.ignore_range()
    with connect(proxy.host) as client:
        assert read_with_resume(client) == BLOB
    assert proxy.served[DIGEST] == len(BLOB) + 1_000_000


def test_a_blob_of_another_length_is_refused(proxy: FaultProxy, image: str) -> None:
    proxy.shorten(to=1_000_000)
    with connect(proxy.host) as client:
        with pytest.raises(RegistryFailed, match=r"has 1000000 bytes .* says 3000000") as caught:
            read_all(client)
        assert not isinstance(caught.value, ConnectionLost)
        assert read_all(client) == BLOB


@pytest.mark.parametrize("part", ["bytes 7-9/3000000", "bytes 9-2999999/4000000", "nonsense", ""])
def test_another_part_than_asked_for_is_refused(proxy: FaultProxy, part: str) -> None:
    proxy.answer("/blobs/", 206, headers={"Content-Range": part}, body=b"xxx")
    with connect(proxy.host) as client, pytest.raises(RegistryFailed, match="another part"):
        read_all(client, 9)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_registry_is_asked_again(proxy: FaultProxy, image: str, status: int) -> None:
    proxy.answer("/manifests/", status, times=4, retry_after=0)
    with connect(proxy.host) as client:
        assert client.get_manifest(refer(proxy.host), ["amd64"]).digest == image
    assert proxy.count("GET", "/manifests/") == 5


def test_a_registry_that_stays_busy_is_given_up(proxy: FaultProxy) -> None:
    body = b'{"errors":[{"code":"TOOMANYREQUESTS","message":"slow\\ndown"}]}'
    proxy.answer("/manifests/", 429, times=0, body=body)
    with (
        connect(proxy.host) as client,
        pytest.raises(RegistryFailed, match="asked too often: TOOMANYREQUESTS: slow down"),
    ):
        client.get_manifest(refer(proxy.host), ["amd64"])
    assert proxy.count("GET", "/manifests/") == 5


def test_nobody_waits_for_an_hour(proxy: FaultProxy) -> None:
    proxy.answer("/manifests/", 429, retry_after=3600)
    with (
        connect(proxy.host) as client,
        pytest.raises(RegistryFailed, match="no requests for the next 3600 s"),
    ):
        client.get_manifest(refer(proxy.host), ["amd64"])


def test_a_connection_that_breaks_before_its_reply_is_made_again(
    proxy: FaultProxy, image: str
) -> None:
    proxy.cut("/manifests/", after=0, times=2)
    proxy.cut("/manifests/", after=10, times=2)
    with connect(proxy.host) as client:
        assert client.get_manifest(refer(proxy.host), ["amd64"]).digest == image


def test_a_silent_registry_has_hung_up(proxy: FaultProxy, image: str) -> None:
    forever = threading.Event()
    proxy.hold("/blobs/", forever, after=1_000_000)
    with connect(proxy.host, quiet_s=0.1) as client:
        buffer = memoryview(bytearray(2_000_000))
        with client.open_blob(REPOSITORY, DESCRIPTOR) as stream:
            # What came before is not lost.
            assert stream.readinto(buffer) == 1_000_000
            with pytest.raises(ConnectionLost, match=r"nothing came for 0\.1 s"):
                stream.readinto(buffer)
    forever.set()


@pytest.mark.parametrize("wait", ["head", "body", "back-off"])
def test_a_wait_ends_when_it_is_told_to(proxy: FaultProxy, image: str, wait: str) -> None:
    stop, forever = threading.Event(), threading.Event()
    if wait == "back-off":
        proxy.answer("/blobs/", 503, retry_after=50)
    else:
        proxy.hold("/blobs/", forever, after=1 if wait == "body" else -1)
    caught: list[BaseException] = []

    def work() -> None:
        try:
            with connect(proxy.host, stop=stop) as client:
                read_all(client)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert proxy.noticed.wait(10)
    stop.set()
    thread.join(5)
    forever.set()
    assert [type(error) for error in caught] == [Stopped]


def test_a_registry_that_is_not_there_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        host = f"localhost:{taken.getsockname()[1]}"
    with (
        connect(host) as client,
        pytest.raises(ConnectionLost, match=f"^{host} cannot be reached: Connection refused$"),
    ):
        client.get_manifest(refer(host), ["amd64"])


def test_a_host_that_does_not_exist_is_named() -> None:
    with connect("nowhere.invalid") as client, pytest.raises(RegistryFailed, match=r"nowhere\.inv"):
        client.get_manifest(refer("nowhere.invalid"), ["amd64"])
