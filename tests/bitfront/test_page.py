"""What the page shows, in a real browser and against a real server: no less and no other than the API."""

import json
import re
from pathlib import Path

import pytest

from bitfront.driving import drive_export
from bitfront.sizes import parse_bytes

pytest.register_assert_rewrite("tests.bitfront.browsing")

from tests.bitfront.browsing import answered, best_on_page, drawn

pytest_plugins = ["tests.bitfront.browsing"]

FIGURE = "document.querySelector('#front .figure').data"
LIMITS = ("weight_bytes", "average_bits", "kl", "memory_bytes", "decode_s", "prefill_s")


def ringed(page):
    """The points that the figure rings, by what it calls them."""
    rings = page.evaluate(
        f"(() => {{ const r = {FIGURE}.find(t => t.meta === 'rings'); return [r.text, r.customdata]; }})()"
    )
    names = [re.sub("<[^>]+>", "", text) for text in rings[0]]
    return {
        name: point
        for text, point in zip(names, rings[1], strict=True)
        for name in text.split(" · ")
    }


def wait_for_ring(page, name, point):
    page.wait_for_function(
        f"""([name, id]) => {{ const r = {FIGURE}.find(t => t.meta === 'rings');
        return r.text.some((text, i) => text.includes(name) && r.customdata[i] === id); }}""",
        arg=[name, point],
    )


def numbers(text):
    """Those in a text, with a minus as it is printed."""
    text = text.replace("\u2212", "-").replace("+", "")
    return [float(found) for found in re.findall(r"-?[\d.]+(?:e-?\d+)?", text)]


def column(page, name):
    """A column of the table of all points, by point."""
    heads = page.locator("#points thead th").all_inner_texts()
    place = [head.strip(" ↑↓") for head in heads].index(name)
    rows = page.eval_on_selector_all(
        "#points tbody tr",
        "(rows, i) => rows.map(r => [r.dataset.point, r.cells[i].innerText])",
        place,
    )
    return {int(point): text for point, text in rows}


def test_list_shows_every_job_with_its_state(visit, api, site):
    page = visit("#/jobs")
    jobs = api("/jobs")["jobs"]
    rows = page.locator(".jobs li").all_inner_texts()
    assert {j["state"] for j in jobs} == {"done", "failed", "queued"}
    for row, job in zip(rows, jobs, strict=True):
        assert job["model"] in row
        assert job["state"] in row
        assert ("the disk is full" in row) == (job["id"] == site.failed)


def test_list_is_filtered_by_state(visit, site):
    page = visit("#/jobs")
    page.get_by_label("State").select_option("done")
    page.wait_for_function("() => document.querySelectorAll('.jobs li').length === 2")
    ids = page.locator(".jobs li .id").all_inner_texts()
    assert {int(number) for number in ids} == {site.done, site.timed}


def test_front_draws_every_measured_point_once(visit, job, points):
    page = visit(f"#/jobs/{job}")
    ids = page.evaluate(f"{FIGURE}.filter(t => t.meta === 'measured').flatMap(t => t.customdata)")
    assert sorted(ids) == sorted(p["id"] for p in points)
    page.get_by_label("predictions").uncheck()  # then all marks but the rings are points
    page.wait_for_function(f"() => !{FIGURE}.some(t => t.name?.includes('predicted'))")
    marks = page.locator("#front .scatterlayer .points path.point").count()
    assert marks == len(points) + len(set(ringed(page).values()))


def test_line_of_the_front_goes_through_the_points_that_the_api_calls_so(visit, job, points):
    page = visit(f"#/jobs/{job}")
    line = page.evaluate(f"{FIGURE}.find(t => t.mode === 'lines').y")
    assert line == pytest.approx([p["kl"] for p in points if p["on_front"]])


@pytest.mark.parametrize("name", LIMITS)
def test_best_point_within_a_limit_is_the_querys(visit, api, site, name):
    """Seconds are those of the job that has any, whose last point has none."""
    job = site.timed if name.endswith("_s") else site.done
    values = sorted(v for p in api(f"/jobs/{job}/front")["points"] if (v := p[name]) is not None)
    page = visit(f"#/jobs/{job}")
    found = set()
    for share in (0, 0.5, 0.9):
        value = values[int(share * (len(values) - 1))] * 1.0001
        value = int(value) + 1 if name.endswith("_bytes") else value
        page.fill(f"[data-limit={name}]", repr(value))
        expected = api("/query", job=job, **{name: value})["point"]["id"]
        assert best_on_page(page) == expected
        wait_for_ring(page, "best", expected)
        found.add(expected)
    assert len(found) > 1


