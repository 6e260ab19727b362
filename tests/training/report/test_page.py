"""The page in a browser: whole without a network, inert whatever the corpus says, usable with keys and on a phone."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from mistudio_train.messages import Warned
from mistudio_train.training.run import run_job
from tests.training.conftest import Listener, spec_of

Report = tuple[Path, Listener]
MOST_BYTES = 20_000_000


def wait_for(browser: webdriver.Chrome, script: str) -> Any:
    return WebDriverWait(browser, 30, poll_frequency=0.05).until(
        lambda driver: driver.execute_script(f"return {script}")
    )


def opened(browser: webdriver.Chrome, page: Path, width: int = 1280) -> webdriver.Chrome:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    for log in ("browser", "performance"):
        browser.get_log(log)  # type: ignore[no-untyped-call]
    browser.get(page.as_uri())
    wait_for(browser, "document.documentElement.dataset.ready")
    return browser


def texts(browser: webdriver.Chrome, selector: str) -> list[str]:
    return [str(found.get_attribute("textContent")) for found in browser.find_elements(By.CSS_SELECTOR, selector)]


def shown_features(browser: webdriver.Chrome) -> list[int]:
    return [int(re.findall(r"\d+", title)[0]) for title in texts(browser, ".card h3")]


def press(browser: webdriver.Chrome, key: str) -> None:
    browser.find_element(By.TAG_NAME, "body").send_keys(key)


@pytest.fixture(params=["token", "mean", "second of a sweep"])
def page(request: pytest.FixtureRequest, token_report: Report, mean_report: Report) -> Path:
    if request.param == "mean":
        return mean_report[0] / "report" / "index.html"
    return token_report[0] / ("" if request.param == "token" else "saes/k8") / "report" / "index.html"


def test_nothing_is_said_asked_for_or_run(browser: webdriver.Chrome, page: Path) -> None:
    opened(browser, page)
    assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]  # type: ignore[no-untyped-call]
    asked = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}
    assert browser.execute_script("return window.pwned") is None
    assert page.stat().st_size < MOST_BYTES


@pytest.mark.parametrize("width", [375, 1280])
def test_there_is_no_sideways_scroll(browser: webdriver.Chrome, page: Path, width: int) -> None:
    opened(browser, page, width)
    for how in ("strongest", "rare"):
        browser.execute_script(
            f"const s = document.getElementById('order'); s.value = '{how}'; s.dispatchEvent(new Event('change'))"
        )
        wait_for(browser, "document.querySelectorAll('.card').length")
        root = "document.documentElement"
        assert browser.execute_script(f"return {root}.scrollWidth <= {root}.clientWidth")


def test_hostile_text_is_shown_and_inert(browser: webdriver.Chrome, token_report: Report, mean_report: Report) -> None:
    opened(browser, mean_report[0] / "report" / "index.html")
    seen = set()
    for _ in range(10):
        seen |= set(texts(browser, ".context .words"))
        if browser.find_element(By.ID, "next").get_attribute("disabled"):
            break
        first = shown_features(browser)[0]
        press(browser, "n")
        wait_for(browser, f"!document.getElementById('feature-{first}')")
    everything = "\n".join(seen)
    assert "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'> the cat" in everything
    assert "{{ 7 * 7 }}" in everything
    assert not set(everything) & set("\u202e\u2066\u200b\x1b\x07\x00\x85")
    assert "⟦U+202E⟧ reversed" in everything
    assert max(map(len, seen)) < 3000
    html = (mean_report[0] / "report" / "index.html").read_text()
    assert html.count("<script") == 2 + html.count('<script type="text/plain"')


def test_features_come_in_any_order_and_by_keys(browser: webdriver.Chrome, token_report: Report) -> None:
    opened(browser, token_report[0] / "report" / "index.html")
    strongest = shown_features(browser)
    assert len(strongest) == 12
    press(browser, "n")
    wait_for(browser, f"!document.getElementById('feature-{strongest[0]}')")
    assert not set(shown_features(browser)) & set(strongest)
    press(browser, "p")
    wait_for(browser, f"document.getElementById('feature-{strongest[0]}')")
    assert shown_features(browser) == strongest
    press(browser, "r")
    wait_for(browser, f"document.querySelector('.card').id !== 'feature-{strongest[0]}'")
    assert shown_features(browser) != strongest
    press(browser, "/")
    assert browser.switch_to.active_element.get_attribute("id") == "number"
    wanted = strongest[3]
    browser.switch_to.active_element.send_keys(str(wanted), Keys.ENTER)
    wait_for(browser, f"document.querySelector('.card').id === 'feature-{wanted}'")
    assert shown_features(browser) == sorted(shown_features(browser))


def test_a_number_that_is_not_there_is_answered(browser: webdriver.Chrome, token_report: Report) -> None:
    opened(browser, token_report[0] / "report" / "index.html")
    field = browser.find_element(By.ID, "number")
    field.send_keys("100000", Keys.ENTER)
    assert "There are features 0 to 127" in str(browser.find_element(By.ID, "where").text)


def test_light_and_dark_differ_and_can_be_chosen(browser: webdriver.Chrome, token_report: Report) -> None:
    opened(browser, token_report[0] / "report" / "index.html")
    colour = "getComputedStyle(document.body).backgroundColor"
    before = browser.execute_script(f"return {colour}")
    browser.find_element(By.ID, "theme").click()
    assert browser.execute_script(f"return {colour}") != before
    assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]


def test_what_is_on_a_card_is_what_was_measured(browser: webdriver.Chrome, token_report: Report) -> None:
    folder = token_report[0]
    opened(browser, folder / "report" / "index.html")
    statistics = json.loads((folder / "metadata.json").read_text())["feature_statistics"]
    feature = shown_features(browser)[0]
    assert statistics["feature_max_activations"][feature] == pytest.approx(
        float(texts(browser, ".card .context .value")[0]), rel=0.01
    )
    marks = texts(browser, ".card .context mark.peak")
    assert marks
    assert texts(browser, ".card .tokens .what")[:2] == ["promotes", "suppresses"]


def test_the_sweep_is_linked_both_ways(browser: webdriver.Chrome, token_report: Report) -> None:
    opened(browser, token_report[0] / "report" / "index.html")
    browser.find_element(By.LINK_TEXT, "k8").click()
    wait_for(browser, "document.documentElement.dataset.ready && document.title.startsWith('k8')")
    browser.find_element(By.LINK_TEXT, "k4").click()
    wait_for(browser, "document.documentElement.dataset.ready && document.title.startsWith('k4')")


def test_every_job_has_its_page_and_pictures(token_report: Report, mean_report: Report) -> None:
    for folder, parent in (token_report, mean_report):
        assert not [message for message in parent.heard if isinstance(message, Warned) and "report" in message.message]
        for name in ("index.html", "curves.png", "density.png"):
            assert (folder / "report" / name).stat().st_size > 1000


def test_a_page_that_cannot_be_drawn_fails_no_job(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from .conftest import report_of

    def broken(*_: object) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr("mistudio_train.training.sweep.write_report", broken)
    folder, parent = report_of(model_folder("bert"), tmp_path, sae={"kind": "topk", "k": 4})
    assert (folder / "metadata.json").exists()
    assert [m.message for m in parent.heard if isinstance(m, Warned) and "no ink" in m.message]


def test_no_page_is_made_where_none_is_wanted(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    from .conftest import report_of

    folder, _ = report_of(model_folder("bert"), tmp_path, sae={"kind": "topk", "k": 4}, report=False)
    assert not (folder / "report").exists()


def test_labels_act_on_nothing_and_the_features_that_tell_them_are_a_click_away(
    browser: webdriver.Chrome, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    labels = ["<script>window.pwned = 6</script><img src=x onerror='window.pwned = 7'>", "W" * 150]
    (tmp_path / "c.jsonl").write_text(
        "".join(
            json.dumps({"text": f"{'cat' if n % 2 else 'ship'} number {n} of {n % 9}", "label": labels[n % 2]}) + "\n"
            for n in range(120)
        )
    )
    asked: dict[str, Any] = {"layer_number": 1, "hidden_dim": 64, "max_epochs": 3, "pooling": "token"}
    job = spec_of(model_folder("llama"), tmp_path, **asked, corpus_file="c.jsonl", label_column="label")
    run_job(replace(job, corpus=tmp_path / "c.jsonl", bundle_max_bytes=1 << 30), Listener())
    opened(browser, job.output / "report" / "index.html", 375)
    assert labels[0] in texts(browser, "#probing th")
    told = browser.find_elements(By.CSS_SELECTOR, "#probing button")[0]
    feature = int(told.text)
    browser.execute_script("arguments[0].click()", told)
    wait_for(browser, f"document.getElementById('feature-{feature}')")
    root = "document.documentElement"
    assert browser.execute_script(f"return {root}.scrollWidth <= {root}.clientWidth")
    assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]
    assert browser.execute_script("return window.pwned") is None
