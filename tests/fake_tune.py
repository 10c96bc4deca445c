"""Work of a ``tune`` whose trials are ``fake_fit.py``, in this process or as a script in another one."""

import json
import sys
from pathlib import Path
from typing import Any

from gpt_lightning.tuning import worker
from gpt_lightning.tuning.proposal import Sampler
from gpt_lightning.tuning.space import read_space
from gpt_lightning.tuning.storage import StudyStorage, sqlite_url
from gpt_lightning.tuning.study import StudyConfig, TuneStudy

FOLDER = Path("checkpoints/study")
SPACE = {"model.lr": {"low": 0.0, "high": 1.0}}


def fake_study(
    space: dict[str, Any] | None = None, url: str | None = None, sampler: Sampler = "random"
) -> TuneStudy:
    """The study in the working directory."""
    worker.COMMAND = (sys.executable, str(Path(__file__).with_name("fake_fit.py")))
    worker.POLL_SECONDS = 0.05
    config = StudyConfig(read_space(space or SPACE, lambda name: True), {}, sampler, seed=1)
    return TuneStudy.create_or_continue(
        StudyStorage(url or sqlite_url(FOLDER / "study.db")), FOLDER, config
    )


def work(study: TuneStudy, limit: int, *, prunes: bool = False) -> None:
    worker.work(study, limit, lambda: None, prunes=prunes)


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    limit = settings.pop("limit")
    work(fake_study(**settings), limit)
