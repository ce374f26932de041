"""Polyradix: one LLM server core for any accelerator."""

__version__ = "0.1.0"
