"""Where transitions come from: one reader a file."""
