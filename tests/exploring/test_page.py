"""The page of ``explore`` in a real browser."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from gpt_lightning.cli.main import main
from helpers import ENVIRONMENT, ROOT, SMALL_QUICKSTART

playwright_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here"),
]

PATIENCE = 30_000  # milliseconds; the machine may have other work
PROMPT = "The tower clock"
STEPS = 30  # of the first model
OTHER_STEPS = 20
PNG = b"\x89PNG\r\n\x1a\n"


def train(folder: Path, name: str, max_steps: int) -> Path:
    """A run with a learning rate that makes some tokens probable in a few steps."""
    settings = ["--model.lr=0.03", "--model.warmup_steps=0", f"--trainer.max_steps={max_steps}"]
    arguments = [f"--run={name}", f"--trainer.default_root_dir={folder}"]
    assert main(["fit", *SMALL_QUICKSTART, *settings, *arguments]) == 0
    return folder / "checkpoints" / name


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("page"), "quickstart", STEPS)


@pytest.fixture(scope="module")
def other_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("page"), "other", OTHER_STEPS)


@pytest.fixture(scope="module")
def address(run_folder: Path, other_run: Path) -> Iterator[str]:
    """Address of a server with two models."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gpt_lightning", "explore", "--from", run_folder, other_run, "--port=0"],
        env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    reader = threading.Thread()
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"http://\S+", line):
                break
        else:
            pytest.fail("".join(lines))
        reader = threading.Thread(target=process.stdout.read)  # a full pipe would block it
        reader.start()
        yield found.group().rstrip("/")
        process.terminate()
        assert process.wait(60) == 143
    finally:
        process.kill()
        process.wait()
        if reader.ident is not None:
            reader.join()
        process.stdout.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page, and what must not happen on it."""

    page: Any
    address: str
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    is_failure_expected: bool = False  # the browser reports every answer from 400 on the console

    def open(self, link: str = f"#prompt={PROMPT}") -> Any:
        """The page at this link, when it shows the distribution of the next token."""
        self.page.goto(f"{self.address}/{link}")
        if "view=" not in link:
            self.page.locator(".bars li").first.wait_for()
        return self.page


@pytest.fixture
def visit(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """A visit without errors and without a request to another address than the server's."""
    settings = {"viewport": {"width": 1280, "height": 900}, **getattr(request, "param", {})}
    context = browser.new_context(**settings)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    visit = Visit(page, address)
    page.on("request", lambda request: visit.requests.append(request.url))
    page.on("pageerror", lambda error: visit.problems.append(f"error: {error}"))
    page.on("dialog", lambda dialog: visit.problems.append(f"dialog: {dialog.message}"))

    def note(message: Any) -> None:
        is_expected = visit.is_failure_expected and "Failed to load resource" in message.text
        if message.type in ("error", "warning") and not is_expected:
            visit.problems.append(f"console: {message.text}")

    page.on("console", note)
    yield visit
    context.close()
    assert visit.problems == []
    # blob: is a file that the page saves
    elsewhere = [url for url in visit.requests if not url.startswith((f"{address}/", "blob:"))]
    assert elsewhere == []
    assert visit.requests


@pytest.fixture
def expect() -> Callable[..., Any]:
    playwright_api.expect.set_options(timeout=PATIENCE)
    return playwright_api.expect  # type: ignore[no-any-return]


def ask(address: str, name: str, **body: object) -> Any:
    """What the server answers to the page's request ``name``."""
    data = json.dumps({"model": "quickstart", **body}).encode()
    request = Request(f"{address}/api/{name}", data, {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as answer:
        return json.load(answer)


def next_token(address: str, **body: object) -> Any:
    return ask(address, "next", **{"prompt": PROMPT, "path": [], **body})


def visible(text: str) -> str:
    return text.replace(" ", "·").replace("\n", "↵")


def shown_bars(page: Any) -> list[tuple[str, str]]:
    """Token and probability of each bar."""
    rows = page.locator(".bars li")
    tokens = rows.locator(".token").all_inner_texts()
    figures = rows.locator(".figure:not(.model, .drawn-count)").all_inner_texts()
    return list(zip(tokens, figures, strict=True))


def shown(p: float) -> str:
    """A probability as the page shows it."""
    if p == 0:
        return "cut off"
    if p >= 0.0001:
        return f"{p:.4f}"
    digits, power = f"{p:.1e}".split("e")
    return f"{digits}·10{str(int(power)).translate(SUPERSCRIPT)}"


SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def expected_bars(answer: Any) -> list[tuple[str, str]]:
    return [(visible(bar["text"]), shown(bar["probability"])) for bar in answer["bars"]]


def save(page: Any, name: str) -> bytes:
    with page.expect_download() as download:
        page.get_by_role("button", name=name, exact=True).click()
    content = Path(download.value.path()).read_bytes()
    assert content
    return content


def table(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content.decode(), newline="")))


