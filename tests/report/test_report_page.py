"""The page of `make report` in a real browser: it asks for nothing, says no error, fits a phone, and answers in three clicks."""

import json

import pytest
from selenium.webdriver.common.by import By

WIDEST = "return Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) - document.documentElement.clientWidth"


def asked_for(driver) -> set[str]:
    """The addresses that the page has asked for so far."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return {message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"}


def shown(driver, selector: str) -> list:
    return [found for found in driver.find_elements(By.CSS_SELECTOR, selector) if found.is_displayed()]


def click(driver, selector: str, which: int = 0):
    found = shown(driver, selector)[which]
    found.click()
    return found


def test_it_asks_for_nothing_says_no_error_and_fits(window, page):
    # All that can be unfolded and picked.
    for button in shown(window, "#answers td button:enabled"):
        window.execute_script("arguments[0].click()", button)
    window.execute_script("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    for choose in shown(window, "select"):
        window.execute_script("const [target] = arguments; target.selectedIndex = target.length - 1;"
                              "target.onchange({target})", choose)
    assert window.execute_script(WIDEST) <= 0
    assert window.get_log("browser") == []
    assert asked_for(window) - {"about:blank"} == {page.as_uri()}


def test_a_request_would_be_seen_and_is_refused(window, page):
    # What the test above relies on.
    window.execute_async_script("const done = arguments[0]; fetch('http://127.0.0.1:9/').then(done, done)")
    assert "http://127.0.0.1:9/" in asked_for(window) or "Content Security Policy" in str(window.get_log("browser"))


def test_which_answers_changed_in_three_clicks(window):
    click(window, "#nav a[href='#answers']")
    number = click(window, "#answers button[data-pair='seed1 base ppo up']")
    click(window, "#list summary")
    assert number.text == str(len(window.find_elements(By.CSS_SELECTOR, "#list details")))
    said = shown(window, "#list details")[0].text
    assert said.count("wrong (score 0)") == 1 and said.count("right (score 1)") == 1 and "Truth: " in said
    assert "scorer took" in said and "apples" in said


def test_why_a_run_is_slower_in_one_click(window):
    speed = window.find_element(By.ID, "runs").text
    assert "slower’s PPO takes" in speed and "the largest difference is gen, +2." in speed
    click(window, "#nav a[href='#time']")
    rows = [row.text.split() for row in shown(window, "#time table")[1].find_elements(By.CSS_SELECTOR, "tbody tr")]
    # The largest difference first, below that of all.
    assert rows[0][:3] == ["a", "whole", "step"] and rows[1][0] == "gen" and float(rows[1][-1].replace("+", "")) > 2


def test_every_chart_is_drawn_with_a_band_for_the_seeds(window):
    charts = shown(window, ".chart canvas")
    assert len(charts) > 10
    # Not one colour alone.
    drawn = window.execute_script("""return [...document.querySelectorAll('#curves-ppo .chart canvas')].map(canvas =>
        new Set(new Uint32Array(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size)""")
    assert min(drawn) > 5, drawn
    legend = window.find_element(By.CSS_SELECTOR, "#curves-ppo .legend").text
    assert "seed1, seed2, seed3 (3 seeds)" in legend and "slower" in legend


def test_what_differs_is_told(window):
    settings = window.find_element(By.ID, "settings").text
    assert "actor_rollout_ref.actor.optim.lr" in settings and "data.seed" in settings
    assert "trainer.default_local_dir" not in settings.partition("that are the same")[0]


@pytest.mark.parametrize("text", ["計算"])
def test_letters_of_japanese_have_a_font(window, text):
    # A letter without one is a box, as wide and as dark as any other's.
    widths = window.execute_script("""const context = document.createElement('canvas').getContext('2d');
        context.font = getComputedStyle(document.body).font;
        const looks = letter => { context.clearRect(0, 0, 40, 40); context.fillText(letter, 0, 30);
            return [...context.getImageData(0, 0, 40, 40).data].join(); };
        return new Set([...arguments[0], '\\u{10ffff}'].map(looks)).size""", text)
    assert widths == len(text) + 1
