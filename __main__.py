"""`python -m compress_ssl`: the same as the command `compress`."""

from compress_ssl.cli import main

if __name__ == "__main__":
    main()
