"""The report in a real browser: headless Chromium, where there is one, at desktop and at phone width.

Chromium is steered through a pipe (its DevTools protocol, messages separated by a zero byte), so that no driver and no
open port is needed.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_check import Planted, options, plant_close_points, plant_empty_box, plant_speck

from nnunet_dsp import check
from nnunet_dsp.annotations import Annotations, Point

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
WIDTHS = {"desktop": 1280, "phone": 360}
NUM_CASES = 75  # more than the page shows at once

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: apt-get install chromium)")


class Browser:
    """One page in a headless Chromium."""

    def __init__(self) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="check_browser_", ignore_cleanup_errors=True)
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()

        def give_pipes() -> None:  # in the child: Chromium reads 3 and writes 4
            for source, number in ((os.dup(to_read), 3), (os.dup(to_write), 4)):
                os.dup2(source, number)

        command = [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
            f"--user-data-dir={self._profile.name}", "--disable-background-networking", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=give_pipes, close_fds=False
        )
        os.close(to_read)
        os.close(to_write)
        self._number, self._rest = 0, b""
        target = self._send("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session: str | None = None
        self._session = self._send("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        self.requests: list[str] = []
        self.problems: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._send(f"{domain}.enable")

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], 60)
            part = os.read(self._from, 1 << 20) if ready else b""
            if not part:
                raise RuntimeError("Chromium ended, or says nothing any more.")
            self._rest += part
        first, self._rest = self._rest.split(b"\0", 1)
        message: dict[str, Any] = json.loads(first)
        method, more = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(more["request"]["url"][:200])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(str(more["exceptionDetails"]))
        elif method == "Log.entryAdded" and more["entry"]["level"] in ("error", "warning"):
            self.problems.append(more["entry"]["text"])
        return message

    def _send(self, method: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters or {}}
        if getattr(self, "_session", None):
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, file: Path, width: int, dark: bool = False) -> None:
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self._send("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._send("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.requests.clear()
        self.problems.clear()
        self._send("Page.navigate", {"url": file.as_uri()})
        while self._message().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        answer = self._send("Runtime.evaluate", {"expression": script, "returnByValue": True, "awaitPromise": True})
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)
        self._profile.cleanup()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    opened = Browser()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A report of 75 cases with faults, names that do not break and a class that is markup."""
    root = tmp_path_factory.mktemp("browser")
    dataset = Planted(root)
    dataset.labels = {
        "background": 0,
        "cell": 1,
        "nucleus": 2,
        "<script>document.title='gone'</script>": 3,
        "ignore": 4,
    }
    for case in ("weak_0", "weak_1", "unlabelled"):
        dataset.write_mask(np.full((48, 64), 4), case)
    for plant in (plant_close_points, plant_speck, plant_empty_box):
        plant(dataset)
    dataset.add(f"{'a_name_without_a_place_to_break' * 4}", None, Annotations(points=(Point("nucleus", (17, 25)),)))
    for number in range(NUM_CASES - 7):
        dataset.add(f"more_{number:02d}", dataset.truth(), seed=100 + number)
    dataset.write_json()
    return check.write(check.check(dataset.folder, options()), root, 10**8)


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_fits_its_width_decodes_its_pictures_and_asks_for_nothing(browser, page, width, dark):
    browser.open(page, width, dark)
    assert browser.run("document.title") == "Dataset007_Planted: annotation check"
    assert browser.run("document.documentElement.scrollWidth") <= width
    too_wide = """[...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll, svg, .texts, dialog')
        && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))"""
    assert browser.run(too_wide) == []
    # pictures of cases that are not shown are not even loaded, so all are asked for
    browser.run("document.getElementById('all').click()")
    decoded = """Promise.all([...document.images].map((i) => {
        i.loading = 'eager'; return i.decode().then(() => i.naturalWidth, () => 0); }))"""
    sizes = browser.run(decoded)
    assert len(sizes) > NUM_CASES and min(sizes) > 0
    assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []
    assert browser.problems == []


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_cases_can_be_found_by_name_class_kind_and_status(browser, page, width):
    browser.open(page, width)
    visible = "[...document.querySelectorAll('#cards > :not([hidden])')].map((card) => card.dataset.name)"

    def choose(field: str, value: str) -> list[str]:
        browser.run(f"(() => {{ const e = document.getElementById({field!r}); e.value = {value!r};"
                    "e.dispatchEvent(new Event('input')); })()")  # fmt: skip
        return browser.run(visible)

    assert len(browser.run(visible)) == 60
    assert "60 of 75" in browser.run("document.getElementById('shown').textContent")
    browser.run("document.getElementById('more').click()")
    assert len(browser.run(visible)) == NUM_CASES
    assert choose("find", "WEAK") == ["weak_0", "weak_1"]
    assert browser.run("document.querySelectorAll('#rows > :not([hidden])').length") == 2
    assert choose("by-worst", "doubtful") == ["weak_0"]
    choose("by-worst", "")
    choose("find", "")
    assert choose("by-status", "unlabelled") == ["unlabelled"]
    choose("by-status", "")
    assert set(choose("by-kind", "boxes")) == {"masked_0", "weak_0", "weak_1"}
    choose("by-kind", "")
    assert choose("by-class", "3") == []


def test_layers_can_be_switched_off_and_pictures_enlarged(browser, page):
    browser.open(page, WIDTHS["desktop"])
    browser.run("document.getElementById('all').click()")
    shown = "getComputedStyle(document.querySelector('.card[data-name=weak_0] .point')).display != 'none'"
    assert browser.run(shown) is True
    browser.run("document.querySelector('[data-layer=points]').click()")
    assert browser.run(shown) is False
    browser.run("document.querySelector('[data-layer=points]').click()")
    assert browser.run(shown) is True
    small = browser.run("document.querySelector('.card .base').getBoundingClientRect().width")
    browser.run("document.querySelector('.card .zoom').click()")
    assert browser.run("document.getElementById('viewer').open") is True
    assert browser.run("document.querySelector('#viewer .base').getBoundingClientRect().width") > 1.5 * small
    before = browser.run("document.querySelector('#viewer .caption').textContent")
    browser.run("document.getElementById('next').click()")
    assert browser.run("document.querySelector('#viewer .caption').textContent") != before
    browser.run("document.getElementById('close').click()")
    assert browser.run("document.getElementById('viewer').open") is False


def test_text_stands_out_from_its_background(browser, page):
    """WCAG 2 contrast of every visible text, at least 4.5 to 1, in light and dark."""
    contrast = """(() => {
      const parse = (c) => c.match(/[\\d.]+/g).map(Number);
      const lum = ([r, g, b]) => [r, g, b].map((v) => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
      const bad = [];
      for (const e of document.querySelectorAll('header *, main *, footer *')) {
        const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
        if (!own || e.closest('svg, select') || !e.checkVisibility()) continue;
        let b = e;
        while (b && (parse(getComputedStyle(b).backgroundColor)[3] ?? 1) === 0) b = b.parentElement;
        const two = [getComputedStyle(e).color, getComputedStyle(b || document.body).backgroundColor]
          .map((c) => lum(parse(c))).sort((x, y) => y - x);
        const ratio = (two[0] + .05) / (two[1] + .05);
        if (ratio < 4.5) bad.push(e.className + ' ' + e.textContent.slice(0, 30) + ' ' + ratio.toFixed(2));
      }
      return bad;
    })()"""
    for dark in (False, True):
        browser.open(page, WIDTHS["desktop"], dark)
        assert browser.run(contrast) == []
