"""The command line as users meet it: the installed command, its streams and exit status."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commanding import run_command

ROOT = Path(__file__).parents[2]
SEARCH = [
    "--menu",
    "int2-g32,int4-g32,int8-g32",
    "--dtype",
    "float32",
    "--address",
    "none",
    "--refine",
    "12",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    url = f"sqlite:///{tmp_path_factory.mktemp('cli')}/s.sqlite"

    def call(*arguments, ok=True, store=url):
        stores = ["--store", store] if arguments[0] != "--help" else []
        result = run_command([*arguments, *stores])
        assert (result.returncode == 0) == ok, result.stderr
        assert "Traceback" not in result.stderr
        return result

    call.store = url
    return call


@pytest.fixture(scope="module")
def searched(run, tiny_folders, tmp_path_factory):
    config = tmp_path_factory.mktemp("config") / "job.yaml"
    config.write_text(
        "texts:\n"
        + "".join(
            f"  {role}: {{chunks: {n}, length: 32}}\n"
            for role, n in (("calibration", 2), ("search", 2), ("heldout", 3))
        )
    )
    return run("search", str(tiny_folders("llama")), "-c", str(config), *SEARCH, "--json")


def test_the_installed_command_is_what_is_tested_here(bitfront_command, run):
    """Others run the same `main` in a process that was forked for it."""
    result = subprocess.run(
        [bitfront_command, "formats", "INT4-G64"], capture_output=True, text=True, check=False
    )
    forked = run("formats", "INT4-G64", ok=False)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", forked.stderr)


def test_search_prints_json_and_nothing_else_on_stdout(searched):
    assert len(json.loads(searched.stdout)["points"]) >= 5
    assert "candidates on the search text" in searched.stderr


def test_front_query_and_jobs_answer(run, searched):
    document = json.loads(run("front", "--json").stdout)
    assert document == json.loads(searched.stdout)
    found = json.loads(run("query", "--max-bits", "4.5", "--json").stdout)
    assert found["point"]["average_bits"] <= 4.5
    [job] = json.loads(run("jobs", "--json").stdout)
    assert (job["job"], job["state"]) == (document["job"], "done")
    assert "uniform" in run("front", str(job["job"])).stdout


def test_export_writes_what_it_says(run, searched, tmp_path):
    number = str(json.loads(searched.stdout)["points"][0]["id"])
    for target in ("map", "safetensors"):
        folder = tmp_path / target
        written = run("export", "--point", number, "--to", target, "-o", str(folder), "--json")
        document = json.loads(written.stdout)
        assert {file.name for file in folder.iterdir()} == set(document["files"])
    assert document["reloaded_kl"] == pytest.approx(document["measured_kl"], rel=0.01)
    again = run("export", "--point", number, "-o", str(folder), ok=False)
    assert "is not empty; choose another folder, or add --force" in again.stderr
    targets = "safetensors,compressed-tensors"  # the second has other scales: nothing is written
    both = run("export", "--point", number, "--to", targets, "-o", str(tmp_path / "both"), ok=False)
    assert "compressed-tensors can't serve" in both.stderr
    assert not (tmp_path / "both").exists()
    assert list(tmp_path.glob(".*")) == []  # no half-written folders left


def test_the_page_is_whole_and_self_contained(run, searched, tmp_path):
    run("front", "--html", str(tmp_path / "front.html"))
    page = (tmp_path / "front.html").read_text()
    assert "Plotly.newPlot" in page
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=", page)
    assert "random (control)" in page
    assert '"type":"heatmap"' in page


def test_dry_run_measures_nothing(run, tiny_folders, tmp_path):
    document = json.loads(
        run("search", str(tiny_folders("mixtral")), "--dry-run", "--json",
            store=f"sqlite:///{tmp_path}/none.sqlite").stdout
    )  # fmt: skip
    assert document["measurements"]["heldout"] > 0
    assert any(unit["kind"] == "experts" for unit in document["units"])
    assert "mlp.gate" in document["kept"][0]["name"]
    assert not (tmp_path / "none.sqlite").exists()


def test_a_dry_run_tells_where_maps_are_to_be_served(run, tiny_folders):
    said = run(
        "search", str(tiny_folders("llama")), "--dry-run", "--engine", "llama.cpp",
        "--menu", "gguf-q4_0,gguf-q8_0", "--context", "256", "--max-decode-latency", "8ms", "--max-memory", "1GiB",
    ).stderr  # fmt: skip
    assert "by llama.cpp on this machine: 1 x 256 tokens in the cache" in said
    assert "Limits: memory 1.074 GB, decode latency 8 ms;" in said
    assert "To be served" not in run("search", str(tiny_folders("llama")), "--dry-run").stderr


def test_formats_have_the_pinned_form(run):
    entries = {
        e["name"]: e for e in json.loads(run("formats", "--shape", "64x576", "--json").stdout)
    }
    assert entries["int4-g64"] == {
        "name": "int4-g64", "family": "integer", "bits_per_weight": 4.25,
        "nbytes": 64 * 576 * 4.25 / 8, "applies": True, "refusal": None, "stored_as": None,
        "kernels": ["cuda sm80+", "cpu"], "needs": [],
    }  # fmt: skip


def test_formats_are_found_by_family_as_it_is_printed(run):
    entries = json.loads(run("formats", "table+sparse", "--json").stdout)
    assert entries
    assert {entry["family"] for entry in entries} == {"table+sparse"}


def test_a_menu_of_one_format_says_what_is_missing(run, tiny_folders):
    for name in ("int4-g32", "gguf-q4_0"):
        result = run("search", str(tiny_folders("llama")), "--menu", name, "--dry-run", ok=False)
        assert f"of {name} every unit can get one scheme only" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["search", "/no/model"], "no model at '/no/model'"),
        (["front", "77"], "no job 77 in the store"),
        (["export", "--point", "99", "-o", "x"], "has no measured point 99; there are"),
        (["export", "--point", "1", "--to", "gguff", "-o", "x"], "unknown export target 'gguff'"),
        (["query", "--max-size", "3 parsecs"], "'3 parsecs' is not a size"),
        (
            ["query", "--max-size", "1kB"],
            r"no measured point has weight_bytes <= 1,000 (the smallest",
        ),
        (["formats", "--shape", "12"], "'12' is not a shape"),
        (["formats", "INT4-G64"], "nearest: int4-g64"),
        (
            ["search", "demo", "--menu", "gguf-q5"],
            "unknown menu or format 'gguf-q5'; nearest: gguf-q5_",
        ),
        (["search", "x", "--bits", "four"], "'four' is not a list of numbers"),
    ],
)
def test_bad_input_is_one_line_and_a_status(run, searched, arguments, words):
    result = run(*arguments, ok=False)
    assert result.returncode == 1
    assert words in result.stderr
    assert result.stderr.strip().count("\n") == 0
    assert result.stdout == ""


def test_an_unusable_store_is_one_line(run, tmp_path):
    (tmp_path / "file").write_text("x")
    result = run("jobs", ok=False, store=f"sqlite:///{tmp_path}/file/s.sqlite")
    assert "can't use the store" in result.stderr


def test_db_upgrade_says_what_it_did(run, tmp_path):
    url = f"sqlite:///{tmp_path}/s.sqlite"
    assert run("db", "upgrade", store=url).stdout.startswith("schema empty -> ")
    assert " -> " in run("db", "upgrade", store=url).stdout


@pytest.mark.parametrize(
    "command", [["--help"], ["front"], ["front", "--html"], ["query"], ["jobs"]]
)
def test_answers_need_no_torch_and_no_ray(searched, run, command, tmp_path):
    """Imports cost seconds; these commands must answer at once."""
    drawing = {"plotly"} if "--html" in command else set()
    if drawing:
        command = [*command, str(tmp_path / "front.html")]
    if command == ["query"]:
        command = ["query", "--max-bits", "9"]
    code = (
        "import sys; from bitfront.cli import app\n"
        f"sys.argv = ['bitfront', *{command!r}]\n"
        "if sys.argv[1] != '--help': sys.argv += ['--store', " + repr(run.store) + "]\n"
        "try: app()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'ray', 'transformers', 'scipy', 'alembic', 'plotly'} & set(sys.modules)\n"
        f"heavy -= {drawing!r}\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_every_command_has_help_and_is_in_the_readme(run):
    from bitfront.cli import app

    readme = (ROOT / "README.md").read_text()
    for command in (c for c in app.registered_commands if not c.hidden):
        name = command.name or command.callback.__name__
        assert command.callback.__doc__
        assert f"bitfront {name}" in readme, name
