"""One architecture a file. A model uses its published checkpoint's names and does not read files."""
