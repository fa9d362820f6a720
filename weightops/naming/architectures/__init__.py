"""One file per architecture: tables of names, marks of its sizes, and its blocks. No code."""
