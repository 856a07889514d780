"""What a model does with a text, seen from inside."""
