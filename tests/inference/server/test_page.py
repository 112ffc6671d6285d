"""The page in a real browser: a prompt typed, tokens with depths, what a token shows, errors."""

import shutil

import pytest
from fake_engine import FakeEngine

from ouro_jax.data.tokenizer import encode
from ouro_jax.inference.server.app import Limits

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    with pytest.importorskip("playwright.sync_api").sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page of phone width that fails the test on any error in its script or its policies."""
    page = browser.new_page(viewport={"width": 390, "height": 780})
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    yield page
    page.close()
    assert not problems


def test_a_conversation(serve, page, tokenizer):
    script = encode(tokenizer, "the cat <b>sat</b>\non the mat")
    engine = FakeEngine("exited", script=script, seconds=0.01)
    with serve(engine, FakeEngine("full", loops=6)) as client:
        page.goto(str(client.base_url))
        page.wait_for_selector("#name:has-text('tiny')")
        assert page.locator("#legend b").count() == 4
        page.evaluate(f"at('max_tokens').value = {len(script)}")
        page.get_by_role("textbox", name="Message").fill("hello")
        page.keyboard.press("Enter")
        page.wait_for_selector(".token")
        assert page.get_by_role("button", name="Stop").is_visible()
        page.wait_for_selector(".answer footer")
        # Text of a model is text, not HTML.
        assert page.locator(".answer > span").inner_text() == "the cat <b>sat</b>\non the mat"
        depths = [1 + (token + i) % 4 for i, token in enumerate(script)]
        mean = sum(depths) / len(depths)
        footer = page.locator(".answer footer").inner_text()
        assert f"mean depth {mean:.2f} of 4" in footer
        assert f"{100 * (1 - mean / 4):.0f} % compute saved" in footer.replace("\n", " ")
        hues = page.locator(".token").evaluate_all("s => s.map(x => x.style.cssText)")
        assert len(set(hues)) == len(set(depths))
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        # By keyboard: Tab reaches the answer's first token, arrows walk on.
        page.locator(".token").first.focus()
        page.keyboard.press("ArrowRight")
        tip = page.locator("#tip")
        assert tip.is_visible() and f"after loop {depths[1]} of 4" in tip.inner_text()
        assert tip.locator("tr").count() == 1 + 4 and "25 %" in tip.inner_text()
        page.keyboard.press("Escape")
        assert not tip.is_visible()
        # One token may hold a whole tag.
        page.evaluate("showToken(at('name'), { text: '<i>', depth: 1, readouts: [] }, 4)")
        assert page.locator("#name").inner_text() == "tiny<i>"
        # The second message goes with the first and its answer.
        page.get_by_role("textbox", name="Message").fill("and then?")
        page.keyboard.press("Enter")
        page.locator(".answer footer").nth(1).wait_for()
        assert page.evaluate("messages.map(m => m.role).join()") == "user,assistant,user,assistant"


def test_settings_stop_and_errors(serve, page, until_free):
    engine = FakeEngine("exited", seconds=0.05)
    with serve(engine, FakeEngine("full", loops=6), limits=Limits(api_key="k")) as client:
        client.headers["authorization"] = "Bearer k"
        page.goto(str(client.base_url))
        page.wait_for_selector(".error")
        assert "missing key" in page.locator(".error").inner_text()
        page.get_by_text("Settings").click()
        page.get_by_label("API key").fill("k")
        page.get_by_label("API key").press("Tab")
        page.wait_for_selector("#name:has-text('tiny')")
        page.get_by_label("Exit rule").select_option("q")
        page.get_by_label("Keys and values").select_option("full")
        assert page.locator("#legend b").count() == 4
        page.get_by_role("spinbutton", name="Loops").fill("6")
        assert page.locator("#legend b").count() == 6
        page.get_by_label("Keys and values").select_option("exited")
        page.get_by_label("What to do").select_option("text")
        page.get_by_label("Most tokens").fill("200")
        page.get_by_role("textbox", name="Text to continue").fill("the cat")
        with page.expect_request("**/v1/completions") as asked:
            page.get_by_role("button", name="Send").click()
        sent = asked.value.post_data_json
        assert (sent["exit"], sent["kv"], sent["loops"], sent["max_tokens"]) == (
            "q:0.8", "exited", 4, 200,
        )  # fmt: skip
        page.wait_for_selector(".token")
        page.get_by_role("button", name="Stop").click()
        page.wait_for_selector(".answer footer")
        until_free(client)
        assert engine.cancelled
        page.get_by_label("Most tokens").fill("999")
        page.get_by_role("textbox", name="Text to continue").fill("the cat")
        page.get_by_role("button", name="Send").click()
        page.locator(".error").nth(1).wait_for()
        assert "window of 256" in page.locator(".error").last.inner_text()
