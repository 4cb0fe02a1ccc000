"""One file per command of the command line, each with a frozen dataclass `Config` and a function `run(Config)`."""
