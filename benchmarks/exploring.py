"""Waiting times on the page of ``explore``: python benchmarks/exploring.py [--repeats 5] [--tiny]

A model of 124M with random weights, in Chromium on the same machine. Measured are the time from the line that says that the
server is ready to the first paint, in a new server and a new browser; from the move of a slider to the bars, with a
short prompt and with one of about 1,000 tokens; and from a click on "Generate" to the first token, minus one decoding step.
The last line is JSON.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from machine import at_most, description
from playwright.sync_api import Browser, Page, sync_playwright

from gpt_lightning import GPTConfig, GPTModel, save_model

SLIDER_MOVES = 20
NEW_TOKENS = 24
SHORT_PROMPT = "Every effort moves you"
LONG_PROMPT = " ".join([SHORT_PROMPT] * 240)  # 960 tokens

# both return milliseconds; the bars and the texts are seen by the observer right after they have changed
MOVE_SLIDER = """
() => new Promise((resolve) => {
  const slider = document.querySelector("#temperature");
  const start = performance.now();
  new MutationObserver((_, observer) => {
    observer.disconnect();
    requestAnimationFrame(() => resolve(performance.now() - start));
  }).observe(document.querySelector(".bars"), { subtree: true, childList: true, characterData: true });
  slider.value = (Number(slider.value) + 1) % Number(slider.max);
  slider.dispatchEvent(new Event("input", { bubbles: true }));
})
"""
GENERATE = """
(count) => new Promise((resolve) => {
  const times = [];
  const text = document.querySelector("#view-text .shaded");
  const button = [...document.querySelectorAll("#view-text button")].find((b) => b.textContent === "Generate");
  const start = performance.now();
  button.click(); // empties the text
  new MutationObserver((_, observer) => {
    const shown = text.querySelectorAll("[role=option]").length;
    while (times.length < shown) times.push(performance.now() - start);
    if (shown < count) return;
    observer.disconnect();
    resolve(times);
  }).observe(text, { childList: true });
})
"""
FIRST_PAINT = """
() => new Promise((resolve) => new PerformanceObserver((list) => {
  const paint = list.getEntriesByName("first-contentful-paint")[0];
  if (paint) resolve(performance.timeOrigin + paint.startTime);
}).observe({ type: "paint", buffered: true }))
"""


@contextmanager
def server(source: str) -> Iterator[tuple[str, float]]:
    """Address of a new server, and the time at which it said that it is ready."""
    command = [sys.executable, "-m", "gpt_lightning", "explore", "--from", source, "--port=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        ready = time.time()
        address = re.search(r"http://\S+/", line)
        if address is None:
            raise RuntimeError(f"explore does not start: {line}")
        yield address[0], ready
    finally:
        process.terminate()
        process.communicate(timeout=60)


def open_page(browser: Browser, url: str) -> Page:
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    page.set_default_timeout(120_000)
    page.goto(url)
    return page


def slider_to_bars(browser: Browser, url: str, prompt: str) -> list[float]:
    """Seconds of some moves of the temperature. The first one is warm-up."""
    page = open_page(browser, f"{url}#prompt={quote(prompt)}")
    page.locator(".bars li").first.wait_for()
    page.wait_for_timeout(1000)
    seconds = [page.evaluate(MOVE_SLIDER) / 1e3 for _ in range(SLIDER_MOVES + 1)]
    page.context.close()
    return seconds[1:]


def click_to_tokens(browser: Browser, url: str, repeats: int) -> list[dict[str, float]]:
    """Seconds to the first token, and of a decoding step. The first time is warm-up."""
    link = f"#view=text&prompt={quote(SHORT_PROMPT)}&max_new_tokens={NEW_TOKENS}"
    page = open_page(browser, url + link)
    page.locator("#model option").first.wait_for(state="attached")
    results = []
    for _ in range(repeats + 1):
        times = [milliseconds / 1e3 for milliseconds in page.evaluate(GENERATE, NEW_TOKENS)]
        steps = [after - before for before, after in pairwise(times)]
        results.append({"first": times[0], "step": statistics.median(steps)})
        page.wait_for_timeout(500)
    page.context.close()
    return results[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--tiny", action="store_true", help="use a toy model, to test that the benchmark runs"
    )
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        parser.error(
            "chromium: is not installed; install it, for example with apt-get install chromium"
        )
    sizes = {"emb_dim": 32, "n_heads": 4, "n_layers": 2} if options.tiny else {}
    config = GPTConfig(**sizes, qkv_bias=True, tied_embeddings=True)
    torch.manual_seed(0)
    launch: dict[str, Any] = {"executable_path": chromium, "args": ["--no-sandbox"]}
    first_paints = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        source = str(Path(folder, "model"))
        save_model(GPTModel(config), source)
        for _ in range(options.repeats):
            browser = playwright.chromium.launch(**launch)
            with server(source) as (url, ready):
                page = open_page(browser, url)
                first_paints.append(page.evaluate(FIRST_PAINT) / 1e3 - ready)
                browser.close()
        browser = playwright.chromium.launch(**launch)
        with server(source) as (url, _):
            sliders = {
                name: slider_to_bars(browser, url, prompt)
                for name, prompt in (("short", SHORT_PROMPT), ("long", LONG_PROMPT))
            }
            texts = click_to_tokens(browser, url, options.repeats)
            version = browser.version
            browser.close()
    waits = [text["first"] - text["step"] for text in texts]
    targets = [
        at_most("seconds from the ready line to the first paint", statistics.median(first_paints), 0.5),
        *(
            at_most(f"seconds from a slider to the bars, {name} prompt", statistics.median(seconds), 0.1)
            for name, seconds in sliders.items()
        ),
        at_most("seconds from the click to the first token, minus a step", statistics.median(waits), 0.05),
    ]  # fmt: skip
    for target in targets:
        print(f"{target['name']}: {target['value']:.3f} (at most {target['at_most']})")
    machine = description("starlette", "uvicorn", "playwright") | {"chromium": version}
    print(json.dumps({"benchmark": "exploring", "machine": machine, "emb_dim": config.emb_dim, "n_layers": config.n_layers,
                      "first_paint": first_paints, "slider": sliders, "texts": texts, "targets": targets}))  # fmt: skip


if __name__ == "__main__":
    main()