def test_two_limits_together(visit, api, site):
    timed = [p for p in api(f"/jobs/{site.timed}/front")["points"] if p["decode_s"]]
    slowest = max(p["decode_s"] for p in timed)
    unlimited = min(timed, key=lambda p: p["kl"])
    bounds = {"weight_bytes": unlimited["weight_bytes"] - 1, "decode_s": 0.999 * slowest}
    page = visit(f"#/jobs/{site.timed}")
    for name, value in bounds.items():
        page.fill(f"[data-limit={name}]", repr(value))
    assert best_on_page(page) == api("/query", job=site.timed, **bounds)["point"]["id"]


def test_energy_is_a_limit_where_it_is_known(visit, api, site):
    """A point that no counter watched meets none."""
    page = visit(f"#/jobs/{site.timed}")
    page.fill("[data-limit=decode_j]", "21mJ")
    best = api("/query", job=site.timed, decode_j=0.021)["point"]["id"]
    assert best_on_page(page) == best
    page.fill("[data-limit=decode_j]", "19mJ")
    assert re.search(r"the least is 20(\.0)? mJ", page.locator("#limits .answer").inner_text())


def test_a_limit_that_nothing_meets_says_why(visit, job, points):
    page = visit(f"#/jobs/{job}")
    page.fill("[data-limit=weight_bytes]", "1B")
    answer = page.locator("#limits .answer").inner_text()
    least = re.search(r"the least is (.*)\.$", answer)[1]
    assert parse_bytes(least.replace(" ", "")) == pytest.approx(points[0]["weight_bytes"], rel=1e-3)


def test_dragging_the_mark_moves_the_best_point(visit, api, job):
    page = visit(f"#/jobs/{job}")
    before = best_on_page(page)
    box = page.locator("#front .mark.x").bounding_box()
    plot = page.locator("#front .nsewdrag").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 30)
    page.mouse.down()
    middle = plot["x"] + plot["width"] / 2
    page.mouse.move(middle, box["y"] + 30, steps=4)
    page.mouse.up()
    page.wait_for_selector("#front .mark.x.set")
    box = page.locator("#front .mark.x").bounding_box()
    assert box["x"] + box["width"] / 2 == pytest.approx(middle, abs=3)
    shown = page.locator("[data-limit=weight_bytes]").input_value()
    bound = parse_bytes(shown.replace(" ", ""))
    assert best_on_page(page) == api("/query", job=job, weight_bytes=bound)["point"]["id"] != before


def test_seconds_that_were_only_predicted_are_marked(visit, api, site):
    """Also where the prediction was exact, and where there is none."""
    found = api(f"/jobs/{site.timed}/front")["points"]
    assert {p["times"] for p in found} == {"measured", "predicted", None}
    assert any(p["times"] == "measured" and p["decode_s"] == p["predicted_decode_s"] for p in found)
    page = visit(f"#/jobs/{site.timed}")
    shown = column(page, "decode latency")
    marked = {point for point, text in shown.items() if text.endswith(" *")}
    assert marked == {p["id"] for p in found if p["times"] == "predicted"}
    assert {i for i, text in shown.items() if not text} == {
        p["id"] for p in found if not p["times"]
    }
    page.locator("#prediction").get_by_label("Of").select_option("decode latency")
    measured = sum(p["times"] == "measured" for p in found)
    assert f"Of {measured} points" in page.locator("#prediction").inner_text()


def test_heat_map_has_a_cell_for_each_layer_and_row(visit, api, job):
    page = visit(f"#/jobs/{job}")
    detail = api(f"/jobs/{job}/detail")
    cells = page.locator("#heat td[role=gridcell]").count()
    assert cells == detail["layers"] * len(detail["rows"])
    inside = [u for u in detail["units"] if u["layer"] is not None]
    assert page.locator("#heat td[data-unit]").count() == len(inside)