def take(page: Any, expect: Any, index: int) -> int:
    """Click on a bar and wait for the distribution after it; returns the token's id."""
    row = page.locator(".bars li").nth(index)
    token = int(row.get_attribute("data-token"))
    before = page.locator(".strip [role=option]").count()
    row.click()
    expect(page.locator(".strip [role=option]")).to_have_count(before + 1)
    return token


# --- next token -----------------------------------------------------------------------------------


def test_bars_follow_the_sliders(visit: Visit, address: str, expect: Any) -> None:
    page = visit.open()
    assert shown_bars(page) == expected_bars(next_token(address, bars=20))
    page.get_by_label("Top-k", exact=True).focus()
    for _ in range(13):  # off, 1000, 500, …, 8
        page.keyboard.press("ArrowLeft")
    expect(page.locator("#top_k")).to_have_attribute("aria-valuetext", "8")
    expect(page.locator(".bars .cut")).to_have_count(12)
    sampling = {"top_k": 8}
    assert shown_bars(page) == expected_bars(next_token(address, bars=20, sampling=sampling))
    # what is cut off keeps its outline
    outline = page.locator(".bars .cut .outline").first.bounding_box()
    assert outline["width"] > 10
    expect(page.locator(".bars .cut .fill").first).to_have_css("width", "0px")
    expect(page.locator(".facts")).to_contain_text("8 of 50,257")


def test_number_that_the_slider_does_not_have(visit: Visit, address: str, expect: Any) -> None:
    page = visit.open()
    page.get_by_label("Temperature, as a number").fill("0.33")
    page.keyboard.press("Enter")
    sampling = {"temperature": 0.33}
    expected = expected_bars(next_token(address, bars=20, sampling=sampling))
    expect(page.locator(".bars li .figure").nth(1)).to_have_text(expected[0][1])
    assert shown_bars(page) == expected


def test_server_explains_a_wrong_number(visit: Visit, expect: Any) -> None:
    visit.is_failure_expected = True
    page = visit.open()
    page.get_by_label("Temperature, as a number").fill("-1")
    page.keyboard.press("Enter")
    expect(page.locator("#view-next .status").first).to_contain_text("-1")
    page.get_by_label("Temperature, as a number").fill("1")
    page.keyboard.press("Enter")
    expect(page.locator("#view-next .status").first).to_be_empty()


def test_draws_beside_the_exact_bars(visit: Visit, address: str, expect: Any) -> None:
    page = visit.open()
    page.get_by_label("Draws").fill("2000")
    answer = next_token(address, bars=20, draws=2000, seed=123)
    counts = page.locator(".bars .drawn-count")
    expect(counts.first).to_have_text(str(answer["bars"][0]["drawn"]))
    assert counts.all_inner_texts() == [str(bar["drawn"]) for bar in answer["bars"]]


def test_path_is_a_tree(visit: Visit, address: str, expect: Any) -> None:
    """Take two tokens, walk back, take another one, compare the two paths."""
    page = visit.open()
    first = take(page, expect, 0)
    second = take(page, expect, 1)
    page.get_by_role("button", name="Walk back one token").click()
    expect(page.locator(".strip .taken")).to_have_count(1)
    third = take(page, expect, 2)
    assert third != second
    # one root, one token in common, two branches
    expect(page.locator(".tree button.token")).to_have_count(4)
    expect(page.locator(".tree ul ul > li")).to_have_count(2)

    rows = page.locator(".comparison tbody tr")
    expect(rows).to_have_count(2)
    expect(rows.nth(1)).to_contain_text("first difference")
    a, b = (next_token(address, path=[first, last])["path"] for last in (second, third))
    names = ("model_probability", "probability")
    products = [shown(path[0][name] * path[1][name]) for path in (a, b) for name in names]
    figures = page.locator(".comparison tfoot tr").first.locator(".figure")
    expect(figures).to_have_text(products)

    page.locator(".tree button.root").click()
    expect(page.locator(".strip .taken")).to_have_count(0)
    expect(page.locator(".tree button.token")).to_have_count(4)
    page.get_by_label("Prompt", exact=True).fill("Another text")
    expect(page.locator(".tree button.token")).to_have_count(0)


def test_keyboard_alone(visit: Visit, expect: Any) -> None:
    page = visit.open()
    page.locator(".bars").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    chosen = page.locator(".bars .active").get_attribute("data-token")
    page.keyboard.press("Enter")
    expect(page.locator(".strip .taken")).to_have_count(1)
    assert f"path={chosen}" in page.evaluate("import('/page/state.js').then(m => m.toHash())")
    expect(page.locator(".bars")).to_be_focused()
    page.keyboard.press("Backspace")
    expect(page.locator(".strip .taken")).to_have_count(0)
    # the tabs: one stop of the Tab key, then the arrow keys
    page.locator("#tab-next").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tab-text")).to_be_focused()
    expect(page.locator("#view-text")).to_be_visible()
    expect(page.locator("#view-next")).to_be_hidden()


