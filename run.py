"""Plant a backdoor, erase it, measure both: ``python run.py [group=choice] [key=value] ...``."""

from dhbe.cli import main

if __name__ == "__main__":
    main()
