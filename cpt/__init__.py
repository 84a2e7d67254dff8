"""Continual pretraining of language models as one reproducible command."""

__version__ = "0.1.0"