def test_hover_shows_the_id(visit: Visit, address: str, expect: Any) -> None:
    page = visit.open()
    tokens = ask(address, "tokens", prompt=PROMPT, path=[])["tokens"]
    strip = page.locator(".strip [role=option]")
    assert strip.all_inner_texts() == [visible(token["text"]) for token in tokens]
    strip.nth(1).hover()
    expect(page.locator("#strip-detail")).to_contain_text(f"id {tokens[1]['id']},")


def test_old_answer_never_replaces_a_new_one(visit: Visit, address: str, expect: Any) -> None:
    """While a request is under way, only the newest of those after it is sent."""
    page = visit.open()
    requests: list[Any] = []

    def hold_the_first(route: Any) -> None:
        requests.append(route)
        if len(requests) > 1:
            route.continue_()

    page.route("**/api/next", hold_the_first)
    number = page.get_by_label("Temperature, as a number")
    for temperature in ("0.5", "0.7", "0.9", "1.7"):
        number.fill(temperature)
        page.keyboard.press("Enter")
        page.wait_for_timeout(100)
    assert len(requests) == 1
    requests[0].continue_()
    expected = expected_bars(next_token(address, bars=20, sampling={"temperature": 1.7}))
    expect(page.locator(".bars li .figure").nth(1)).to_have_text(expected[0][1])
    assert shown_bars(page) == expected
    assert len(requests) == 2


def test_prompt_longer_than_the_context(visit: Visit, expect: Any) -> None:
    page = visit.open(f"#prompt={'The tower clock. ' * 10}")
    expect(page.locator("#strip-detail")).to_contain_text("the model cannot read the first")
    assert page.locator(".strip .cropped").count() > 0


def test_slider_leaves_the_tokens_of_a_long_prompt(visit: Visit, address: str, expect: Any) -> None:
    """A change of a setting transfers no token of the prompt, and the strip stays."""
    prompt = "The tower clock." * 100
    page = visit.open(f"#prompt={prompt}")
    count = ask(address, "tokens", prompt=prompt, path=[])
    unread = page.locator(".strip .cropped")
    assert unread.count() == 50
    first = page.locator(".strip [role=option]").first
    number = count["cropped"] - 50
    expect(page.locator(".strip .hint")).to_have_text(f"{number:,} more …")
    first.hover()
    expect(page.locator("#strip-detail")).to_contain_text(f"Token {number + 1:,}: ")
    first.evaluate("token => (token.dataset.kept = 'yes')")
    with page.expect_response("**/api/next") as response:
        page.get_by_label("Temperature, as a number").fill("0.5")
        page.keyboard.press("Enter")
    assert "tokens" not in response.value.json()
    expected = expected_bars(
        next_token(address, prompt=prompt, bars=20, sampling={"temperature": 0.5})
    )
    expect(page.locator(".bars li .figure").nth(1)).to_have_text(expected[0][1])
    expect(first).to_have_attribute("data-kept", "yes")
    page.get_by_label("Prompt", exact=True).fill("Another text")
    expect(page.locator(".strip [role=option]")).to_have_text(["Another", "·text"])


def test_detail_of_a_taken_token_follows_the_settings(
    visit: Visit, address: str, expect: Any
) -> None:
    page = visit.open()
    token = take(page, expect, 0)
    page.locator(".strip .taken").hover()
    detail = page.locator("#strip-detail")
    for temperature in (1.0, 0.5):
        page.get_by_label("Temperature, as a number").fill(str(temperature))
        page.keyboard.press("Enter")
        sampling = {"temperature": temperature}
        (step,) = next_token(address, path=[token], sampling=sampling)["path"]
        expect(detail).to_contain_text(f"after your settings {shown(step['probability'])}")


def test_empty_prompt(visit: Visit, expect: Any) -> None:
    visit.is_failure_expected = True
    page = visit.open()
    page.get_by_label("Prompt", exact=True).fill("")
    expect(page.locator("#view-next .status").first).to_contain_text("is empty")


