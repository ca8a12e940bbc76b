"""The page: its files and headers here, the page itself in headless Chromium where there is one."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.serving.pictures import file_of, shade
from tests.serving.test_limits import wait_for
from transformers_dsv3.serving.app import PAGE


FOLDER = Path(__file__).parents[2] / "transformers_dsv3" / "serving" / "page"


def test_files_come_with_a_strict_policy(echo):
    for path, (name, kind) in PAGE.items():
        answer = echo.get(f"/{path}")
        assert answer.status == 200 and answer.headers["content-type"] == kind
        assert answer.body == (FOLDER / name).read_bytes()
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'") and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert {name for name, _ in PAGE.values()} == {path.name for path in FOLDER.iterdir()}


def test_nothing_is_asked_of_anywhere_else():
    for path in FOLDER.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text), path.name
        assert "innerHTML" not in text and "style=" not in text and "onclick=" not in text


def test_what_the_script_looks_for_is_on_the_page():
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    page = (FOLDER / "page.html").read_text(encoding="utf-8")
    names = set(re.findall(r'\$\("([\w-]+)"\)', script))
    assert len(names) > 20
    assert names <= set(re.findall(r'id="([\w-]+)"', page))


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# The browser's speech, which a machine without sound does not have
SPEECH = """
window.spoken = [];
window.SpeechSynthesisUtterance = class { constructor(text) { this.text = text; } };
Object.defineProperty(window, 'speechSynthesis', {
  value: { cancel() {}, speak(one) { window.spoken.push(one.text); } }, configurable: true });
window.SpeechRecognition = window.webkitSpeechRecognition = class {
  start() { this.onresult({ results: [[{ transcript: 'what I said' }]] }); this.onend(); }
  stop() {} };
"""
NO_SPEECH = """
for (const name of ['SpeechRecognition', 'webkitSpeechRecognition', 'speechSynthesis'])
  Object.defineProperty(window, name, { value: undefined });
"""


def expect(locator):
    from playwright.sync_api import expect

    return expect(locator)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium (Debian's `chromium`)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Function from a server's client to its page; requests to anywhere else and errors in the console fail."""
    contexts, asked, said = [], [], []

    def open_one(client, init="", ready="#model option", **options):
        context = browser.new_context(**{"locale": "en-GB", **options})
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        if init:
            page.add_init_script(init)
        page.address = client.address
        page.goto(client.address)
        page.wait_for_selector(ready, state="attached")
        return page

    yield open_one
    addresses = {page.address for context in contexts for page in context.pages}
    for context in contexts:
        context.close()
    assert all(url.startswith(tuple(addresses)) for url in asked), asked
    expected = ("the server responded with a status of 4", "ERR_INCOMPLETE_CHUNKED_ENCODING")
    assert not [one for one in said if not any(text in one for text in expected)], said


def ask(page, text):
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")


@pytest.mark.slow
def test_a_question_is_answered_word_by_word(open_page, echo):
    page = open_page(echo)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Most tokens").fill("12")
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Close").click()
    ask(page, "Hello <b>there</b>")
    page.wait_for_selector("article.assistant .tools")
    assert page.locator("article.user .text").inner_text() == "Hello <b>there</b>"
    assert page.locator("article.assistant .text").inner_text() == "User: Hello "
    assert re.search(
        r"12 tokens, first after \d+ ms, [\d.]+ tokens a second, cut", page.locator("#status").inner_text()
    )
    request = echo.engine.seen[-1]
    assert request.settings.temperature == 0 and request.settings.max_new_tokens == 12
    page.reload()  # settings are kept
    page.wait_for_selector("#model option", state="attached")
    assert page.locator("#max_tokens").input_value() == "12"


@pytest.mark.slow
def test_an_answer_is_stopped(open_page, serve, make_engine):
    engine = make_engine(step=0.02, max_sequence=100_000)
    page = open_page(serve(engine))
    for how in ("button", "key"):
        ask(page, "Hello")
        expect(page.locator("article.assistant .text").last).to_have_text(re.compile("...."))
        if how == "button":
            page.get_by_role("button", name="Stop").click()
        else:
            page.keyboard.press("Escape")
        expect(page.locator("#status")).to_contain_text("stopped")
        assert page.locator("#stop").is_hidden()
    wait_for(lambda: len(engine.cancelled) == 2)  # the page says so before the server knows
    assert not engine.states
    page.get_by_role("button", name="New chat").click()
    assert page.locator("article").count() == 0


@pytest.mark.slow
def test_errors_are_said_and_a_key_is_asked_for(open_page, serve, make_engine):
    page = open_page(serve(make_engine(), api_keys=("secret",)), ready="dialog[open]")
    page.get_by_label("API key").fill("secret")
    page.get_by_role("button", name="Close").click()
    page.wait_for_selector("#model option", state="attached")
    ask(page, "a" * 1000)
    expect(page.locator("#error")).to_contain_text("tokens or more")
    assert page.locator("article.assistant").count() == 0
    assert not page.evaluate("Object.values(localStorage).includes('secret')")


@pytest.mark.slow
def test_voice_where_the_browser_has_it(open_page, echo):
    page = open_page(echo, init=SPEECH)
    page.get_by_role("button", name="Speak").click()
    assert page.locator("#question").input_value() == "what I said"
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Most tokens").fill("5")
    page.get_by_label("Read answers aloud").check()
    page.get_by_role("button", name="Close").click()
    ask(page, "Hello")
    page.get_by_role("button", name="Read aloud").click()
    assert page.evaluate("window.spoken") == ["User:", "User:"]
    page = open_page(echo, init=NO_SPEECH)
    assert page.locator("#listen").is_hidden() and not page.get_by_label("Read answers aloud").is_visible()


