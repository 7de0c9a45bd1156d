"""What a program meets on its host beside JAX: files that appear whole or not at all, packages that may be missing."""
