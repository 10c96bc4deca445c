from gpt_lightning.cli import main

raise SystemExit(main())
