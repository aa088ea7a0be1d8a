"""Every page that subquad writes opens in a browser: no complaint in the console, every picture drawn, alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from browser import Browser, Tab, browser, executable

from subquad.__main__ import main
from subquad.schema import RunConfig
from subquad.training.fit import train

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "site"
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="
WHOLE = f'<p>text</p><img src="{PIXEL}"><svg width="9" height="9"><path d="M0 0L9 9"/></svg>'

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(executable() is None, reason="no Chromium is here (apt-get install chromium-headless-shell)"),
]
TinyRun = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    path = executable()
    assert path is not None
    with browser(path, tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture
def tab(chromium: Browser) -> Tab:
    return chromium.tab()


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """The address of the built documentation."""
    if not (SITE / "index.html").exists():
        pytest.skip("the documentation is not built (make docs)")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_the_report_of_a_run_is_drawn(tab: Tab, tiny_run: TinyRun) -> None:
    folder = train(tiny_run("run")).run_dir
    seen = tab.open((folder / "report.html").as_uri())
    assert seen.faults((folder / "report.html").as_uri()) == []
    assert seen.plots


def test_the_page_of_explain_is_drawn(tab: Tab, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["explain", "trainer=smoke", "target=h100", f"html={page}"]) == 0
    seen = tab.open(page.as_uri())
    assert seen.faults(page.as_uri()) == []
    assert len(seen.plots) >= 3


def test_the_page_of_compare_is_drawn(tab: Tab, tiny_run: TinyRun, tmp_path: Path) -> None:
    runs = [train(tiny_run(name, run={"seed": seed})).run_dir for seed, name in enumerate(("one", "other"))]
    page = tmp_path / "compare.html"
    assert main(["compare", f"runs=[{runs[0]},{runs[1]}]", f"html={page}"]) == 0
    seen = tab.open(page.as_uri())
    assert seen.faults(page.as_uri()) == []
    assert seen.plots


def test_every_page_of_the_documentation_opens(tab: Tab, site: str) -> None:
    pages = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html") if path.name != "404.html")
    assert len(pages) > 20
    faults = {page: tab.open(site + page).faults(site) for page in pages}
    assert {page: found for page, found in faults.items() if found} == {}


def test_the_documentation_can_be_searched_without_a_network(tab: Tab, site: str) -> None:
    assert tab.open(site + "index.html").faults(site) == []
    tab.evaluate("document.querySelector('[data-md-toggle=search]').click()")
    tab.evaluate(
        "(() => { const input = document.querySelector('.md-search__input'); input.focus(); input.value = 'segment';"
        " input.dispatchEvent(new Event('input', {bubbles: true}));"
        " input.dispatchEvent(new KeyboardEvent('keyup', {bubbles: true})); })()"
    )
    tab.wait_until("document.querySelectorAll('.md-search-result__item').length > 1")


@pytest.mark.parametrize(
    ("page", "fault"),
    [
        (WHOLE, None),
        (f'{WHOLE}<img src="missing.png">', "not drawn"),
        (f"{WHOLE}<script>throw new Error('planted')</script>", "planted"),
        (f"{WHOLE}<script>console.error('said so')</script>", "said so"),
        (f'{WHOLE}<svg width="0" height="9"><path d="M0 0L9 9"/></svg>', "not drawn: svg 1"),
        (f'{WHOLE}<svg width="9" height="9"></svg>', "not drawn: svg 1"),
        (f'{WHOLE}<script src="http://127.0.0.1:9/font.js"></script>', "asks elsewhere: http://127.0.0.1:9/font.js"),
        ("<title>nothing</title>", "the page is empty"),
    ],
)
def test_a_broken_page_is_noticed(tab: Tab, tmp_path: Path, page: str, fault: str | None) -> None:
    file = tmp_path / "page.html"
    file.write_text(f"<!doctype html><meta charset=utf-8>{page}", encoding="utf-8")
    faults = tab.open(file.as_uri()).faults(file.as_uri())
    assert faults == [] if fault is None else any(fault in found for found in faults), faults
