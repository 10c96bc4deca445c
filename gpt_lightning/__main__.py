"""``python -m gpt_lightning``."""

from gpt_lightning.cli.main import main

raise SystemExit(main())
