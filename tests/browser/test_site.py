"""The built site in a headless Chromium, as a reader without a network sees it: ``make docs-browser``."""

import functools
import http.server
import json
import os
import shutil
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest

webdriver = pytest.importorskip("selenium.webdriver")

SITE = Path(__file__).parents[2] / "docs" / "_build" / "html"
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html"))
FLAGS = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
FLAGS += ["disable-component-update", "disable-sync", "window-size=1400,1000", "force-device-scale-factor=1"]
WITH_MATHS = ["ideas.html", "noise.html", "algebra.html", "api/mixture.html", "api/scores.html", "api/noise.html"]

pytestmark = pytest.mark.browser


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def address():
    assert PAGES, "make docs first"
    with http.server.ThreadingHTTPServer(("localhost", 0), functools.partial(Quiet, directory=SITE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for flag in [*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


def opened(driver, url):
    """Open a page to the end, mathematics and pictures included; give its requests and responses by address."""
    driver.get("about:blank")
    driver.get_log("performance"), driver.get_log("browser")  # of what was open before
    driver.get(url)
    driver.execute_async_script("""
        const done = arguments[0], pictures = [...document.images];
        for (const picture of pictures) picture.loading = "eager";
        Promise.all([
            window.MathJax ? MathJax.startup.promise : null,
            ...pictures.map(picture => picture.decode().catch(() => null)),
        ]).then(() => done(), () => done());
    """)
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    named = {name: [e["params"] for e in events if e["method"] == f"Network.{name}"] for name in METHODS}
    return (
        [params["request"]["url"] for params in named["requestWillBeSent"]],
        {params["response"]["url"]: params["response"]["status"] for params in named["responseReceived"]},
    )


METHODS = ("requestWillBeSent", "responseReceived")


@pytest.mark.parametrize("page", PAGES)
def test_page(driver, address, page):
    requests, statuses = opened(driver, f"{address}/{page}")
    assert statuses[f"{address}/{page}"] == 200
    assert all(status in (200, 304) for status in statuses.values()), statuses
    hosts = {urlsplit(url).netloc for url in requests if urlsplit(url).scheme in ("http", "https", "ws", "wss")}
    assert hosts == {urlsplit(address).netloc}
    assert [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    broken = driver.execute_script("return [...document.images].filter(i => !i.naturalWidth).map(i => i.src)")
    assert broken == []
    sizes = driver.execute_script("""
        return [...document.querySelectorAll("mjx-container")].map(e => [e.offsetWidth, e.offsetHeight])
    """)
    assert all(width > 0 and height > 0 for width, height in sizes)
    assert len(sizes) == driver.execute_script("return document.querySelectorAll('.math').length")
    assert driver.execute_script("return document.querySelectorAll('mjx-merror').length") == 0
    text = driver.execute_script("return document.querySelector('article, main, body').innerText")
    assert "\\(" not in text.replace("\\(?", "") or page.startswith("_modules")
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 1400  # nothing sticks out


@pytest.mark.parametrize("page", WITH_MATHS)
def test_mathematics_is_there(driver, address, page):
    opened(driver, f"{address}/{page}")
    assert driver.execute_script("return document.querySelectorAll('mjx-container').length") > 0
    families = driver.execute_script("return [...document.fonts].filter(f => f.status == 'loaded').map(f => f.family)")
    assert any("MJX" in family for family in families)


def test_pictures_are_there(driver, address):
    for page in ("index.html", "start.html", "noise.html", "uncertainty.html", "gallery/index.html"):
        opened(driver, f"{address}/{page}")
        assert driver.execute_script("return document.querySelectorAll('article img').length") > 0, page


@pytest.mark.parametrize("word", ["icdf", "DeepEnsemble", "collapse"])
def test_search_finds(driver, address, word):
    from selenium.webdriver.support.ui import WebDriverWait

    opened(driver, f"{address}/search.html?q={word}")
    found = "return [...document.querySelectorAll('#search-results li a')].map(a => a.href)"
    links = WebDriverWait(driver, 20).until(lambda d: d.execute_script(found))
    assert any(link.startswith(address) for link in links)
    assert word != "icdf" or any("GaussianMixture.icdf" in link for link in links)


def test_internal_links_lead_somewhere(driver, address):
    anchors = {}
    links = set()
    for page in PAGES:
        driver.get(f"{address}/{page}")
        anchors[f"{address}/{page}"] = set(
            driver.execute_script("return [...document.querySelectorAll('[id]')].map(e => e.id)")
        )
        links |= {(page, href) for href in driver.execute_script("return [...document.links].map(a => a.href)")}
    for page, link in links:
        target, _, fragment = link.partition("#")
        if target.startswith(address) and target.endswith(".html"):
            assert target in anchors, (page, link)
            assert fragment in {"", *anchors[target]}, (page, link)


@pytest.mark.parametrize(("name", "page"), {"home": "index", "maths": "api/mixture", "noise": "noise"}.items())
def test_screenshots(driver, address, name, page):
    """For a person to look at: in the folder that SCREENSHOTS names."""
    opened(driver, f"{address}/{page}.html")
    picture = driver.get_screenshot_as_png()
    assert len(picture) > 20_000
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.png").write_bytes(picture)
