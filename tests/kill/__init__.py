"""Work that is killed at random moments, done again, and held against work that never was."""
