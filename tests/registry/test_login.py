"""Logins: who asks, who is told what, and what is never told."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lumed.errors import RegistryFailed
from lumed.images.auth import Credentials
from tests.registry.faults import FaultProxy
from tests.registry.test_registry import (
    BLOB,
    DIGEST,
    REPOSITORY,
    connect,
    read_all,
    read_with_resume,
    refer,
)
from tests.registry.world import PASSWORD, USER, Layer, RunningRegistry

LOGIN = Credentials(USER, PASSWORD)


@pytest.fixture
def image(registry: RunningRegistry) -> str:
    """The manifest digest of org/deep/web:1, whose one layer is BLOB."""
    return registry.store_image(f"{REPOSITORY}:1", [Layer(BLOB)])


def test_a_registry_with_a_password_opens_to_who_has_it(login_registry: RunningRegistry) -> None:
    image = login_registry.store_image(f"{REPOSITORY}:1", [Layer(BLOB)])
    reference = refer(login_registry.host)
    with connect(login_registry.host, credentials=LOGIN) as client:
        assert client.get_manifest(reference, ["amd64"]).digest == image
        assert read_all(client) == BLOB
    with (
        connect(login_registry.host) as client,
        pytest.raises(RegistryFailed, match="needs a login for this") as caught,
    ):
        client.get_manifest(reference, ["amd64"])
    assert caught.value.hint is not None
    assert f"docker login {login_registry.host}" in caught.value.hint
    wrong = Credentials(USER, "not-the-password")
    with (
        connect(login_registry.host, credentials=wrong) as client,
        pytest.raises(RegistryFailed, match=f"refused the login of '{USER}'") as caught,
    ):
        client.get_manifest(reference, ["amd64"])
    assert "not-the-password" not in str(caught.value)


def test_a_login_is_found_in_docker_s_file(
    login_registry: RunningRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    login_registry.store_image(f"{REPOSITORY}:1", [Layer(BLOB)])
    auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    config = {"auths": {login_registry.host: {"auth": auth}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with connect(login_registry.host) as client:
        assert client.get_manifest(refer(login_registry.host), ["amd64"])


def test_a_login_comes_from_a_credential_helper(
    login_registry: RunningRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    login_registry.store_image(f"{REPOSITORY}:1", [Layer(BLOB)])
    helper = tmp_path / "docker-credential-test"
    reply = json.dumps({"ServerURL": "x", "Username": USER, "Secret": PASSWORD})
    helper.write_text(
        f'#!/bin/sh\n[ "$1" = get ] && [ "$(cat)" = {login_registry.host} ] && echo \'{reply}\'\n'
    )
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "config.json").write_text(
        json.dumps({"credHelpers": {login_registry.host: "test"}, "credsStore": "not-there"})
    )
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with connect(login_registry.host) as client:
        assert client.get_manifest(refer(login_registry.host), ["amd64"])


@pytest.mark.parametrize("login", [None, LOGIN])
def test_a_token_is_fetched_once_and_used_for_all(
    proxy: FaultProxy, image: str, login: Credentials | None
) -> None:
    proxy.ask_token(login=(USER, PASSWORD) if login else None)
    with connect(proxy.host, credentials=login) as client:
        manifest = client.get_manifest(refer(proxy.host), ["amd64"])
        assert manifest.digest == image
        client.get_blob(REPOSITORY, manifest.config)
        assert read_all(client) == BLOB
    assert proxy.count("GET", "/token") == 1
    asked = next(seen for seen in proxy.requests if "/token" in seen.target)
    assert asked.target.startswith("/token?a=b&scope=repository%3Aorg%2Fdeep%2Fweb%3Apull&service=")
    assert (asked.authorization is None) == (login is None)


def test_a_token_server_that_refuses_is_told_apart(proxy: FaultProxy, image: str) -> None:
    proxy.ask_token(login=(USER, PASSWORD))
    for login, said in (
        (None, "needs a login for this, .*who are you"),
        (Credentials(USER, "wrong"), f"refused the login of '{USER}': UNAUTHORIZED"),
    ):
        with (
            connect(proxy.host, credentials=login) as client,
            pytest.raises(RegistryFailed, match=said),
        ):
            client.get_manifest(refer(proxy.host), ["amd64"])


def test_a_token_that_runs_out_in_the_middle_is_renewed(proxy: FaultProxy, image: str) -> None:
    # One token for the manifest, and each part of the blob needs a new one.
    proxy.ask_token(uses=1)
    proxy.cut(after=1_000_000)
    proxy.cut(after=1_000_000)
    with connect(proxy.host) as client:
        client.get_manifest(refer(proxy.host), ["amd64"])
        assert read_with_resume(client) == BLOB
    assert proxy.served[DIGEST] == len(BLOB)
    assert proxy.count("GET", "/token") == 4


def test_a_token_is_not_used_after_the_time_it_was_given_for(proxy: FaultProxy, image: str) -> None:
    proxy.ask_token(expires_in=60)
    with connect(proxy.host) as client:
        client.get_manifest(refer(proxy.host), ["amd64"])
        (token,) = client._http._tokens.values()
        # As if the minute were over.
        client._http._tokens = {
            scope: type(token)(token.value, token.good_until - 60) for scope in client._http._tokens
        }
        client.get_manifest(refer(proxy.host), ["amd64"])
    assert proxy.count("GET", "/token") == 2
    used = [seen.authorization for seen in proxy.requests if "/manifests/" in seen.target]
    assert [header is None for header in used] == [True, False, True, False]


def test_a_server_that_never_takes_its_own_token_is_given_up(proxy: FaultProxy) -> None:
    challenge = f'Bearer realm="http://{proxy.host}/token"'
    proxy.answer("/token", 200, times=0, body=b'{"access_token":"abc","expires_in":1}')
    proxy.answer("/manifests/", 401, times=0, headers={"WWW-Authenticate": challenge})
    with connect(proxy.host) as client, pytest.raises(RegistryFailed, match="needs a login"):
        client.get_manifest(refer(proxy.host), ["amd64"])
    assert proxy.count("GET", "/manifests/") == 3


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"token":7}', b'{"token":"a\\r\\nX: y"}', b"[" * 100_000]
)
def test_a_token_server_that_talks_nonsense_is_named(proxy: FaultProxy, body: bytes) -> None:
    challenge = f'Bearer realm="http://{proxy.host}/token"'
    proxy.answer("/token", 200, times=0, body=body)
    proxy.answer("/manifests/", 401, times=0, headers={"WWW-Authenticate": challenge})
    with (
        connect(proxy.host) as client,
        pytest.raises(RegistryFailed, match=f"token server {proxy.host} sent no token"),
    ):
        client.get_manifest(refer(proxy.host), ["amd64"])


@pytest.mark.parametrize("realm", ["", "ftp://x/", "/token", "http://[/", "file:///etc/passwd"])
def test_a_challenge_without_a_server_is_refused(proxy: FaultProxy, realm: str) -> None:
    headers = {"WWW-Authenticate": f'Bearer realm="{realm}"'}
    proxy.answer("/manifests/", 401, times=0, headers=headers)
    with connect(proxy.host) as client, pytest.raises(RegistryFailed, match="which is no URL"):
        client.get_manifest(refer(proxy.host), ["amd64"])


@pytest.mark.parametrize("where", ["http://[/", "http://a:port/", "file:///etc/passwd"])
def test_a_redirect_to_what_is_no_url_is_refused(proxy: FaultProxy, where: str) -> None:
    proxy.answer("/blobs/", 307, headers={"Location": where})
    with connect(proxy.host) as client, pytest.raises(RegistryFailed, match="which is no URL"):
        read_all(client)


def test_no_password_goes_to_a_foreign_host_without_encryption(proxy: FaultProxy) -> None:
    headers = {"WWW-Authenticate": 'Bearer realm="http://registry.example/token"'}
    proxy.answer("/manifests/", 401, times=0, headers=headers)
    with (
        connect(proxy.host, credentials=LOGIN) as client,
        pytest.raises(RegistryFailed, match=r"registry\.example without encryption"),
    ):
        client.get_manifest(refer(proxy.host), ["amd64"])


def test_threads_share_a_client_and_its_tokens(proxy: FaultProxy, image: str) -> None:
    # Enough that no thread finds each new token spent by the others.
    proxy.ask_token(uses=6)
    for after in (0, 1, 1_000_000, 2_999_999):
        proxy.cut(after=after)
    with connect(proxy.host) as client, ThreadPoolExecutor(4) as pool:
        found = [pool.submit(read_with_resume, client, 20) for _ in range(8)]
        assert all(future.result() == BLOB for future in found)


def test_an_identity_token_is_traded_for_a_token(proxy: FaultProxy, image: str) -> None:
    challenge = f'Bearer realm="http://{proxy.host}/token",service="s"'
    proxy.answer("/manifests/", 401, headers={"WWW-Authenticate": challenge})
    proxy.answer("/token", 200, body=b'{"access_token":"abc"}')
    login = Credentials("", "", "the-refresh-token")
    with connect(proxy.host, credentials=login) as client:
        client.get_manifest(refer(proxy.host), ["amd64"])
    assert proxy.count("POST", "/token") == 1
    assert proxy.requests[-1].authorization == "Bearer abc"


def test_a_blob_store_never_sees_the_login(
    registry: RunningRegistry, proxy: FaultProxy, image: str
) -> None:
    with FaultProxy(registry.host, "127.0.0.2") as store:
        proxy.ask_token(login=(USER, PASSWORD))
        proxy.redirect("/blobs/", store)
        store.cut(after=1_000_000)
        with connect(proxy.host, credentials=LOGIN) as client:
            client.get_manifest(refer(proxy.host), ["amd64"])
            assert read_with_resume(client) == BLOB
        assert store.served[DIGEST] == len(BLOB)
        assert [seen.authorization for seen in store.requests] == [None, None]
    blobs = [seen.authorization for seen in proxy.requests if "/blobs/" in seen.target]
    assert all(header and header.startswith("Bearer ") for header in blobs)


def test_another_port_of_the_same_host_is_another_server(
    registry: RunningRegistry, proxy: FaultProxy, image: str
) -> None:
    with FaultProxy(registry.host) as store:
        proxy.ask_token()
        proxy.redirect("/blobs/", store)
        with connect(proxy.host) as client:
            assert read_all(client) == BLOB
        assert [seen.authorization for seen in store.requests] == [None]


def test_a_redirect_in_a_circle_ends(proxy: FaultProxy) -> None:
    proxy.redirect("/blobs/", proxy)
    with (
        connect(proxy.host) as client,
        pytest.raises(RegistryFailed, match="redirects more than 5 times"),
    ):
        read_all(client)
    assert proxy.count("GET", "/blobs/") == 6


def test_nobody_is_sent_to_a_foreign_host_without_encryption(proxy: FaultProxy) -> None:
    proxy.redirect("/blobs/", "http://registry.example")
    with (
        connect(proxy.host) as client,
        pytest.raises(RegistryFailed, match=r"sends to registry\.example without encryption"),
    ):
        read_all(client)


def test_a_blob_store_that_refuses_is_named_and_not_logged_in_to(
    registry: RunningRegistry, proxy: FaultProxy
) -> None:
    with FaultProxy(registry.host, "127.0.0.2") as store:
        store.answer("/blobs/", 401, headers={"WWW-Authenticate": "Basic realm=x"})
        proxy.redirect("/blobs/", store)
        with (
            connect(proxy.host, credentials=LOGIN) as client,
            pytest.raises(RegistryFailed, match=f"^{store.host} refused"),
        ):
            read_all(client)
        assert store.count("GET", "") == 1


def test_tls_is_spoken_with_who_is_known(
    tls_registry: RunningRegistry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image = tls_registry.store_image(f"{REPOSITORY}:1", [Layer(BLOB)])
    reference = refer(tls_registry.host)
    with (
        connect(tls_registry.host) as client,
        pytest.raises(
            RegistryFailed, match=r"certificate of 127\.0\.0\.1 is not trusted"
        ) as caught,
    ):
        client.get_manifest(reference, ["amd64"])
    assert caught.value.hint is not None
    assert "SSL_CERT_FILE" in caught.value.hint
    with connect(tls_registry.host, insecure=[tls_registry.host]) as client:
        assert client.get_manifest(reference, ["amd64"]).digest == image
    monkeypatch.setenv("SSL_CERT_FILE", str(tls_registry.ca))
    with connect(tls_registry.host) as client:
        assert client.get_manifest(reference, ["amd64"]).digest == image
        assert read_all(client) == BLOB
        assert read_all(client, 77) == BLOB[77:]
        path = tmp_path / "file"
        path.write_bytes(BLOB * 2)
        digest = f"sha256:{hashlib.sha256(BLOB * 2).hexdigest()}"
        client.upload_blob(REPOSITORY, path, digest, report=lambda _: None)
        assert client.has_blob(REPOSITORY, digest)
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/ca.pem")
    with (
        connect(tls_registry.host) as client,
        pytest.raises(RegistryFailed, match=r"names /nowhere/ca\.pem, which cannot be read"),
    ):
        client.get_manifest(reference, ["amd64"])


def test_a_login_is_in_no_message_and_no_repr(proxy: FaultProxy) -> None:
    login = Credentials("user", "geheim-1", "geheim-2")
    with connect(proxy.host, credentials=login) as client:
        assert "geheim" not in repr(login) + repr(client) + repr(vars(client)) + repr(
            vars(client._http)
        )