CHOSEN = [{"name": f"{name}.png", "mimeType": "image/png", "buffer": file_of(shade(value))}
          for name, value in (("red", 200), ("blue", 3))]  # fmt: skip
# What a browser tells of files that come by the clipboard or the mouse
GIVE = """([kind, bytes, type]) => {
  const data = new DataTransfer();
  data.items.add(new File([Uint8Array.from(bytes)], `${kind}.png`, { type }));
  const given = kind === 'paste' ? { clipboardData: data } : { dataTransfer: data };
  const of = kind === 'paste' ? ClipboardEvent : DragEvent;
  document.dispatchEvent(new of(kind, { bubbles: true, cancelable: true, ...given }));
}"""


@pytest.mark.slow
def test_pictures_are_chosen_pasted_and_dropped(open_page, picture_server, echo):
    page = open_page(picture_server, init=NO_SPEECH)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Most tokens").fill("6")
    page.get_by_role("button", name="Close").click()
    page.locator("#files").set_input_files(CHOSEN)
    for kind in ("paste", "drop"):
        page.evaluate(GIVE, [kind, list(file_of(shade(90))), "image/png"])
    shown = page.get_by_role("list", name="Pictures to be sent").get_by_role("img")
    expect(shown).to_have_count(4)
    assert [one.get_attribute("alt") for one in shown.all()] == ["red.png", "blue.png", "paste.png", "drop.png"]
    assert shown.first.evaluate("image => image.naturalWidth") == 20  # the policy lets it be seen
    page.get_by_label("Your message").focus()
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.ariaLabel") == "Remove drop.png"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.ariaLabel") == "Remove paste.png"
    expect(page.locator("#status")).to_have_text("drop.png was removed.")
    page.keyboard.press("Tab")
    page.keyboard.type("What is it?")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Add pictures"
    page.get_by_role("button", name="Send").click()
    page.wait_for_selector("article.assistant .tools")
    assert page.locator("article.user img").count() == 3 and page.locator("#pictures").is_hidden()
    page.get_by_text("Experts of the last answer").click()
    page.wait_for_selector("#routing-table table")
    ask(page, "And now?")  # the pictures go along
    expect(page.locator("article.assistant .tools")).to_have_count(2)

    page.evaluate(GIVE, ["drop", [1, 2, 3], "image/png"])
    ask(page, "Look")
    expect(page.locator("#error")).to_contain_text("is no picture of PNG")
    expect(shown).to_have_count(1)  # to be removed, and the question asked again
    assert page.locator("#question").input_value() == "Look" and page.locator("article.user").count() == 2
    page.evaluate(GIVE, ["drop", [1], "text/plain"])
    expect(page.locator("#error")).to_have_text("drop.png is no picture.")

    page = open_page(echo, init=NO_SPEECH)
    assert page.locator("#add").is_hidden()
    page.evaluate(GIVE, ["paste", [1], "image/png"])
    expect(page.locator("#error")).to_have_text("This model reads text alone.")


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_no_violation_with_pictures(open_page, picture_server, theme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")
    screen = {"width": 360, "height": 740}
    page = open_page(picture_server, init=SPEECH, color_scheme=theme, viewport=screen, bypass_csp=True)
    page.locator("#files").set_input_files(CHOSEN)
    expect(page.locator("#pictures li")).to_have_count(2)
    assert not axe.Axe().run(page).response["violations"]
    ask(page, "What is it?")
    page.wait_for_selector("article.assistant .tools")
    assert not axe.Axe().run(page).response["violations"]
    assert page.evaluate("document.documentElement.scrollWidth") <= screen["width"]


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("screen", [(1280, 900), (360, 740)], ids=["desk", "phone"])
def test_axe_finds_no_violation(open_page, model_server, theme, screen):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")
    page = open_page(
        model_server, init=SPEECH, color_scheme=theme, viewport={"width": screen[0], "height": screen[1]},
        bypass_csp=True,  # axe comes into the page from outside
    )  # fmt: skip

    def check(where):
        found = axe.Axe().run(page).response["violations"]
        assert not found, f"{where}: {json.dumps([[one['id'], [n['html'] for n in one['nodes']]] for one in found])}"

    check("empty")
    page.get_by_role("button", name="Settings").click()
    check("settings")
    page.get_by_label("Most tokens").fill("30")
    page.get_by_role("button", name="Close").click()
    ask(page, "def main(")
    page.wait_for_selector("article.assistant .tools")
    page.get_by_text("Experts of the last answer").click()
    page.wait_for_selector("#routing-table table")
    check("answered")
    assert page.evaluate("document.documentElement.scrollWidth") <= screen[0]  # nothing to be scrolled sideways


@pytest.mark.slow
def test_everything_is_reached_by_the_keyboard(open_page, model_server):
    page = open_page(model_server, init=SPEECH)
    page.get_by_label("Your message").focus()
    page.keyboard.type("def main(")
    page.keyboard.press("Enter")
    page.wait_for_selector("article.assistant .tools")
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.textContent.trim() || document.activeElement.id"))
    first = reached.index("Skip to your message")
    names = ["Skip to your message", "New chat", "Settings", "Read aloud", "Experts of the last answer", "question"]
    assert reached[first : first + 8] == [*names, "Speak", "Send"]
    assert page.locator("#log").get_attribute("aria-busy") == "false"
