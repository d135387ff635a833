"""The Llama as Haiku modules: the only room that imports haiku."""
