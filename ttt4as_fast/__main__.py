"""``python -m ttt4as_fast`` is the command ``ttt4as``."""

from .cli import main

if __name__ == "__main__":
    main()
