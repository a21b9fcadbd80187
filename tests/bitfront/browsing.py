"""The application on a port of loopback with jobs of all kinds, and a browser that visits its page.

A module of tests names this one in `pytest_plugins`.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, sync_playwright

from bitfront.fronts import load_front
from bitfront.pipeline import run_search
from bitfront.plan import make_plan
from bitfront.progress import Silent
from bitfront.server.app import create_app
from bitfront.server.settings import Settings
from store.database import Store
from store.queries import end_job, find_job, update_job
from store.submissions import start_job, submit_job
from tests.bitfront.served import wait_for
from tests.bitfront.test_pipeline import small_config
from workers.pool import InProcessPool

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DESKTOP, PHONE = {"width": 1366, "height": 900}, {"width": 360, "height": 740}
ROUTES = ("#/jobs", "#/jobs/{job}", "#/submit", "#/query", "#/compare?a={job}:{a}&b={job}:{b}")
READY = {
    "jobs": ".jobs li", "submit": "textarea.code", "query": "form .fields", "compare": ".interval",
}  # fmt: skip
"""What a route shows once it has read all that it asks for."""
GO = """route => {
  history.replaceState(null, "", route);
  dispatchEvent(new HashChangeEvent("hashchange")); // also where the address is the same
}"""


@dataclass(frozen=True)
class Site:
    """A server, and its jobs by what became of them.

    Args:
        guarded: another server, of the same store, that wants tokens.
        done: whose maps nobody timed.
        timed: done, with seconds that are measured, predicted, and for one map unknown.
    """

    url: str
    guarded: str
    store: Store
    data: Path
    done: int
    timed: int
    failed: int
    queued: int


@pytest.fixture(scope="session")
def chromium():
    """A browser that is installed. Where tests must not be skipped unseen, there has to be one."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        why = f"no browser: CHROMIUM names none, and none of {', '.join(BROWSERS)} is installed"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(why)
    return found


