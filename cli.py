"""Launcher for a clone: `python cli.py merge …`."""

from weightops.cli.main import run

if __name__ == "__main__":
    run()
