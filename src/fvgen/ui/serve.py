"""`fvgen ui`: the work folder, the port, the server, and their end."""

from __future__ import annotations

import errno
import ipaddress
import os
import signal
import socket
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock, Timeout

from fvgen.errors import Stopped, UserError
from fvgen.pipelines.presets import model_folder
from fvgen.system.files import disk_reason, remove, writable_folder
from fvgen.system.packages import install

PREFIX = "fvgen-ui-"
SWEEP = 30.0  # seconds between looks for what is old


def judge_gradio() -> None:
    """Raises UserError where Gradio is not installed."""
    if not find_spec("gradio"):
        raise UserError(f"the page needs Gradio, which is not installed; {install('ui')}")


def judge_port(host: str, port: int) -> None:
    """Raises UserError for an address that this machine has not, and for a port that is taken or closed to us."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except PermissionError as error:
            raise UserError(f"--port {port} is closed to you; choose one above 1023") from error
        except socket.gaierror as error:
            raise UserError(f"--host {host} is no address of this machine; leave it out for 127.0.0.1") from error
        except OSError as error:
            taken = "is in use by another program; choose another one, such as"
            if error.errno == errno.EADDRINUSE:
                raise UserError(f"--port {port} {taken} --port {port + 1 if port < 65535 else 7861}") from error
            raise UserError(f"--host {host}: {error.strerror}; leave it out for 127.0.0.1") from error


def judge_browser() -> None:
    """Raises UserError where no browser can be opened."""
    try:
        webbrowser.get()
    except webbrowser.Error as error:
        raise UserError("--browser finds no browser here; leave it out, and open the address yourself") from error


def absolute(model: str) -> str:
    """A model's name for processes that work in other folders: of a folder its whole path. Raises UserError for a path
    that leads nowhere; a name on the Hub is looked up by the first job."""
    if Path(model).exists():
        return str(model_folder(model).resolve())
    if "/" not in model.strip("/") or model.startswith(("/", ".")) or Path(model.split("/")[0]).exists():
        model_folder(model)
    return model


@contextmanager
def work_folder(parent: Path | None) -> Iterator[Path]:
    """A fresh folder that only its owner can enter, gone afterwards; those of servers that died are removed first."""
    place = Path(tempfile.gettempdir()) if parent is None else writable_folder(parent)
    remove_abandoned(place)
    try:
        root = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place)).resolve()
    except OSError as error:
        raise UserError(f"--work {place} cannot be written ({disk_reason(error) or error.strerror})") from error
    guard = FileLock(root / "lock")
    guard.acquire(timeout=0)
    try:
        yield root
    finally:
        guard.release()
        remove(root)


def remove_abandoned(place: Path) -> None:
    """Work folders of ours whose server holds their lock no more."""
    for folder in place.glob(f"{PREFIX}*"):
        with suppress(OSError, Timeout):
            if (
                folder.is_symlink()
                or folder.stat().st_uid != getattr(os, "getuid", int)()
                or not (folder / "lock").is_file()
            ):
                continue
            with FileLock(folder / "lock").acquire(timeout=0):
                pass
            remove(folder)


def closed_in(root: Path) -> dict[str, str]:
    """The environment that Gradio is imported in: its files in the work folder, nothing to anybody, and no setting of
    the user's that would open it further."""
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    return {
        "GRADIO_TEMP_DIR": str(root / "uploads"),
        "GRADIO_EXAMPLES_CACHE": str(root / "none"),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_RUN_HISTORY": "False",
        "GRADIO_SHARE": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def serve(
    models: dict[str, str],
    host: str = "127.0.0.1",
    port: int = 7860,
    work: Path | None = None,
    most: dict[str, float] | None = None,
    jobs: int = 1,
    keep_minutes: float = 60.0,
    device: str = "cpu",
    browser: bool = False,
) -> None:
    """Serve the page until Ctrl-C or SIGTERM, then remove all that visitors left.

    Args:
        models: folder or preset by name: "walk" alone, or "student" and "teacher".
        work: where the work folder is made; the system's temporary folder if None.
        most: fields of `fvgen.ui.limits.Limits` that differ. jobs: at work at once.
        keep_minutes: after which a visitor who was not heard of is forgotten.

    Raises UserError (one sentence, nothing left) for a port that is taken, a folder that cannot be written, models that
    there are not, and where Gradio is not installed. Raises Stopped at the end.
    """
    judge_gradio()
    judged = {name: absolute(model) for name, model in models.items()}
    judge_port(host, port)
    if device != "cpu":
        from fvgen.pipelines.folders import check_device  # takes seconds to import

        check_device(device)
    if browser:
        judge_browser()
    with work_folder(work) as root:
        os.environ |= closed_in(root)
        _serve(root, judged, host, port, most or {}, jobs, keep_minutes, device, browser)
    raise Stopped("the page is closed, and what visitors left is removed")


def _serve(root, models, host, port, most, jobs, keep_minutes, device, browser) -> None:
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.responses import FileResponse, PlainTextResponse
    from starlette.routing import Route

    from fvgen.ui import running
    from fvgen.ui.answers import Answers
    from fvgen.ui.guard import Guard
    from fvgen.ui.limits import Limits
    from fvgen.ui.page import build
    from fvgen.ui.parts import CSS
    from fvgen.ui.sessions import Sessions

    limits = Limits(**most)
    running.prepare("fvgen.ui.work")
    sessions = Sessions(root, 60 * keep_minutes)

    def walks(request):
        file = sessions.served(request.path_params["token"], request.path_params["name"])
        if file is None:
            return PlainTextResponse("This walk is gone: its page was closed, or left alone for long.", 404)
        return FileResponse(file, headers={"cache-control": "no-store"})

    page = build(Answers(models, device, limits, sessions), jobs)
    hosts = {"localhost", "127.0.0.1", "::1", host.lower()} if is_loopback(host) else None
    layers = [Middleware(Guard, limits=limits, uploads=sessions.uploads, hosts=hosts)]
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *given: over.set())
    font = ["system-ui", "sans-serif"]  # of the visitor's machine: Gradio's own come from the network
    theme = gr.themes.Default(primary_hue="orange", font=font, font_mono=["ui-monospace", "monospace"])
    theme = theme.set(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_400")
    try:
        page.launch(
            server_name=host, server_port=port, share=False, inbrowser=False, quiet=True, prevent_thread_lock=True,
            show_error=False, max_file_size=limits.file_bytes, allowed_paths=[str(root / "examples")],
            footer_links=[], run_history=False, ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False,
            theme=theme, css=CSS,
            app_kwargs={"middleware": layers, "routes": [Route("/walks/{token}/{name:path}", walks)],
                        "docs_url": None, "redoc_url": None, "openapi_url": None},
        )  # fmt: skip
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"fvgen: the page is at {address} (Ctrl-C closes it)", file=sys.stderr)
        if not is_loopback(host):
            print("fvgen: everybody who reaches this machine can use it; there is no password", file=sys.stderr)
        if browser:
            webbrowser.open(address)
        while not over.wait(SWEEP):
            sessions.sweep()
    finally:
        sessions.close_all()
        page.close(verbose=False)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False
