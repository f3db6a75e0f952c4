"""Erase a concept from a language model by training a small edit of its weights."""
