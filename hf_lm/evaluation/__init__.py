"""Numbers about a model: how well it predicts a text, how likely it finds a sentence."""
