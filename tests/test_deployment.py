"""Files that deploy the service: as far as they can be checked without the engines that read them.

Against schemas (where they come from: `tests/data/README.md`), against each other, and against the real
command line, which every `bitfront …` in them must parse with.
"""

import json
import re
import shlex
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
import typer.main
import yaml
from jsonschema import Draft202012Validator
from sqlalchemy import make_url

from bitfront.cli import app
from workers.launching import STORE, jobs_address

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"
PORT, JOBS_PORT, POSTGRES_PORT = 8400, 8265, 5432
GUIDE = (ROOT / "docs/deploy.md").read_text()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
MANIFESTS = list(yaml.safe_load_all((ROOT / "docs/kuberay.yaml").read_text()))
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# of RayCluster, whose schema no package ships: fields of KubeRay 1.6's ray.io/v1, as we know them
CLUSTER = {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions",
           "headGroupSpec", "workerGroupSpecs"}  # fmt: skip
HEAD = {"rayStartParams", "template"}
GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", *HEAD}
AUTOSCALER = {"version", "idleTimeoutSeconds"}

OTHERS = {
    "HF_HOME": "huggingface_hub", "HF_TOKEN": "huggingface_hub", "PGPASSWORD": "libpq",
    "PGDATA": "postgres's image", "POSTGRES_USER": "postgres's image",
    "POSTGRES_DB": "postgres's image", "POSTGRES_PASSWORD": "postgres's image",
    "RAY_AUTH_MODE": "ray", "RAY_AUTH_TOKEN": "ray", "PYTHONUNBUFFERED": "python",
}  # fmt: skip


def named(kind, name):
    [found] = [m for m in MANIFESTS if (m["kind"], m["metadata"]["name"]) == (kind, name)]
    return found


def cluster():
    return named("RayCluster", "bitfront-ray")["spec"]


def containers():
    """All of the manifests, each with its pod's spec and what it is part of."""
    for manifest in MANIFESTS:
        spec = manifest.get("spec", {})
        for part in (spec, spec.get("headGroupSpec", {}), *spec.get("workerGroupSpecs", [])):
            pod = part.get("template", {}).get("spec")
            for container in (pod or {}).get("containers", []):
                yield manifest, pod, container


def faults(validator, document):
    return [f"{'.'.join(map(str, e.path))}: {e.message}" for e in validator.iter_errors(document)]


def compose_validator():
    return Draft202012Validator(json.loads((DATA / "compose-spec.json").read_text()))


@cache
def kubernetes_validator(kind):
    schema = json.loads((DATA / "kubernetes-1.32.json").read_text())
    return Draft202012Validator({**schema, "$ref": f"#/$defs/{schema['kinds'][kind]}"})


