"""Sharing models: cards from measurements, the doctor, the push to the Hub."""