def test_text_is_never_html(visit: Visit, expect: Any) -> None:
    """In the prompt, in the tokens, in generated text, in a link, in the pictures."""
    attack = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    page = visit.open()
    page.get_by_label("Prompt", exact=True).fill(attack)
    expect(page.locator(".strip [role=option]").first).to_have_text("<")
    assert "".join(page.locator(".strip [role=option]").all_inner_texts()) == visible(attack)
    take(page, expect, 0)
    save(page, "Save next token as PNG")
    for tab in ("Text", "Side by side", "Inside"):
        page.get_by_role("tab", name=tab).click()
        for button in ("Generate", "Generate texts"):
            if page.get_by_role("button", name=button, exact=True).is_visible():
                page.get_by_role("button", name=button, exact=True).click()
        page.wait_for_timeout(500)
    page.reload()
    expect(page.locator("#prompt")).to_have_value(attack)
    assert page.locator("img, body script, iframe, object").count() == 0


# --- text -----------------------------------------------------------------------------------------


def test_generated_text_streams_in(visit: Visit, address: str, expect: Any) -> None:
    page = visit.open(f"#view=text&prompt={PROMPT}&max_new_tokens=12&temperature=0.8")
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.locator("#view-text .status")).to_have_text("12 tokens written.")
    assert page.locator(".shaded .prompt").inner_text() == PROMPT
    rows = table(save(page, "Save text as CSV"))
    assert len(rows) == 12
    # the same seed and settings give the same text
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.locator("#view-text .status")).to_have_text("12 tokens written.")
    assert table(save(page, "Save text as CSV")) == rows
    # the figures of a token are those of the distribution that it was drawn from
    path = [int(row["id"]) for row in rows]
    steps = next_token(address, path=path, sampling={"temperature": 0.8})["path"]
    assert [int(row["rank"]) for row in rows] == [step["rank"] for step in steps]
    page.locator(".shaded [role=option]").nth(3).hover()
    detail = page.locator("#view-text .detail")
    expect(detail).to_contain_text(f"id {path[3]},")
    expect(detail.locator(".candidates li")).to_have_count(5)
    page.locator(".shaded").focus()
    page.keyboard.press("End")
    expect(detail).to_contain_text(f"id {path[-1]},")
    assert save(page, "Save text as PNG").startswith(PNG)


def test_generation_stops(visit: Visit, expect: Any) -> None:
    page = visit.open(f"#view=text&prompt={PROMPT}&max_new_tokens=1000")
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.locator(".shaded [role=option]").nth(2)).to_be_attached()
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.locator("#view-text .status")).to_have_text("Stopped.")
    count = page.locator(".shaded [role=option]").count()
    assert 3 <= count < 1000
    page.wait_for_timeout(300)
    assert page.locator(".shaded [role=option]").count() == count


@pytest.mark.parametrize(
    ("view", "button"),
    [("text", "Generate"), ("text&mode=score", "Score"), ("compare", "Generate texts")],
)
def test_buttons_wait_for_the_models(visit: Visit, expect: Any, view: str, button: str) -> None:
    held: list[Any] = []
    visit.page.route("**/api/state", lambda route: held.append(route), times=1)
    page = visit.open(f"#view={view}&text=Nobody+came.")
    expect(page.get_by_role("button", name=button, exact=True)).to_be_disabled()
    while not held:
        page.wait_for_timeout(10)
    held[0].continue_()
    page.get_by_role("button", name=button, exact=True).click()
    expect(page.locator(".shaded [role=option]").nth(2)).to_be_attached()


def test_given_text_is_scored(visit: Visit, address: str, expect: Any) -> None:
    page = visit.open("#view=text")
    page.get_by_label("Score a text of yours").check()
    text = "The clock of the tower – 塔 – had stopped.\nNobody\tcame."
    page.get_by_label("Text to score").fill(text)
    page.get_by_role("button", name="Score", exact=True).click()
    answer = ask(address, "score", text=text)
    expect(page.locator("#view-text .facts")).to_contain_text(f"{answer['loss']:.3f} nats")
    for name in ("perplexity", "bits_per_byte"):
        decimals = 3 if name == "bits_per_byte" else 2
        expect(page.locator("#view-text .facts")).to_contain_text(f"{answer[name]:,.{decimals}f}")
    # a character of several tokens is whole; signs for line breaks are not part of the text
    assert page.locator(".shaded").inner_text().replace("↵", "") == text
    rows = table(save(page, "Save text as CSV"))
    assert [int(row["id"]) for row in rows] == [token["id"] for token in answer["tokens"]]
    surprisals = [token["surprisal"] for token in answer["tokens"]]
    assert [float(row["surprisal"]) for row in rows[1:]] == pytest.approx(surprisals[1:])


def test_incomplete_character_at_the_end_of_a_text(visit: Visit, expect: Any) -> None:
    """The page shows U+FFFD for it, as ``generate`` does."""
    page = visit.open("#view=text&prompt=A")
    token = {"id": 5, "text": "\ufffd", "bytes": "f09f"}
    score = {"surprisal": 1.0, "rank": 2, "candidates": []}
    events = [{"token": token, **score}, {"done": "length", "error": None}]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    page.route(
        "**/api/generate",
        lambda route: route.fulfill(content_type="text/event-stream", body=body),
    )
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.locator("#view-text .status")).to_have_text("1 token written.")
    expect(page.locator(".shaded")).to_have_text("A\ufffd")


