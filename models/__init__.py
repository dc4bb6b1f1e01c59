"""One architecture a file. A model knows the names its published checkpoint uses and nothing about files."""
