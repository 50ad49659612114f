"""`python -m kvcompress` is the `kvcompress` command."""

from kvcompress.cli import main

if __name__ == "__main__":
    main()
