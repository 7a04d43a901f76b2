"""Hugging Face models: attach, doctor, ledger caches, and the small models that are shipped."""
