"""What can be wrong with a model before it runs."""

from __future__ import annotations


class ModelError(ValueError):
    """A config that is incomplete, impossible, or of a kind this core does not have."""


class CheckpointError(ValueError):
    """Files that are missing, unreadable, or do not hold what the config promises."""
