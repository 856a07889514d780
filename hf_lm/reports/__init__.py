"""Pages for people: how a run went, what a model does inside."""
