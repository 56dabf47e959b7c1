"""Let `python -m bnnp` do what the command `bnnp` does."""

from bnnp.cli import main

if __name__ == "__main__":
    main()
