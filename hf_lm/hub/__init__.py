"""Sharing models: cards from measurements, the doctor, the push to the Hub."""


def __getattr__(name: str):
    if name == "write_card":  # on first use: `files` has to answer before transformers is loaded
        from .card import write_card

        return write_card
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
