"""Write text with a model: prompts, conversations, translations, weights packed for a CPU."""
