"""Who can use the page, and what it does when things go wrong: keyboards, phones, tokens, outages."""

import json

import pytest

from store.tokens import create_token

pytest.register_assert_rewrite("tests.bitfront.browsing")

from tests.bitfront.browsing import PHONE, answered

pytest_plugins = ["tests.bitfront.browsing"]

REACHABLE = "a[href], button:not(:disabled), input:not(:disabled), select, textarea, summary, [tabindex='0']"
MARK_REACHABLE = """selector => {
  let n = 0;
  for (const e of document.querySelectorAll(selector)) {
    if (!e.checkVisibility() || e.closest('.js-plotly-plot')) continue;
    e.dataset.wanted = e.type === 'radio' ? e.name : `w${n++}`;
  }
  return [...new Set([...document.querySelectorAll('[data-wanted]')].map(e => e.dataset.wanted))];
}"""
FOCUSED = """() => {
  const e = document.activeElement, s = getComputedStyle(e);
  const outlined = s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) > 0;
  return [e.dataset.wanted, outlined, e.outerHTML.slice(0, 90)];
}"""
NAMELESS = """() => [...document.querySelectorAll('a[href], button, input, select, textarea')]
  .filter(e => e.checkVisibility() && !e.ariaLabel && ![...(e.labels || [])].some(l => l.innerText.trim())
    && !(e.matches('a, button') && e.innerText.trim()))
  .map(e => e.outerHTML.slice(0, 90))"""
CONTRAST = """() => {
  const parse = (text) => {
    const n = text.match(/[\\d.]+/g).map(Number);
    return n.length > 3 ? n : [...n, 1];
  };
  const over = ([r, g, b, a], [x, y, z]) =>
    [r * a + x * (1 - a), g * a + y * (1 - a), b * a + z * (1 - a), 1];
  const behind = (e) => {
    const chain = [];
    for (; e; e = e.parentElement) chain.push(parse(getComputedStyle(e).backgroundColor));
    return chain.reverse().reduce((below, c) => over(c, below), [255, 255, 255, 1]);
  };
  const linear = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const ratio = (ink, paper) => {
    const [a, b] = [light(over(parse(ink), paper)), light(paper)];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
  const texts = [...document.querySelectorAll('body *')].filter((e) =>
    !e.closest('svg, noscript, option, .unseen') && e.checkVisibility() && !e.disabled
    && [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()));
  const drawn = [...document.querySelectorAll('.js-plotly-plot svg text')];
  return [
    ...texts.map((e) => [e, getComputedStyle(e).color, behind(e)]),
    ...drawn.map((e) => [e, getComputedStyle(e).fill, behind(e.closest('.figure'))]),
  ].map(([e, ink, paper]) => [ratio(ink, paper), `${e.tagName} ${e.textContent.slice(0, 40)}`]);
}"""
TICK_INK = "getComputedStyle(document.querySelector('#front .xtick text')).fill"
DRAWN_ANEW = """before => [...document.querySelectorAll('.js-plotly-plot .xtick text')]
  .every(text => getComputedStyle(text).fill !== before)"""
WHICH = pytest.mark.parametrize(
    "which", range(5), ids=["jobs", "job", "submit", "query", "compare"]
)


@WHICH
def test_keyboard_reaches_everything_and_shows_where_it_is(visit, routes, which):
    page = visit(routes[which], visit.blank())
    wanted = set(page.evaluate(MARK_REACHABLE, REACHABLE))
    reached, unseen = set(), []
    for _ in range(len(wanted) + 40):
        page.keyboard.press("Tab")
        name, outlined, html = page.evaluate(FOCUSED)
        if name and not outlined:
            unseen.append(html)
        reached.add(name)
        if reached >= wanted:
            break
    missed = [page.locator(f"[data-wanted='{n}']").first for n in wanted - reached]
    assert [e.evaluate("e => e.outerHTML.slice(0, 90)") for e in missed] == []
    assert unseen == []
    assert len(wanted) > 6


def test_arrow_keys_walk_the_heat_map(visit, api, job):
    first, second, *_ = api(f"/jobs/{job}/detail")["rows"]
    page = visit(f"#/jobs/{job}")
    page.locator("#heat td[tabindex='0']").focus()
    for key, layer, row in (
        ("ArrowRight", 1, first), ("ArrowDown", 1, second), ("Home", 0, second), ("End", 1, second),
        ("ArrowUp", 1, first), ("ArrowLeft", 0, first),
    ):  # fmt: skip
        page.keyboard.press(key)
        told = page.locator("#heat .readout").inner_text()
        assert told.startswith(f"layer {layer}, {row}: "), key
    assert page.locator("#heat td[tabindex='0']").count() == 1


