"""Launcher for a clone: `python cli.py merge …`."""

from weightops.cli.main import console

if __name__ == "__main__":
    console()