# --- side by side -----------------------------------------------------------------------------------


def test_side_by_side(visit: Visit, address: str, expect: Any) -> None:
    link = f"#view=compare&prompt={PROMPT}&models=quickstart&models=other&max_new_tokens=8"
    page = visit.open(link)
    page.get_by_role("button", name="Generate texts").click()
    columns = page.locator(".side-by-side section")
    expect(columns).to_have_count(2)
    for index in range(2):
        expect(columns.nth(index).locator("[role=option]")).to_have_count(8)
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_disabled()
    rows = table(save(page, "Save texts side by side as CSV"))
    texts = [
        [row["id"] for row in rows if row["model"] == name] for name in ("quickstart", "other")
    ]
    pairs = list(zip(*texts, strict=True))
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    assert first is not None, "two models with different weights wrote the same text"
    expect(page.locator(".difference")).to_contain_text(f"first differ at new token {first + 1}:")
    assert page.locator(".side-by-side .differs").count() == 2

    answers = {name: next_token(address, model=name, bars=300) for name in ("quickstart", "other")}
    for row in table(save(page, "Save next token side by side as CSV")):
        bars = {bar["id"]: bar for bar in answers[row["model"]]["bars"]}
        assert float(row["probability"]) == bars[int(row["id"])]["probability"]
    assert save(page, "Save texts side by side as PNG").startswith(PNG)
    assert save(page, "Save next token side by side as PNG").startswith(PNG)


def test_checkpoints_of_a_run_can_be_chosen(visit: Visit, expect: Any) -> None:
    page = visit.open(f"#view=compare&prompt={PROMPT}&models=quickstart")
    page.get_by_role("checkbox", name="quickstart/best").check()
    headers = page.locator(".distributions .model-name")
    expect(headers).to_have_count(2)
    expect(headers.nth(1)).to_contain_text("quickstart/best, step ")


# --- inside -------------------------------------------------------------------------------------------


def test_logit_lens(visit: Visit, address: str, expect: Any) -> None:
    page = visit.open(f"#view=inside&prompt={PROMPT}")
    answer = ask(address, "lens", prompt=PROMPT, path=[], positions=12)
    cells = page.locator(".lens [role=gridcell]")
    expect(cells).to_have_count(len(answer["tokens"]) * len(answer["layers"]))
    tops = [p["top"][0] for layer in answer["layers"] for p in layer["positions"]]
    assert cells.all_inner_texts() == [visible(top["text"]) for top in tops]
    cells.first.click()
    detail = page.locator("#view-inside .detail")
    expect(detail).to_contain_text("embedding")
    expect(detail.locator(".candidates li")).to_have_count(5)
    rows = table(save(page, "Save layers as CSV"))
    assert float(rows[0]["probability"]) == tops[0]["probability"]
    assert save(page, "Save layers as PNG").startswith(PNG)


def test_attention_map(visit: Visit, address: str, expect: Any) -> None:
    page = visit.open(f"#view=inside&prompt={PROMPT}")
    canvas = page.locator("canvas")
    expect(canvas).to_have_css("display", "block")
    page.locator("#layer").select_option(label="2")
    page.locator("#head").select_option(label="2")
    weights = ask(address, "attention", prompt=PROMPT, path=[], layer=1, head=1)["weights"]
    last = len(weights) - 1
    readout = page.locator(".readout")
    expect(readout).to_contain_text("Point at the map")
    canvas.focus()
    page.keyboard.press("ArrowRight")
    expect(readout).to_contain_text(f"weight {shown(weights[last][0])}.")
    page.keyboard.press("ArrowUp")
    expect(readout).to_contain_text(f"weight {shown(weights[last - 1][0])}.")
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 10, box["y"] + box["height"] - 10)
    expect(readout).to_contain_text(f"weight {shown(weights[last][last])}.")
    rows = list(csv.reader(io.StringIO(save(page, "Save attention as CSV").decode(), newline="")))
    assert [float(weight) for weight in rows[-1][1:]] == pytest.approx(weights[last])
    assert save(page, "Save attention as PNG").startswith(PNG)


# --- the page itself ------------------------------------------------------------------------------------


