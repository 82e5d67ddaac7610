"""Every group of settings that several commands or methods share, and how words become settings."""
