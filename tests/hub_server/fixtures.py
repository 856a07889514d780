"""Fixtures for the tests that talk to the emulated Hub."""

import pytest

from .client import Client
from .server import HubServer
from .store import OWNER


@pytest.fixture(scope="session")
def hub_server():
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(hub_server):
    """The emulator's store, empty."""
    hub_server.store.clear()
    return hub_server.store


@pytest.fixture(scope="session")
def lfs_client_process(hub_server, tmp_path_factory):
    client = Client(hub_server.endpoint, tmp_path_factory.mktemp("lfs"), OWNER, HF_HUB_DISABLE_XET="1")
    yield client
    client.close()


@pytest.fixture
def client(hub, lfs_client_process):
    """A process with the real client, logged in as the owner, large files by LFS."""
    return lfs_client_process


@pytest.fixture(scope="session")
def xet_client_process(hub_server, tmp_path_factory):
    client = Client(hub_server.endpoint, tmp_path_factory.mktemp("xet"), OWNER)
    yield client
    client.close()


@pytest.fixture
def xet_client(hub, xet_client_process):
    """The same, large files by Xet."""
    return xet_client_process