def test_link_restores_everything(visit: Visit, expect: Any) -> None:
    page = visit.open()
    first = take(page, expect, 3)
    page.get_by_role("button", name="Walk back one token").click()
    expect(page.locator(".strip .taken")).to_have_count(0)
    second = take(page, expect, 1)
    page.get_by_label("Top-p, as a number").fill("0.8")
    page.keyboard.press("Enter")
    page.get_by_label("Draws").fill("100")
    expect(page.locator(".columns.has-draws")).to_be_visible()
    page.get_by_role("button", name="Copy link").click()
    link = page.url
    assert f"path={second}" in link
    assert f"paths={first}_{second}" in link
    before = shown_bars(page)
    page.goto("about:blank")
    page.goto(link)
    expect(page.locator(".columns.has-draws")).to_be_visible()
    expect(page.locator(".tree button.token")).to_have_count(3)
    assert shown_bars(page) == before
    expect(page.locator("#top_p")).to_have_attribute("aria-valuetext", "0.8")
    visit.requests = [url for url in visit.requests if url != "about:blank"]


def open_link(page: Any, link: str) -> None:
    """Change the address of the open page, as a link to it or the address bar does."""
    page.evaluate("link => (location.hash = link)", link)


def test_link_keeps_a_path_that_equals_the_present_one(visit: Visit, expect: Any) -> None:
    page = visit.open(f"#prompt={PROMPT}&path=5.6")
    expect(page.locator(".strip .taken")).to_have_count(2)
    open_link(page, "#prompt=Another text&path=5.6")
    expect(page.locator(".strip [role=option]").first).to_have_text("Another")
    expect(page.locator(".strip .taken")).to_have_count(2)
    expect(page.locator("#prompt")).to_have_value("Another text")


def test_link_with_an_unknown_model(visit: Visit, address: str, expect: Any) -> None:
    """The page takes the first model, says so, and goes on."""
    notices = visit.open(f"#model=gone&prompt={PROMPT}").locator("#notices")
    page = visit.page
    said = "The server has no model “gone”. The page shows quickstart."
    expect(notices).to_have_text(said)
    assert shown_bars(page) == expected_bars(next_token(address, bars=20))
    page.locator("#model").select_option("other")
    expect(notices).to_be_empty()
    open_link(page, f"#model=gone&models=gone&models=other&prompt={PROMPT}")
    expect(notices).to_have_text(said)
    expect(page.locator("#model")).to_have_value("quickstart")
    page.get_by_role("tab", name="Side by side").click()
    expect(page.locator(".distributions .model-name")).to_have_count(1)
    page.get_by_role("button", name="Generate texts").click()
    expect(page.locator(".side-by-side section")).to_have_count(1)


def test_names_of_a_link_in_another_vocabulary(visit: Visit, address: str, expect: Any) -> None:
    """The names of tokens are asked for again when another tokenizer may give them other texts."""
    link = f"prompt={PROMPT}&paths=40000_40001"
    ids = [40000, 40001]
    names = [visible(t["text"]) for t in ask(address, "tokens", prompt="", path=ids)["tokens"]]
    page = visit.open(f"#{link}")
    tokens = page.locator(".tree button.token:not(.root)")
    expect(tokens).to_have_text(names)

    def with_another_size(route: Any) -> None:
        content = route.fetch().json()
        for model in content["models"]:
            if model["id"] == "other":
                model["vocab_size"] = 1000
        route.fulfill(json=content)

    page.route("**/api/state", with_another_size)
    with page.expect_response("**/api/state"):
        pass
    page.wait_for_timeout(300)
    page.locator("#model").select_option("other")
    expect(tokens).to_have_count(0)
    open_link(page, f"#model=other&{link}")
    expect(tokens).to_have_text(names)
    page.unroute("**/api/state")


def test_chosen_checkpoint_leaves_the_list(visit: Visit, expect: Any) -> None:
    page = visit.open(f"#model=quickstart/best&prompt={PROMPT}&path=5")
    expect(page.locator("#model")).to_have_value("quickstart/best")

    def without_best(route: Any) -> None:
        content = route.fetch().json()
        models = [model for model in content["models"] if model["id"] != "quickstart/best"]
        route.fulfill(json={**content, "models": models})

    page.route("**/api/state", without_best)
    expect(page.locator("#model")).to_have_value("quickstart")
    expect(page.locator("#notices")).to_contain_text("has no model “quickstart/best”")
    expect(page.locator(".strip .taken")).to_have_count(1)  # of the same run: the same tokens
    page.unroute("**/api/state")


def test_long_prompt_is_not_in_the_link(visit: Visit, expect: Any) -> None:
    page = visit.open()
    take(page, expect, 0)
    hash_of = "import('/page/state.js').then(m => m.toHash())"
    assert "path=" in page.evaluate(hash_of)
    page.get_by_label("Prompt", exact=True).fill("a" * 4001)
    expect(page.locator(".strip .cropped").first).to_be_attached()
    page.locator(".bars li").first.click()
    expect(page.locator(".strip .taken")).to_have_count(1)
    for name in ("prompt=", "path=", "paths="):  # a path after another prompt would mislead
        assert name not in page.evaluate(hash_of)
    page.get_by_role("button", name="Copy link").click()
    expect(page.locator("#copy-link")).not_to_have_text("Link copied")


