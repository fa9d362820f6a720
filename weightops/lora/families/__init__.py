"""One file per family of adapters."""
