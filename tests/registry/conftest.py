"""Registries for the session, a proxy for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.registry.faults import FaultProxy
from tests.registry.world import PASSWORD, USER, RunningRegistry, running_registry


@pytest.fixture(autouse=True)
def _no_logins(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No login and no proxy of the machine that the tests run on."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path_factory.getbasetemp() / "no-docker"))
    for name in ("REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    """A registry of plain HTTP, open to all."""
    with running_registry(tmp_path_factory.mktemp("registry")) as found:
        yield found


@pytest.fixture(scope="session")
def login_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    """A registry that asks for USER and PASSWORD."""
    folder = tmp_path_factory.mktemp("login-registry")
    with running_registry(folder, login=(USER, PASSWORD)) as found:
        yield found


@pytest.fixture(scope="session")
def tls_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    """A registry of TLS, by a certificate that nobody knows."""
    with running_registry(tmp_path_factory.mktemp("tls-registry"), tls=True) as found:
        yield found


@pytest.fixture
def proxy(registry: RunningRegistry) -> Iterator[FaultProxy]:
    """A proxy before the plain registry, without faults."""
    with FaultProxy(registry.host) as found:
        yield found
