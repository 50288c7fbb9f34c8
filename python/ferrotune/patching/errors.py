"""What `patch` raises. The model is then as it was."""

from __future__ import annotations


class PatchError(ValueError):
    """The model cannot be patched; ``layers`` are the names of the layers at fault."""

    def __init__(self, message: str, *layers: str):
        super().__init__(message)
        self.layers = layers


class UnsupportedLayerError(PatchError, NotImplementedError):
    """A layer's dtype or device is none that ferrotune computes on."""
