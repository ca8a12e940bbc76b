"""Pictures of the page for examples/serve.md, of a server that runs.

python tests/serving/screenshots.py ADDRESS FOLDER
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright


QUESTION = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push("
SCREENS = {
    "serve-page.png": {"viewport": {"width": 1000, "height": 760}, "color_scheme": "light"},
    "serve-page-phone.png": {"viewport": {"width": 390, "height": 760}, "color_scheme": "dark"},
}


def main(address: str, folder: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, screen in SCREENS.items():
            page = browser.new_context(locale="en-GB", **screen).new_page()
            page.goto(address)
            page.wait_for_selector("#model option", state="attached")
            page.get_by_role("button", name="Settings").click()
            page.get_by_label("Most tokens").fill("60")
            page.get_by_label("Temperature").fill("0.7")
            page.get_by_label("Seed").fill("3")
            page.get_by_role("button", name="Close").click()
            page.get_by_label("Your message").fill(QUESTION)
            page.keyboard.press("Enter")
            page.wait_for_selector("article.assistant .tools")
            page.get_by_text("Experts of the last answer").click()
            page.wait_for_selector("#routing-table table")
            page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
            page.screenshot(path=folder / name)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