def test_heat_map_tells_each_units_bits_of_the_chosen_point(visit, api, job):
    detail = api(f"/jobs/{job}/detail")
    point = max(detail["maps"], key=lambda i: len({*detail["maps"][i]}))
    page = visit(f"#/jobs/{job}?point={point}")
    told = page.eval_on_selector_all(
        "#heat td[data-unit]", "cells => cells.map(c => [Number(c.dataset.unit), c.ariaLabel])"
    )
    for unit, label in told:
        scheme = detail["maps"][point][unit]
        bits = f"{detail['bits'][unit][scheme]:.3f} bits, {detail['menu'][scheme]}"
        assert label.startswith(f"layer {detail['units'][unit]['layer']}, ")
        assert bits in label


def test_comparing_shows_the_interval_and_the_verdict_of_the_api(visit, api, job, points):
    a, b = points[0]["id"], points[-1]["id"]
    page = visit(f"#/jobs/{job}")
    page.get_by_label(f"point {a} as A").check()
    page.get_by_label(f"point {b} as B").check()
    page.wait_for_selector("#compare .interval")
    wait_for_ring(page, "B", b)
    told = api("/compare", a=f"{job}:{a}", b=f"{job}:{b}")
    gap = told["difference"]
    interval = numbers(page.locator("#compare .interval").inner_text())
    assert interval == pytest.approx([gap["low"], gap["high"]], rel=6e-3)
    mean = numbers(page.locator("#compare .difference").inner_text())
    assert mean == pytest.approx([gap["mean"]], rel=6e-3)
    verdict = told["verdict"]
    assert page.locator("#compare .verdict").inner_text() == f"P{verdict[1:]}."
    assert f"{len(told['differing'])} units differ" in page.locator("#compare h3").inner_text()


def test_another_budget_is_solved_and_shown_as_predicted(visit, api, job, points):
    page = visit(f"#/jobs/{job}")
    wanted = (points[0]["average_bits"] + points[-1]["average_bits"]) / 2
    page.locator("#solve input").fill(f"{wanted:.3f}")
    with page.expect_response("**/solve") as answer:
        page.get_by_role("button", name="Solve", exact=True).click()
    [solution] = answer.value.json()["solutions"]
    page.wait_for_function(f"() => {FIGURE}.some(t => t.meta === 'solved')")
    assert f"{solution['average_bits']:.3f} bits" in page.locator("#solve li").inner_text()
    assert "predicted, not measured" in page.locator("#heat").inner_text()
    page.get_by_role("button", name="Measure it: new job").click()
    page.wait_for_selector("h1:has-text('New job')")
    body = json.loads(page.locator("textarea.code").input_value())
    assert body["budgets_bytes"] == [solution["budget_bytes"]]
    assert body["model"] == api(f"/jobs/{job}")["config"]["model"]


def test_form_posts_the_body_that_it_shows(visit, site):
    page = visit("#/submit")
    posted = []

    def answer(route):
        if route.request.method != "POST":
            return route.fallback()
        posted.append(route.request.post_data_json)
        return answered({"id": site.queued, "state": "queued"}, 201)(route)

    page.route("**/api/v1/jobs", answer)
    page.get_by_label("Model", exact=True).fill("demo")
    page.get_by_label("Budgets", exact=True).fill("3.5, 4.25")
    page.get_by_label("Menu", exact=True).select_option("int-sym-g64")
    page.get_by_label("Max memory").fill("2GiB")
    expected = {
        "model": "demo", "budgets": [3.5, 4.25], "menu": "int-sym-g64",
        "serving": {"max_memory_bytes": 2**31},
    }  # fmt: skip
    assert json.loads(page.locator("textarea.code").input_value()) == expected
    budgets = page.get_by_label("Budgets", exact=True)
    budgets.fill("4.1 bits")  # nothing is sent without the budget that somebody meant
    page.get_by_role("button", name="Start the job").click()
    assert budgets.get_attribute("aria-invalid") == "true"
    assert posted == []
    budgets.fill("3.5, 4.25")
    page.get_by_label("As", exact=True).select_option("yaml")
    assert "budgets: [3.5, 4.25]" in page.locator("textarea.code").input_value()
    page.get_by_role("button", name="Start the job").click()
    page.wait_for_url(f"**/#/jobs/{site.queued}")
    assert posted == [expected]


