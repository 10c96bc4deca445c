"""``python -m gpt_lightning``."""

from gpt_lightning.cli.main import main

if __name__ == "__main__":  # a process that is spawned imports this file
    raise SystemExit(main())
