"""Bytes on disk or network: the only floor that touches them."""