def test_csv_has_no_formulas(visit: Visit) -> None:
    page = visit.open()
    text = page.evaluate(
        """() => import("/page/save.js").then(({ toCsv }) => toCsv([
            ["=1+1", "+1", "-1", "@A1", "\\t=1", "a=1", -1.5, null, '=A,"b"']
        ]))"""
    )
    assert next(csv.reader(io.StringIO(text, newline=""))) == [
        "'=1+1", "'+1", "'-1", "'@A1", "'\t=1", "a=1", "-1.5", "", "'=A,\"b\"",
    ]  # fmt: skip


def test_damaged_link(visit: Visit, expect: Any) -> None:
    page = visit.open("#prompt=Hi&path=1.x.-3&paths=%%%&temperature=abc&model=none&seed=&top_k=")
    expect(page.locator(".strip [role=option]").first).to_have_text("Hi")
    expect(page.locator("#temperature")).to_have_attribute("aria-valuetext", "1")


def test_next_token_is_saved(visit: Visit, address: str) -> None:
    page = visit.open()
    rows = table(save(page, "Save next token as CSV"))
    bars = next_token(address, bars=20)["bars"]
    # a text that a spreadsheet would run as a formula begins with an apostrophe
    assert [re.sub(r"^'(?=[=+\-@\t\r\n])", "", row["text"]) for row in rows] == [
        bar["text"] for bar in bars
    ]
    assert [float(row["probability"]) for row in rows] == [bar["probability"] for bar in bars]
    assert save(page, "Save next token as PNG").startswith(PNG)


def test_busy_model(visit: Visit, expect: Any) -> None:
    """The page says that the model is busy, waits as long as the server asks, and tries again."""
    visit.is_failure_expected = True
    answers = iter([True, False])
    page = visit.page

    def answer(route: Any) -> None:
        if next(answers, False):
            error = {"message": "busy", "type": "rate_limit_error", "param": None, "code": None}
            body = json.dumps({"error": error})
            route.fulfill(status=429, headers={"Retry-After": "2"}, body=body)
        else:
            route.continue_()

    page.route("**/api/next", answer)
    page.goto(f"{visit.address}/#prompt={PROMPT}")
    expect(page.locator("#view-next .status").first).to_contain_text("tries again in 2 seconds")
    page.locator(".bars li").first.wait_for()
    expect(page.locator("#view-next .status").first).to_be_empty()


def test_failure_can_be_tried_again(visit: Visit, expect: Any) -> None:
    visit.is_failure_expected = True
    page = visit.page
    error = {
        "message": "logits: a row has NaN",
        "type": "server_error",
        "param": None,
        "code": None,
    }
    page.route(
        "**/api/next", lambda route: route.fulfill(status=500, body=json.dumps({"error": error}))
    )
    page.goto(f"{visit.address}/#prompt={PROMPT}")
    expect(page.locator("#view-next .status").first).to_contain_text("logits: a row has NaN")
    page.unroute("**/api/next")
    page.get_by_role("button", name="Try again").first.click()
    page.locator(".bars li").first.wait_for()


def test_access_token_is_asked_for(visit: Visit, expect: Any) -> None:
    visit.is_failure_expected = True
    page = visit.page

    def answer(route: Any) -> None:
        if route.request.headers.get("authorization") == "Bearer secret":
            route.continue_()
        else:
            error = {"message": "no token", "type": "x", "param": None, "code": None}
            route.fulfill(status=401, body=json.dumps({"error": error}))

    page.route("**/api/**", answer)
    page.goto(f"{visit.address}/#prompt={PROMPT}")
    field = page.get_by_label("This server needs its access token.")
    field.fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#access-message")).to_contain_text("refused")
    field.fill("secret")
    page.keyboard.press("Enter")
    page.locator(".bars li").first.wait_for()
    expect(page.locator("#access")).to_be_hidden()


def test_new_checkpoint_is_noticed(
    visit: Visit, address: str, run_folder: Path, other_run: Path, expect: Any
) -> None:
    page = visit.open()
    before = shown_bars(page)
    arrived = run_folder / "arriving.tmp"
    original = run_folder / "last.ckpt"
    saved = original.read_bytes()
    try:
        shutil.copy(other_run / "last.ckpt", arrived)
        os.replace(arrived, original)
        notice = page.locator("#notices .notice")
        expect(notice).to_contain_text(f"quickstart has a new checkpoint: step {OTHER_STEPS}.")
        assert shown_bars(page) == before
        notice.get_by_role("button", name="Load it").click()
        expect(page.locator("#model option:checked")).to_have_text(
            f"quickstart, step {OTHER_STEPS}"
        )
        expect(notice).to_have_count(0)
        other = expected_bars(next_token(address, model="other", bars=20))
        expect(page.locator(".bars li .token").first).to_have_text(other[0][0])
        expect(page.locator(".bars li .figure").nth(1)).to_have_text(other[0][1])
        assert shown_bars(page) == other
    finally:
        # the next one is loaded without a click
        page.get_by_label("Load new checkpoints at once").check()
        arrived.write_bytes(saved)
        os.replace(arrived, original)
    expect(page.locator("#model option:checked")).to_have_text(f"quickstart, step {STEPS}")
    expect(page.locator(".bars li .figure").nth(1)).to_have_text(before[0][1])
    assert shown_bars(page) == before