def blocks(text):
    """Fenced blocks: language and content."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


# ---- compose


def test_compose_follows_its_specification():
    validator = compose_validator()
    assert not faults(validator, COMPOSE)
    overrides = [text for language, text in blocks(GUIDE) if "services:" in text]
    assert overrides
    for text in overrides:
        assert not faults(validator, yaml.safe_load(text))
    broken = json.loads(json.dumps(COMPOSE))
    broken["services"]["bitfront"]["port"] = []
    assert faults(validator, broken)  # it is strict


def test_only_the_server_is_published_and_only_on_loopback():
    published = {n: s["ports"] for n, s in COMPOSE["services"].items() if "ports" in s}
    assert published == {"bitfront": [f"127.0.0.1:{PORT}:{PORT}"]}
    assert COMPOSE["services"]["bitfront"]["depends_on"] == {
        "postgres": {"condition": "service_healthy"}
    }


def test_volumes_are_declared_and_keep_what_must_last():
    for service in COMPOSE["services"].values():
        for volume in service["volumes"]:
            source = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")[0]
            assert source in COMPOSE["volumes"]
    mounted = {v.split(":")[-1] for v in COMPOSE["services"]["bitfront"]["volumes"]}
    assert {"/data", "/cache"} <= mounted


def test_the_environment_file_has_what_compose_asks_for():
    asked = set(re.findall(r"\$\{(\w+)", (ROOT / "compose.yaml").read_text()))
    example = (ROOT / ".env.example").read_text()
    offered = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", example, re.MULTILINE))
    assert set(offered) == asked
    assert not offered["POSTGRES_PASSWORD"]  # nobody's default
    assert not offered["HF_TOKEN"]
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert ".env" in ignored


# ---- image


def test_the_image_has_all_rooms_and_no_more():
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in patterns
    let_in = {line[1:] for line in patterns if line.startswith("!")}
    rooms = {name.split(".")[0] for name in PROJECT["tool"]["setuptools"]["packages"]}
    files = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert let_in == rooms | files
    assert all((ROOT / name).exists() for name in let_in)


def test_the_image_installs_what_there_is_and_drops_root():
    extras = set(re.findall(r"EXTRAS=([\w,]+)", DOCKERFILE + GUIDE))
    assert extras
    for names in extras:
        assert set(names.split(",")) <= set(PROJECT["project"]["optional-dependencies"])
    assert "psycopg[binary]" in DOCKERFILE
    user = re.findall(r"^USER (\w+)$", DOCKERFILE, re.MULTILINE)[-1]
    assert f"--uid 1000 --create-home {user}" in DOCKERFILE
    assert DOCKERFILE.index(f"\nUSER {user}") < DOCKERFILE.index("\nCMD ")
    assert f"EXPOSE {PORT}" in DOCKERFILE
    base = re.search(r"^FROM python:([\d.]+)-slim$", DOCKERFILE, re.MULTILINE)
    assert PROJECT["project"]["requires-python"] == f">={base[1]}"
    arguments = set(re.findall(r"^ARG (\w+)=", DOCKERFILE, re.MULTILINE))
    assert set(re.findall(r"--build-arg (\w+)=", DOCKERFILE + GUIDE)) == arguments


def test_what_the_server_imports_is_installed_with_it():
    setuptools = PROJECT["tool"]["setuptools"]
    rooms = {name.split(".")[0] for name in setuptools["packages"]}
    packages = {
        file.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for room in rooms
        for file in (ROOT / room).rglob("__init__.py")
    }
    assert set(setuptools["packages"]) >= packages
    names = {re.match(r"[\w-]+", text)[0] for text in PROJECT["project"]["dependencies"]}
    called = {"yaml": "pyyaml"}
    for file in (ROOT / "bitfront/server").glob("*.py"):
        roots = re.findall(r"^\s*(?:from|import) (\w+)", file.read_text(), re.MULTILINE)
        others = set(roots) - rooms - set(sys.stdlib_module_names) - {"starlette"}  # FastAPI's
        assert {called.get(name, name).replace("_", "-") for name in others} <= names


# ---- Kubernetes


@pytest.mark.parametrize(
    "manifest", MANIFESTS, ids=lambda m: f"{m['kind']}-{m['metadata']['name']}"
)
def test_manifests_follow_the_schemas_of_kubernetes(manifest):
    assert manifest["kind"] == "Namespace" or manifest["metadata"]["namespace"] == "bitfront"
    if manifest["kind"] != "RayCluster":
        assert not faults(kubernetes_validator(manifest["kind"]), manifest)
        assert faults(kubernetes_validator(manifest["kind"]), {**manifest, "specs": {}})


def test_the_cluster_is_one():
    assert named("RayCluster", "bitfront-ray")["apiVersion"] == "ray.io/v1"
    spec = cluster()
    groups = spec["workerGroupSpecs"]
    assert set(spec) == CLUSTER
    assert set(spec["headGroupSpec"]) == HEAD
    assert set(spec["autoscalerOptions"]) == AUTOSCALER
    validator = kubernetes_validator("PodTemplateSpec")
    for part in (spec["headGroupSpec"], *groups):
        assert not faults(validator, part["template"])
        assert all(isinstance(value, str) for value in part["rayStartParams"].values())
    for group in groups:
        assert set(group) == GROUP
        assert 0 <= group["minReplicas"] <= group["replicas"] < group["maxReplicas"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert int(limits["nvidia.com/gpu"]) >= 1
    assert spec["enableInTreeAutoscaling"] is True
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert spec["rayVersion"] == pinned[1]


def test_manifests_refer_to_what_is_there():
    claims = {m["metadata"]["name"] for m in MANIFESTS if m["kind"] == "PersistentVolumeClaim"}
    images, secrets = set(), set()
    for manifest, pod, container in containers():
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        for template in manifest["spec"].get("volumeClaimTemplates", []):
            volumes[template["metadata"]["name"]] = template
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
        for variable in container.get("env", []):
            if secret := variable.get("valueFrom", {}).get("secretKeyRef"):
                secrets.add((secret["name"], secret["key"]))
        images.add(container["image"])
    assert images == {"postgres:17", "registry.example.com/bitfront:gpu"}
    assert COMPOSE["services"]["postgres"]["image"] in images
    made = {
        (name, key)
        for name, rest in re.findall(r"create secret generic (\S+)(.*)", GUIDE)
        for key in re.findall(r"--from-literal=(\w+)=", rest)
    }
    assert secrets == made | {("bitfront-ray", "auth_token")}  # the operator makes that one
    for service in (m for m in MANIFESTS if m["kind"] == "Service"):
        selected = service["spec"]["selector"]
        pods = [m for m in MANIFESTS if m["kind"] in {"Deployment", "StatefulSet"}
                and m["spec"]["template"]["metadata"]["labels"] == selected]  # fmt: skip
        assert len(pods) == 1
        assert pods[0]["spec"]["selector"]["matchLabels"] == selected


def test_exports_lie_where_server_and_drivers_see_them():
    claim = named("PersistentVolumeClaim", "bitfront-data")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    server = named("Deployment", "bitfront")["spec"]["template"]["spec"]
    head = cluster()["headGroupSpec"]["template"]["spec"]
    for pod in (server, head):
        [container] = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts["data"] == "/data"
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "bitfront-data"
    command = server["containers"][0]["command"]
    assert command[command.index("--data") + 1] == "/data"


def test_rays_ports_are_closed_to_all_but_its_own_and_the_server():
    policy = named("NetworkPolicy", "ray")["spec"]
    assert policy["podSelector"]["matchLabels"] == {"ray.io/cluster": "bitfront-ray"}
    assert policy["policyTypes"] == ["Ingress"]
    own, server = policy["ingress"]
    assert own == {"from": [{"podSelector": policy["podSelector"]}]}
    labels = named("Deployment", "bitfront")["spec"]["template"]["metadata"]["labels"]
    assert server["from"] == [{"podSelector": {"matchLabels": labels}}]
    assert server["ports"] == [{"protocol": "TCP", "port": JOBS_PORT}]
    store = named("NetworkPolicy", "postgres")["spec"]["ingress"]
    assert [rule["ports"] for rule in store] == [[{"protocol": "TCP", "port": POSTGRES_PORT}]]


def test_pods_run_as_nobody_special():
    for _, pod, _ in containers():
        assert pod["securityContext"]["runAsNonRoot"] is True


# ---- what they have in common


def test_ports_agree():
    server = named("Deployment", "bitfront")["spec"]["template"]["spec"]["containers"][0]
    [port] = server["ports"]
    assert port["containerPort"] == PORT
    service = named("Service", "bitfront")["spec"]["ports"]
    assert [(p["port"], p["targetPort"]) for p in service] == [(PORT, port["name"])]
    for probe, path in (("livenessProbe", "/health"), ("readinessProbe", "/ready")):
        assert server[probe]["httpGet"] == {"path": path, "port": port["name"]}
    head = cluster()["headGroupSpec"]["template"]["spec"]["containers"][0]
    opened = {p["name"]: p["containerPort"] for p in head["ports"]}
    assert opened["dashboard"] == JOBS_PORT
    assert jobs_address("ray://HEAD:10001") == f"http://HEAD:{JOBS_PORT}"
    command = server["command"]
    assert command[command.index("--ray") + 1] == f"http://bitfront-ray-head-svc:{JOBS_PORT}"
    default = next(p for p in commands()["serve"].params if p.name == "port").default
    assert default == PORT
    for found in re.findall(r"(?:127\.0\.0\.1|0\.0\.0\.0|localhost):(\d+)", GUIDE):
        assert int(found) in {PORT, JOBS_PORT}


def test_store_urls_have_no_password():
    texts = [GUIDE, (ROOT / "compose.yaml").read_text()]
    urls = re.findall(r"postgresql\+psycopg://[^\s`\"]+", " ".join(texts))
    assert len(urls) >= 3
    for url in urls:
        assert make_url(url).password is None
        assert make_url(url).database == "bitfront"


def test_variables_are_somebodys():
    read = set()
    for room in ("bitfront", "quantization", "store", "workers"):
        for file in (ROOT / room).rglob("*.py"):
            read |= set(re.findall(r"\"(BITFRONT_\w+)\"", file.read_text()))
    assert STORE in read
    ours = re.findall(r"\b(BITFRONT_\w+)", "".join(
        [GUIDE, DOCKERFILE, *(f.read_text() for f in (ROOT / "compose.yaml", ROOT / "docs/kuberay.yaml"))]
    ))  # fmt: skip
    assert set(ours) <= read
    given = {name for service in COMPOSE["services"].values() for name in service["environment"]}
    given |= {v["name"] for _, _, container in containers() for v in container.get("env", [])}
    given |= set(re.findall(r"^(?:ENV|   ) +(\w+)=", DOCKERFILE, re.MULTILINE))
    assert given <= read | set(OTHERS)


# ---- commands


@cache
def commands():
    return typer.main.get_command(app).commands


def parse(words):
    """As the command line does, without running anything."""
    command = typer.main.get_command(app)
    context = command.make_context("bitfront", list(words))
    while hasattr(command, "resolve_command"):
        _, command, rest = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        context = command.make_context(command.name, rest, parent=context)


def lines_of(text):
    for language, block in blocks(text):
        if language in {"", "ini"}:
            yield from (line for line in block.splitlines() if "bitfront " in line)
    yield from re.findall(r"`(bitfront [^`]+)`", text)


def calls(line):
    """The arguments of each `bitfront` that a shell would start in a line."""
    words = shlex.split(re.sub(r"\$\([^)]*\)", "X", line), comments=True)
    for i, word in enumerate(words):
        command = word.endswith("bin/bitfront") or (
            word == "bitfront" and (i == 0 or words[i - 1] in {"--", "bitfront"} or "=" in words[i - 1])
        )  # fmt: skip
        if command and words[i + 1 :] and words[i + 1] != "bitfront":
            rest = words[i + 1 :]
            stop = next((j for j, w in enumerate(rest) if w in {"&&", "|", ">", ";"}), len(rest))
            yield tuple({"N": "1", "JOB": "1"}.get(w, w) for w in rest[:stop])


def written():
    """Every command line of ours in the files: where it is, and its words."""
    for name in ("docs/deploy.md", "README.md"):
        text = (ROOT / name).read_text()
        if name == "README.md":  # its tables name commands with their brackets
            text = "".join(f"```{language}\n{block}```\n" for language, block in blocks(text))
        for line in lines_of(text):
            for words in calls(line):
                yield name, words
    yield "Dockerfile", tuple(json.loads(re.search(r"^CMD (.+)$", DOCKERFILE, re.MULTILINE)[1])[1:])
    for _, _, container in containers():
        if container.get("command", [""])[0] == "bitfront":
            yield "docs/kuberay.yaml", tuple(container["command"][1:])


@pytest.mark.parametrize(
    ("where", "words"), sorted(set(written())), ids=lambda value: " ".join(value) if isinstance(value, tuple) else value
)  # fmt: skip
def test_commands_are_ours(where, words):
    parse(words)


def test_commands_were_found():
    found = {words[:2] for _, words in written()}
    assert {("tokens", "create"), ("db", "upgrade"), ("serve", "--host")} <= found
    assert len([1 for where, _ in written() if where == "docs/deploy.md"]) >= 10


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("serve", "--bind", "x"), "No such option"),
        (("server",), "No such command"),
        (("serve", "--port", "x"), "a valid integer"),
        (("db", "upgrade", "now"), "unexpected extra argument"),
    ],
)
def test_a_wrong_command_would_be_noticed(words, said):
    with pytest.raises(Exception, match=said):
        parse(words)


# ---- the guide


def test_the_guide_says_what_was_not_run():
    assert "not run in Docker or on Kubernetes" in GUIDE
    assert len(GUIDE.splitlines()) <= 250


def test_the_guide_names_metrics_that_there_are():
    text = (ROOT / "bitfront/server/health.py").read_text()
    for name in re.findall(r"`(bitfront_[a-z_]+)", GUIDE):
        assert f'"{name.removesuffix("_total")}"' in text
    [scrape] = [yaml.safe_load(text) for _, text in blocks(GUIDE) if "scrape_configs" in text]
    [job] = scrape["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"127.0.0.1:{PORT}"]}]


def test_the_guide_names_files_that_there_are():
    for name in re.findall(r"`((?:docs/|tests/)?[\w.-]+\.(?:yaml|py|md))`", GUIDE):
        assert (ROOT / name).is_file() or name == "compose.override.yaml", name
