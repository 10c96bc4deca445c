"""Generator of ``docs/images/tensorboard.png``: the first screen of TensorBoard after a quickstart run.

Usage: ``python docs/generate_screenshot.py``. It needs Chromium, trains for about a minute, and uses no network.
"""

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "images" / "tensorboard.png"
SETTINGS = (
    f"--config={ROOT}/configs/quickstart.yaml",
    "--trainer.max_epochs=5",
    "--trainer.log_every_n_steps=5",
    "--evaluation.eval_freq=5",
    "--model.lr=0.005",
    "--model.config.emb_dim=32",
    "--model.config.n_heads=2",
    "--model.config.n_layers=1",
)


def main() -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        sys.exit("chromium is not installed")
    with tempfile.TemporaryDirectory() as folder:
        fit = [sys.executable, "-m", "gpt_lightning", "fit", *SETTINGS]
        subprocess.run(fit, cwd=folder, check=True)
        port = free_port()
        board = [sys.executable, "-m", "tensorboard.main", "--logdir=checkpoints",
                 "--host=127.0.0.1", f"--port={port}"]  # fmt: skip
        with subprocess.Popen(board, cwd=folder) as server:
            try:
                wait_until_it_answers(f"http://127.0.0.1:{port}/data/runs")
                take(browser, f"http://127.0.0.1:{port}/#timeseries", Path(folder) / "profile")
            finally:
                server.terminate()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def wait_until_it_answers(url: str) -> None:
    for _ in range(120):
        try:
            if b"quickstart" in urlopen(url, timeout=5).read():
                return
        except OSError:
            pass
        time.sleep(0.5)
    sys.exit("TensorBoard does not answer")


def take(browser: str, url: str, profile: Path) -> None:
    PICTURE.parent.mkdir(exist_ok=True)
    # Without WebGL TensorBoard draws the lines as SVG, which is complete when the picture is taken.
    subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-3d-apis", f"--user-data-dir={profile}",
         "--window-size=1200,760", "--virtual-time-budget=20000", f"--screenshot={PICTURE}", url],
        check=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip


if __name__ == "__main__":
    main()
