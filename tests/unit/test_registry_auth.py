"""Challenges, and logins as docker's tools keep them."""

from __future__ import annotations

import base64
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumed.errors import RegistryFailed
from lumed.images.auth import Credentials, find_credentials, parse_challenges, parse_token
from lumed.images.connection import Origin, parse_url


def encode(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def write_config(folder: Path, **config: Any) -> dict[str, str]:
    """A docker config.json; the environment that names it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return {"DOCKER_CONFIG": str(folder), "PATH": "/usr/bin:/bin"}


def write_helper(folder: Path, name: str, script: str) -> None:
    program = folder / f"docker-credential-{name}"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (
            ['Bearer realm="https://a/t?x=1,2",service="r",scope="repository:a/b:pull,push"'],
            [
                (
                    "bearer",
                    {
                        "realm": "https://a/t?x=1,2",
                        "service": "r",
                        "scope": "repository:a/b:pull,push",
                    },
                )
            ],
        ),
        (["BASIC Realm=plain"], [("basic", {"realm": "plain"})]),
        (
            ['Basic realm="a \\"b\\" \\\\", charset = "UTF-8" , Bearer realm=""'],
            [("basic", {"realm": 'a "b" \\', "charset": "UTF-8"}), ("bearer", {"realm": ""})],
        ),
        (["Negotiate", "Basic realm=x"], [("negotiate", {}), ("basic", {"realm": "x"})]),
        (
            ["Negotiate YIIabc/+==, Basic realm=x"],
            [("negotiate", {}), ("basic", {"realm": "x"})],
        ),
        (['Bearer realm="without end'], [("bearer", {"realm": ""})]),
        (["", ",,", '"'], []),
    ],
)
def test_challenges_are_told_apart(
    headers: list[str], expected: list[tuple[str, dict[str, str]]]
) -> None:
    found = [
        (challenge.scheme, dict(challenge.parameters)) for challenge in parse_challenges(headers)
    ]
    assert found == expected


@given(st.lists(st.text(alphabet='Bearer ,="\\\t/x', max_size=60)))
def test_no_challenge_is_too_strange(headers: list[str]) -> None:
    parse_challenges(headers)


@pytest.mark.parametrize(
    ("key", "host"),
    [
        ("quay.io", "quay.io"),
        ("https://quay.io", "quay.io"),
        ("https://quay.io/v2/", "quay.io"),
        ("localhost:5000", "localhost:5000"),
        ("https://index.docker.io/v1/", "docker.io"),
    ],
)
def test_a_login_is_found_by_host(tmp_path: Path, key: str, host: str) -> None:
    environ = write_config(
        tmp_path, auths={"a.example": {"auth": encode("x:y")}, key: {"auth": encode("a:b:c")}}
    )
    assert find_credentials(host, environ, tmp_path) == Credentials("a", "b:c")
    assert find_credentials("other.example", environ, tmp_path) is None


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"username": "a", "password": "b"}, Credentials("a", "b")),
        ({"auth": encode("a:"), "identitytoken": "t"}, Credentials("a", "", "t")),
        ({"identitytoken": "t"}, Credentials("", "", "t")),
        ({"auth": "%%%"}, None),
        ({"auth": encode("nocolon")}, None),
        ({"auth": base64.b64encode(b"\xff:\xff").decode()}, None),
        ({}, None),
        ("text", None),
        (None, None),
    ],
)
def test_entries_are_read_or_left(
    tmp_path: Path, entry: object, expected: Credentials | None
) -> None:
    environ = write_config(tmp_path, auths={"quay.io": entry})
    assert find_credentials("quay.io", environ, tmp_path) == expected


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"auths": 7, "credHelpers": []}', "[" * 100_000]
)
def test_a_damaged_file_is_no_login(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert find_credentials("quay.io", {"DOCKER_CONFIG": str(tmp_path)}, tmp_path) is None


def test_files_are_asked_in_order(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    run = tmp_path / "run"
    (run / "containers").mkdir(parents=True)
    files = {
        home / ".docker/config.json": "docker",
        tmp_path / "named.json": "named",
        run / "containers/auth.json": "run",
    }
    environ = {"REGISTRY_AUTH_FILE": str(tmp_path / "named.json"), "XDG_RUNTIME_DIR": str(run)}
    for path, user in reversed(files.items()):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"auths": {"quay.io": {"auth": encode(f"{user}:x")}}}))
        found = find_credentials("quay.io", environ, home)
        assert found is not None
        assert found.username == user


def test_github_s_token_is_for_github_s_registry_only(tmp_path: Path) -> None:
    environ = {"GITHUB_TOKEN": "secret", "GHCR_USERNAME": "nana"}
    assert find_credentials("ghcr.io", environ, tmp_path) == Credentials("nana", "secret")
    assert find_credentials("quay.io", environ, tmp_path) is None
    assert find_credentials("ghcr.io.evil.example", environ, tmp_path) is None
    assert find_credentials("ghcr.io", {"GITHUB_USERNAME": "nana"}, tmp_path) is None


def test_helpers_come_before_the_file_and_their_failure_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    write_helper(tmp_path, "good", 'cat >"$0.asked"; echo \'{"Username":"h","Secret":"s"}\'')
    write_helper(tmp_path, "token", 'echo \'{"Username":"<token>","Secret":"s"}\'')
    write_helper(tmp_path, "bad", "echo geheim; echo geheim >&2; exit 1")
    auths = {"quay.io": {"auth": encode("file:x")}}
    expected = {
        "good": Credentials("h", "s"),
        "token": Credentials("", "", "s"),
        "bad": Credentials("file", "x"),
        "missing": Credentials("file", "x"),
        "../../bin/sh": Credentials("file", "x"),
    }
    caplog.set_level(logging.DEBUG)
    for name, login in expected.items():
        environ = write_config(tmp_path, credsStore=name, auths=auths)
        assert find_credentials("quay.io", environ, tmp_path) == login
    assert (tmp_path / "docker-credential-good.asked").read_text() == "quay.io"
    environ = write_config(tmp_path, credsStore="bad", credHelpers={"docker.io": "good"})
    assert find_credentials("docker.io", environ, tmp_path) == Credentials("h", "s")
    asked = (tmp_path / "docker-credential-good.asked").read_text()
    assert asked == "https://index.docker.io/v1/"
    assert "geheim" not in caplog.text


def test_a_token_tells_how_long_it_is_good() -> None:
    assert parse_token(b'{"token":"a","expires_in":300}', "x", 1000).good_until == 1290
    assert parse_token(b'{"access_token":"a"}', "x", 1000).good_until == 1050
    assert parse_token(b'{"token":"a","expires_in":4}', "x", 1000).good_until == 1003
    assert parse_token(b'{"token":"a","expires_in":"soon"}', "x", 1000).good_until == 1050
    with pytest.raises(RegistryFailed, match="x sent no token"):
        parse_token(b'{"token":""}', "x", 1000)


def test_secrets_are_in_no_repr() -> None:
    login = Credentials("nana", "geheim", "geheim")
    token = parse_token(b'{"token":"geheim"}', "x", 0)
    assert "geheim" not in repr(login) + repr(token)


@pytest.mark.parametrize(
    ("url", "origin", "target"),
    [
        ("https://a.example/x?y=1#z", Origin("https", "a.example", 443), "/x?y=1"),
        ("http://user:pw@A.example:81", Origin("http", "a.example", 81), "/"),
        ("http://[::1]:5000/v2/", Origin("http", "::1", 5000), "/v2/"),
    ],
)
def test_urls_are_taken_apart(url: str, origin: Origin, target: str) -> None:
    assert parse_url(url) == (origin, target)


@pytest.mark.parametrize(
    "url", ["ftp://a/", "//a/", "/x", "http://a:99999/", "http://[/", "http:///"]
)
def test_what_is_no_url_is_refused_without_its_query(url: str) -> None:
    with pytest.raises(RegistryFailed) as caught:
        parse_url(f"{url}?signature=geheim")
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.77.0.5", True),
        ("::1", True),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("10.0.0.1", False),
        ("0.0.0.0", False),  # noqa: S104
    ],
)
def test_loopback_is_known_by_address(host: str, expected: bool) -> None:
    assert Origin("http", host, 80).is_loopback == expected
