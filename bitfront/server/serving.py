"""`bitfront serve`: the application in uvicorn, with a launcher for the Ray that was named."""

import gc
import logging
import os
import signal
from functools import partial
from pathlib import Path

import platformdirs
import uvicorn

from bitfront.config import DEMO
from bitfront.server.app import create_app
from bitfront.server.policy import check_again, job_of
from bitfront.server.settings import Settings
from bitfront.server.supervising import Supervisor
from store.database import Store
from workers.launching import Launcher, LocalLauncher, RayLauncher

LOCAL = ("local", "none")


def serve(settings: Settings, host: str, port: int) -> None:
    """Serve until somebody ends it.

    Drivers of this machine end with it, and their jobs go on when it is started again; those of a
    cluster go on without it.

    Raises:
        WorkerError: the cluster's Jobs API can't be reached.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    store = Store(settings.store_url).open()
    launcher = make_launcher(settings)
    arguments = ["--data", str(settings.data)]
    cache = os.environ.get("BITFRONT_CACHE")
    environment = {"BITFRONT_CACHE": cache} if cache else {}
    signal.signal(signal.SIGTERM, _end)  # uvicorn raises it once more, when it has shut down
    check = partial(check_again, roots=settings.roots)
    supervisor = Supervisor(store, launcher, settings.most_running, arguments, environment, check)
    app = create_app(settings, store, supervisor)
    prepare()
    try:
        uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=3)
    finally:
        if isinstance(launcher, LocalLauncher):
            launcher.stop()


def _end(*_: object) -> None:
    raise SystemExit(0)


def prepare() -> None:
    """Import what requests will want, seconds in which all others would wait, and let that be.

    Collecting garbage among a million objects of libraries stops everybody for a quarter of a
    second; they stay as long as the process.
    """
    import search.exact  # noqa: F401  # SciPy

    job_of({"model": DEMO}, ())  # torch
    gc.collect()
    gc.freeze()


def make_launcher(settings: Settings) -> Launcher:
    """Of this machine, or of a cluster."""
    if settings.ray in LOCAL:
        return LocalLauncher(settings.data, settings.ray)
    return RayLauncher(settings.ray)


def default_data() -> Path:
    """Where exports and drivers' logs lie."""
    return Path(platformdirs.user_data_dir("bitfront")) / "server"
