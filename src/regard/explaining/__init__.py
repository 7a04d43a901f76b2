"""Explanations of Hugging Face models: what heads do while a model answers."""
