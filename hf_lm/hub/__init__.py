"""Sharing models: cards from measurements, the doctor, the push to the Hub."""

from .card import write_card

__all__ = ["write_card"]
