"""An OpenAI-compatible server for one model: `protocol` checks requests, `engine` answers them in batches."""

from .app import MAX_BODY, build_app

__all__ = ["MAX_BODY", "build_app"]