def test_damaged_checkpoint_is_tried_once(visit: Visit, run_folder: Path, expect: Any) -> None:
    """The reason stays on the page; "Load new checkpoints at once" waits for a newer file."""
    visit.is_failure_expected = True
    page = visit.open()
    original = run_folder / "last.ckpt"
    arrived = run_folder / "arriving.tmp"
    saved = original.read_bytes()
    loads = [0]
    page.on("request", lambda request: loads.append(1) if "/api/load" in request.url else None)
    notice = page.locator("#notices .notice")
    follow = page.get_by_label("Load new checkpoints at once")
    try:
        arrived.write_bytes(saved[: len(saved) // 2])
        os.replace(arrived, original)
        expect(notice).to_contain_text("The file of quickstart has changed.")
        notice.get_by_role("button", name="Load it").click()
        expect(notice).to_contain_text("cannot be read")
        with page.expect_response("**/api/state"):
            pass
        page.wait_for_timeout(500)
        expect(notice).to_contain_text("cannot be read")
        assert sum(loads) == 1
        follow.check()
        arrived.write_bytes(saved[: len(saved) // 3])
        os.replace(arrived, original)
        with page.expect_response("**/api/load"):
            pass
        page.wait_for_timeout(5000)
        assert sum(loads) == 2
        expect(notice).to_contain_text("cannot be read")
    finally:
        arrived.write_bytes(saved)
        os.replace(arrived, original)
    expect(notice).to_have_count(0)
    assert sum(loads) == 3


@pytest.mark.parametrize("view", ["next", "text", "compare", "inside"])
def test_every_control_has_a_name(visit: Visit, view: str) -> None:
    page = visit.open(f"#view={view}&prompt={PROMPT}")
    page.wait_for_timeout(500)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button, canvas, [tabindex='0']")]
            .filter((control) => !(control.labels?.length || control.ariaLabel || control.textContent.trim()))
            .map((control) => control.outerHTML)"""
    )
    assert nameless == []


@pytest.mark.parametrize("visit", [{"viewport": {"width": 400, "height": 800}}], indirect=True)
def test_narrow_screen_needs_no_sideways_scrolling(visit: Visit, expect: Any) -> None:
    page = visit.open()
    take(page, expect, 0)
    page.get_by_role("button", name="Walk back one token").click()
    expect(page.locator(".strip .taken")).to_have_count(0)
    take(page, expect, 1)
    page.locator("summary").click()
    for tab in ("Next token", "Text", "Side by side", "Inside"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(500)
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 400, tab


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast(visit: Visit, theme: str) -> None:
    """At least 4.5 : 1 (WCAG AA) on the paper and on the strongest shades."""
    page = visit.open()
    page.locator("#theme").select_option(theme)
    pairs = [
        ("--ink", "--paper"),
        ("--muted", "--paper"),
        ("--muted", "--surface"),
        ("--ink", "--surprise"),
        ("--ink", "--probability"),
        ("--ink", "--taken"),
    ]
    colors = page.evaluate(
        """(pairs) => import("/page/picture.js").then(({ color }) => {
            const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
            return pairs.map((pair) => pair.map((name) => {
                context.fillStyle = color(name);
                context.fillRect(0, 0, 1, 1);
                return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
            }));
        })""",
        pairs,
    )
    for names, (a, b) in zip(pairs, colors, strict=True):
        lighter, darker = sorted((luminance(a), luminance(b)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (theme, names)
    light = luminance(colors[0][1])
    assert light > 0.5 if theme == "light" else light < 0.1


def luminance(color: list[int]) -> float:
    """Relative luminance of an sRGB color, as WCAG defines it."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (v / 255 for v in color)
    ]
    return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_first_paint(visit: Visit) -> None:
    """At most 0.5 seconds after the address is opened; the best of three, as the machine has other work."""
    times = []
    for _ in range(3):
        page = visit.open()
        times.append(
            page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        )
        page.goto("about:blank")
    visit.requests = [url for url in visit.requests if url != "about:blank"]
    assert min(times) <= 500, times
