"""A Hugging Face Hub on the loopback interface, for the real `huggingface_hub` client to talk to."""

from .server import HubServer
from .store import OWNER, READER, STRANGER, Fault, HubStore

__all__ = ["OWNER", "READER", "STRANGER", "Fault", "HubServer", "HubStore"]
