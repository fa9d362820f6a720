"""The only folder that prints: parses words, calls one function, draws the answer."""
