"""One file per algorithm, readable top to bottom."""
