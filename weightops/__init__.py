"""Surgery on diffusion weights."""

__version__ = "0.1.0"
