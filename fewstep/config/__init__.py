"""The settings that several commands or methods share, and how a command line or a YAML file becomes settings."""
