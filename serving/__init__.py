"""Top layer: a published model behind HTTP."""
