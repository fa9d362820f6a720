"""Arithmetic and names of adapters: families, dialects, and files grouped into adapters."""