@pytest.fixture(scope="session")
def site(chromium, tiny_folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    root = tiny_folders("llama")
    store = Store(f"sqlite:///{folder}/s.sqlite").open()
    searches = [
        small_config(root, budgets=bits, estimators=["fisher"])
        for bits in ([2.8, 3.6, 4.4, 5.4], [3.2, 4, 4.8])
    ]
    done, timed = (run_search(make_plan(c), store, InProcessPool, Silent()) for c in searches)
    update_job(
        store, timed, facts={"times": made_up_times(load_front(store, find_job(store, timed)))}
    )
    failed, queued = (
        submit_job(store, searches[0].model_dump(mode="json"), {}, "ada", None).id for _ in range(2)
    )
    start_job(store, failed)
    end_job(store, failed, "failed", "the disk is full")
    open_, guarded = (
        create_app(Settings(store.url, folder, roots=(root,), auth=auth), store)
        for auth in (False, True)
    )
    with listening(open_) as url, listening(guarded) as other:
        yield Site(url, other, store, folder, done, timed, failed, queued)


@contextmanager
def listening(app):
    """The address of an application's server, in a thread of its own."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for("a server", lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=10)


def made_up_times(front):
    """What `check_times` keeps: the first map as fast as predicted, others not; the last untimed."""
    maps = {}
    for number, point in enumerate(front.points[:-1]):
        predicted = {"decode": 1e-8 * point.weight_bytes, "prefill": 1e-3 * point.average_bits}
        maps[point.map_hash] = {"predicted": predicted}
        if number % 3 != 1:
            measured = {p: s * (1 + 0.02 * number) for p, s in predicted.items()}
            maps[point.map_hash] |= {
                "measured": measured, "fitted": False, "joules": {"decode": 0.02, "prefill": None},
            }  # fmt: skip
    return {
        "source": "measured", "device": "a machine", "engine": "llama.cpp", "kernels": "1", "threads": 1,
        "workload": {"batch": 1, "context": 32, "prompt": 32, "generated": 32, "tensor_parallel": 1},
        "overhead_s": {"decode": 1e-4, "prefill": 1e-3}, "errors": {"decode": 0.02, "prefill": None},
        "noisy_cells": 0, "failed_cells": [], "maps": maps,
    }  # fmt: skip


@pytest.fixture(scope="session")
def api(site):
    """What the API says, to hold the page against."""

    def get(path, **query):
        asked = f"?{urlencode(query)}" if query else ""
        with urlopen(f"{site.url}/api/v1{path}{asked}") as response:
            return json.load(response)

    return get


@pytest.fixture(scope="session")
def job(site):
    return site.done


@pytest.fixture(scope="session")
def points(api, job):
    """Of the finished job, by size."""
    return sorted(api(f"/jobs/{job}/front")["points"], key=lambda p: p["weight_bytes"])


@pytest.fixture(scope="session")
def routes(job, points):
    """The addresses of all pages."""
    return [r.format(job=job, a=points[0]["id"], b=points[-1]["id"]) for r in ROUTES]


@pytest.fixture(scope="module")
def browser(chromium):
    """Of a module: Playwright keeps an event loop in this thread, which other tests can't bear."""
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


class Visits:
    """Opens pages, and remembers what they did that no page may.

    Most tests follow each other in one page, as somebody's clicks would: scripts are read once.
    """

    def __init__(self, site: Site, browser: Browser) -> None:
        self._origins = (site.url, site.guarded, "data:", "blob:")
        self._url, self._browser = site.url, browser
        self._pages: list[Page] = []
        self._complaints: list[str] = []
        self._foreign: list[str] = []
        self._provoked: tuple[str, ...] = ()
        self._shared = self._watched()
        self._shared.goto(site.url)

    def provokes(self, *words: str) -> None:
        """The browser's own complaints with these words are this test's doing."""
        self._provoked = words

    def blank(self) -> Page:
        """A page that shows nothing yet, and shares no storage with others."""
        self._pages.append(self._watched())
        return self._pages[-1]

    def __call__(self, route: str, page: Page | None = None, viewport=DESKTOP) -> Page:
        """A page at a route, all of which it has read; the shared one, if none is given."""
        if page:
            page.goto(f"{self._url}/{route}")
        else:
            page = self._shared
            page.set_viewport_size(viewport)
            page.emulate_media(color_scheme="light")
            page.evaluate(GO, route)
        name = route.removeprefix("#/").partition("?")[0]
        if name.startswith("jobs/"):
            drawn(page)
        else:
            page.wait_for_selector(f"main {READY[name]}")
        return page

    def end(self) -> None:
        """Nothing may have left the origin, nor the console have complained."""
        self._shared.unroute_all()
        while self._pages:
            self._pages.pop().context.close()
        said = [c for c in self._complaints if not any(w in c for w in self._provoked)]
        foreign = self._foreign
        self._complaints, self._foreign, self._provoked = [], [], ()
        assert said == foreign == []

    def _watched(self) -> Page:
        page = self._browser.new_context(viewport=DESKTOP).new_page()
        page.on("console", self._console)
        page.on("pageerror", lambda error: self._complaints.append(str(error)))
        page.on("request", self._request)
        return page

    def _console(self, message) -> None:
        if message.type in {"error", "warning"}:
            self._complaints.append(message.text)

    def _request(self, request) -> None:
        if not request.url.startswith(self._origins):
            self._foreign.append(request.url)


@pytest.fixture(scope="module")
def visits(site, browser):
    return Visits(site, browser)


@pytest.fixture
def visit(visits):
    """Opens a route; at the end the page must have kept to itself and be content."""
    yield visits
    visits.end()


def drawn(page: Page) -> None:
    """Wait until a job's figures are there."""
    page.wait_for_selector("#front .scatterlayer .trace .points path")
    page.wait_for_selector("#front .mark", state="attached")
    page.wait_for_selector("#export fieldset")


def best_on_page(page: Page) -> int:
    return int(page.locator("#limits .best").get_attribute("data-point"))


def answered(body, status: int = 200, kind: str = "application/json", **headers: str) -> Callable:
    """A handler of requests that answers with a document."""
    return lambda route: route.fulfill(
        status=status, content_type=kind, headers=headers, body=json.dumps(body)
    )