def test_every_control_has_a_name(visit, routes):
    for route in routes:
        assert visit(route).evaluate(NAMELESS) == [], route


@WHICH
def test_nothing_is_wider_than_a_phone(visit, routes, which, points):
    page = visit(routes[which], viewport=PHONE)
    if page.locator("#points").count():
        page.locator(f"input[name=point-b][value='{points[-1]['id']}']").check()
        page.wait_for_selector("#compare .interval")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


@WHICH
def test_text_can_be_read_in_light_and_dark(visit, routes, which):
    page = visit(routes[which])
    papers = []
    for scheme in ("light", "dark"):
        before = page.evaluate(TICK_INK) if which == 1 else None
        page.emulate_media(color_scheme=scheme)
        if before and papers:
            page.wait_for_function(DRAWN_ANEW, arg=before)
        papers.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        texts = page.evaluate(CONTRAST)
        assert [text for ratio, text in texts if ratio < 4.5] == []
        assert len(texts) > 10
    assert papers[0] != papers[1]


def test_switch_overrides_the_system_and_figures_follow(visit, job):
    page = visit(f"#/jobs/{job}", visit.blank())
    page.emulate_media(color_scheme="light")
    before = page.evaluate(TICK_INK)
    page.get_by_label("Colours").select_option("dark")
    page.wait_for_function(DRAWN_ANEW, arg=before)
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_a_token_is_asked_for_kept_for_the_tab_and_sent_in_a_header(visit, site):
    visit.provokes("401")
    token = create_token(site.store, "ada", "read")
    page = visit.blank()
    sent = []
    page.on("request", lambda r: sent.append((r.url, r.headers.get("authorization"))))
    page.goto(f"{site.guarded}/#/jobs")
    page.get_by_label("Token", exact=True).fill(token)
    assert page.locator(".jobs li").count() == 0
    page.get_by_role("button", name="Use it").click()
    page.wait_for_selector(".jobs li")
    page.wait_for_selector("#who:has-text('ada (read)')")
    assert page.evaluate("[sessionStorage.length, localStorage.length]") == [1, 0]
    assert {header for _, header in sent} == {None, f"Bearer {token}"}
    assert not any(token in url for url, _ in sent)
    assert token not in page.url


def test_a_database_that_is_away_is_waited_for(visit, site):
    visit.provokes("503")
    page = visit.blank()
    refused = answered(
        {"title": "Away", "status": 503, "detail": "The database does not answer."},
        503, "application/problem+json", **{"Retry-After": "1"},
    )  # fmt: skip
    page.route("**/api/v1/**", refused)
    page.goto(f"{site.url}/#/jobs")
    page.wait_for_selector("#banner:has-text('The database does not answer.')")
    page.unroute("**/api/v1/**")
    page.wait_for_selector(".jobs li")
    page.wait_for_selector("#banner", state="hidden")


def test_names_are_text_and_never_markup(visit, site, api):
    evil = "<img src=x onerror=window.pwned=1>"
    names = dict.fromkeys(("model", "error", "engine", "device", "submitted_by"), evil)
    one = {**api(f"/jobs/{site.failed}"), **names}
    page = visit.blank()
    page.route("**/api/v1/jobs?**", answered({"jobs": [one], "next": None}))
    visit("#/jobs", page)
    assert page.locator(".jobs li").inner_text().count(evil) == len(names)
    assert page.locator("main img").count() == 0
    assert page.evaluate("window.pwned") is None


def test_a_broken_event_stream_goes_on_where_it_broke(visit, site, api, job):
    running = {**api(f"/jobs/{job}"), "state": "running", "alive": True, "points": 0}
    progress = {"stage": "finalists", "done": 42, "steps": 100, "share": 0.42, "left_s": 90.0}
    asked = []

    def stream(route):
        """One line of the log, then the connection ends."""
        asked.append(route.request.headers.get("last-event-id"))
        number = 100 + len(asked)
        said = json.dumps({"level": "info", "text": f"said {number}"})
        body = f"id: {number}\nevent: log\ndata: {said}\n\nevent: progress\ndata: {json.dumps(progress)}\n\n"
        route.fulfill(content_type="text/event-stream", body=body)

    page = visit.blank()
    page.route(f"**/api/v1/jobs/{job}", answered(running))
    page.route(f"**/api/v1/jobs/{job}/events", stream)
    page.goto(f"{site.url}/#/jobs/{job}")
    page.wait_for_selector("[role=progressbar][aria-valuenow='42']")
    page.get_by_text("said 103").wait_for()
    assert asked[1:3] == ["101", "102"]
    log = page.locator(".log").inner_text()
    assert [log.count(f"said {number}") for number in (101, 102, 103)] == [1, 1, 1]
    assert "about 1 min 30 s left" in page.locator(".progress").inner_text()
