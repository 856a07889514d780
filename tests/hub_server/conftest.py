"""The emulated Hub for the tests in this folder."""

from hub_server.fixtures import client, hub, hub_server, lfs_client_process, xet_client, xet_client_process  # noqa: F401