def test_text_is_read_into_the_form(visit):
    page = visit("#/submit")
    page.get_by_label("As", exact=True).select_option("yaml")
    page.locator("textarea.code").fill(
        "model: demo # a comment\nmenu:\n  schemes: [int4-g64, bf16]\n  pinned: {embedding: bf16}\n"
        "budgets:\n- 3.5\n- 4\nserving:\n  engine: llama.cpp\n"
    )
    assert page.get_by_label("Model", exact=True).input_value() == "demo"
    assert page.get_by_label("Budgets", exact=True).input_value() == "3.5, 4"
    assert page.get_by_label("Engine", exact=True).input_value() == "llama.cpp"
    page.get_by_label("As", exact=True).select_option("json")
    assert json.loads(page.locator("textarea.code").input_value()) == {
        "model": "demo", "menu": {"schemes": ["int4-g64", "bf16"], "pinned": {"embedding": "bf16"}},
        "budgets": [3.5, 4], "serving": {"engine": "llama.cpp"},
    }  # fmt: skip


def test_wrong_values_are_told_at_their_field(visit):
    visit.provokes("422")
    page = visit("#/submit")
    page.get_by_label("Model", exact=True).fill("demo")
    batch = page.get_by_label("Batch", exact=True)
    batch.fill("0")
    page.get_by_role("button", name="Start the job").click()
    page.wait_for_selector("[aria-invalid=true]")
    assert batch.get_attribute("aria-invalid") == "true"
    shown = page.locator(f"[id='{batch.get_attribute('id')}-e']")
    assert shown.is_visible()
    assert "greater than" in shown.inner_text()


def test_query_links_to_the_best_point(visit, api, job, points):
    bound = points[len(points) // 2]["weight_bytes"] + 1
    expected = api("/query", job=job, weight_bytes=bound)
    page = visit("#/query")
    page.get_by_label("Job", exact=True).fill(str(job))
    page.get_by_label("Max size").fill(str(bound))
    page.get_by_role("button", name="Find the best point").click()
    number = expected["point"]["id"]
    page.get_by_role("link", name=f"Job {expected['job']}, point {number}").click()
    drawn(page)
    assert f"Point {number} –" in page.locator("#chosen").inner_text()


def test_table_sorts_and_reaches_every_point(visit, job, points):
    page = visit(f"#/jobs/{job}")
    page.locator("[data-sort=KL]").click()
    kl = {p["id"]: p["kl"] for p in points}
    ids = list(column(page, "point"))
    assert ids != [p["id"] for p in points]
    assert [kl[i] for i in ids] == sorted(kl.values())
    page.locator("#points tbody tr").last.locator("[name=point-a]").check()
    assert f"Point {ids[-1]} –" in page.locator("#chosen").inner_text()


def test_a_points_map_is_saved_as_the_api_has_it(visit, api, job, points):
    point = points[0]["id"]
    page = visit(f"#/jobs/{job}?point={point}")
    with page.expect_download() as saved:
        page.get_by_role("button", name="Download map").click()
    found = json.loads(Path(saved.value.path()).read_text())
    assert found == api(f"/jobs/{job}/points/{point}/map")


def test_an_export_is_ordered_followed_and_saved(visit, api, site, points):
    """The driver is called here, where a server would have started it."""
    page = visit(f"#/jobs/{site.done}?point={points[0]['id']}")
    page.locator("#export").get_by_label(re.compile("^map ")).check()
    page.get_by_role("button", name=f"Export point {points[0]['id']}").click()
    order = page.locator("#export .exports > li")
    order.locator(".queued").wait_for()
    [ordered] = api(f"/jobs/{site.done}/exports")["exports"]
    assert (ordered["point"], ordered["targets"]) == (points[0]["id"], ["map"])
    drive_export(site.store, ordered["id"], site.data / "exports")
    order.locator(".done").wait_for()
    folder = site.data / "exports" / str(ordered["id"])
    names = {file["name"] for file in api(f"/exports/{ordered['id']}")["files"]}
    assert "precision_map.json" in {Path(name).name for name in names}
    for name in names:
        with page.expect_download() as saved:
            order.get_by_role("button", name=f"{name} (").click()
        assert Path(saved.value.path()).read_bytes() == (folder / name).read_bytes()
