"""The corridor: each command one file, readable top to bottom: Config, then run(Config)."""
