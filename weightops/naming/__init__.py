"""What things are called: pure strings and shapes."""
