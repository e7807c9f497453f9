"""`fvgen ui` in a real browser, and for twenty visitors at once: the tiny model, photographs of a built-in room."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from browser import MISSING, Browser, browser

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[1]
SECONDS = 240  # that a step may take on a busy machine
FILES = "#photographs input[type=file]"


class Server:
    """`fvgen ui` on a free port, its work folder in ``place``."""

    def __init__(self, place: Path, *words: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address, self.place = f"http://127.0.0.1:{self.port}/", place
        source = f"{REPOSITORY / 'src'}"
        command = [sys.executable, "-c", "from fvgen.cli import main; main()", "ui", "--port", str(self.port)]
        self.process = subprocess.Popen(
            [*command, "--work", str(place), *words],
            env=os.environ | {"PYTHONPATH": source, "FVGEN_CACHE": str(place / "cache"), "GRADIO_SHARE": "True"},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        until = time.monotonic() + SECONDS
        while "the page is at" not in (line := self.process.stderr.readline()):
            assert self.process.poll() is None and time.monotonic() < until, "".join([*self.lines, line])
            self.lines.append(line)
        threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True).start()

    @property
    def root(self) -> Path:
        (found,) = self.place.glob("fvgen-ui-*")
        return found

    def visitors(self) -> list[Path]:
        return sorted((self.root / "sessions").glob("*"))

    def jobs(self) -> list[int]:
        """Processes at work in a visitor's folder."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                inside = str(self.root) in os.readlink(process / "cwd")
                zombie = (process / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
            except OSError:
                continue
            if inside and not zombie:
                found.append(int(process.name))
        return found

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("gradio", reason="Gradio, which serves the page, is not installed (pip install -e '.[ui]')")
    pytest.importorskip("cv2", reason="two photographs are posed by OpenCV")
    served = Server(tmp_path_factory.mktemp("ui"))
    try:
        yield served
    finally:
        if served.process.poll() is None:
            served.end()


@pytest.fixture(scope="module")
def window(server: Server) -> Iterator[Browser]:
    if MISSING:
        pytest.skip(MISSING)
    with browser() as opened:
        opened.resize(1280, 900)
        yield opened


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    from fvgen.ui.examples import EXAMPLES, photographs_of_example

    return photographs_of_example(next(iter(EXAMPLES)), tmp_path_factory.mktemp("rooms"))


def wait(condition: Callable[[], Any], why: Callable[[], Any] = lambda: "", seconds: float = SECONDS) -> Any:
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, why()
        time.sleep(0.25)
    return found


def status(window: Browser) -> str:
    return window.run("const e = document.querySelector('#status'); return e ? e.innerText : ''")


def until_said(window: Browser, words: str, seconds: float = SECONDS) -> str:
    wait(lambda: words in status(window), lambda: status(window), seconds)
    return status(window)


def fresh(window: Browser, server: Server) -> None:
    window.go(server.address)
    wait(lambda: window.run(f"return document.querySelector('{FILES}') !== null"))
    until_said(window, "Nothing yet")


def fill(window: Browser, label: str, value: object) -> None:
    script = "const [label, value] = arguments;"
    script += "const found = [...document.querySelectorAll('label')].find((one) => one.innerText.includes(label));"
    script += "const field = found.querySelector('input'); field.value = value;"
    script += "field.dispatchEvent(new Event('input', { bubbles: true })); field.blur();"
    window.run(script, label, value)


def of_frame(window: Browser, title: str, script: str) -> Any:
    """What a script returns in the page of an iframe."""
    with window.inside(f"iframe[title='{title}']"):
        return window.run(script)


# --- From photographs to a download ---


def test_two_photographs_are_looked_at_generated_played_compared_and_downloaded(server, window, photographs, tmp_path):
    fresh(window, server)
    window.give(FILES, *photographs)
    until_said(window, "2 photographs.")
    fill(window, "Steps", 2)

    window.click("#look")
    until_said(window, "Done.")
    title = "points, cameras and path in 3D"
    wait(lambda: window.run("return document.querySelector('#seen iframe') !== null"))
    wait(lambda: of_frame(window, title, "return document.querySelectorAll('nav button').length") == 3)  # all and two
    count = of_frame(window, title, "return facts.count")
    assert count > 2000
    turned = "const before = [...camera.center]; orbit(0.3, 0.1); return before.some((x, k) => x !== camera.center[k])"
    assert of_frame(window, title, turned) is True
    wait(lambda: window.run("const film = document.querySelector('#seen video'); return film && film.readyState >= 2"))

    window.click("#generate")
    until_said(window, "Generating")
    until_said(window, "Done.")
    title = "render, student and teacher side by side"
    wait(lambda: window.run("return document.querySelector('#result iframe') !== null"))
    ready = "return films.left.readyState >= 2 && films.right.readyState >= 2 && films.left.videoWidth"
    assert wait(lambda: of_frame(window, title, ready)) == 64
    names = of_frame(window, title, "return [...element('leftFilm').options].map((one) => one.value).join(' ')")
    assert names == "render video"
    of_frame(window, title, "element('play').click(); return 0")
    wait(lambda: of_frame(window, title, "return films.left.currentTime > 0.2 && films.right.currentTime > 0.2"))
    wait(lambda: int(of_frame(window, title, "return range.value")) > 1)
    of_frame(window, title, "element('play').click(); part(25); return 0")
    assert "25%" in of_frame(window, title, "return films.right.style.clipPath")
    assert (
        of_frame(window, title, "return facts.frames") == 8
        and of_frame(window, title, "return facts.known.length") == 2
    )

    link = window.run("return document.querySelector('a[download=\"walk.zip\"]').href")
    with urlopen(link) as answer:
        archive = zipfile.ZipFile(io.BytesIO(answer.read()))
    names = set(archive.namelist())
    assert archive.testzip() is None
    assert {"compare.html", "walk/video.mp4", "walk/render.mp4", "walk/run.html", "walk/run.json"} <= names
    assert {"walk/transforms.json", "walk/points.ply", "walk/sparse/0/cameras.txt"} <= names
    assert {f"walk/frames/{k:05d}.png" for k in range(8)} <= names and not any("work" in name for name in names)
    run = archive.read("walk/run.json").decode()
    assert str(server.root) not in run and '"photographs/' in run  # where it was made is nobody's business

    # Nothing came from elsewhere, and nothing was refused by the page's own policy.
    fetched = window.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert fetched and all(name.startswith((server.address, "data:", "blob:")) for name in fetched)
    assert not [line for line in window.complaints() if "Content Security" in line or "404" in line]

    if pictures := os.environ.get("FVGEN_PICTURES"):  # to look at
        for width, height in ((1280, 900), (390, 844)):
            window.resize(width, height)
            for place in ("intro", "status", "result", "seen"):
                window.run("document.querySelector('#' + arguments[0]).scrollIntoView()", place)
                time.sleep(2)
                window.picture(Path(pictures) / f"{place}-{width}.png")
    window.resize(390, 844)
    assert wait(lambda: window.run("return innerWidth")) == 390
    assert window.run("return document.documentElement.scrollWidth") <= 390  # nothing to scroll sideways
    window.resize(1280, 900)


def test_an_example_fills_in_for_photographs_and_ends_in_a_scene(server, window):
    fresh(window, server)
    window.click("button.try")
    until_said(window, "2 photographs.")
    fill(window, "Steps", 1)
    window.click("#scene input")
    window.click("#generate")
    until_said(window, "of the fit", 2 * SECONDS)
    until_said(window, "Done.", 3 * SECONDS)
    wait(lambda: window.run("return document.querySelectorAll('#result iframe').length") == 2)
    assert wait(lambda: of_frame(window, "3D scene", "return facts.count")) > 1000
    seen = "draw(); const { width, height } = canvas, rows = new Uint8Array(4 * width * height);"
    seen += (
        "gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, rows); return Math.max(...rows.slice(0, 4096))"
    )
    assert of_frame(window, "3D scene", seen) > 0


# --- Stopping ---


def test_a_cancelled_job_ends_at_once_and_the_next_one_begins(server, window, photographs):
    fresh(window, server)
    window.give(FILES, *photographs)
    until_said(window, "2 photographs.")
    fill(window, "Steps", 1000)
    window.click("#generate")
    until_said(window, "8 frames;")  # it has a path, and draws
    assert server.jobs()
    window.click("#cancel")
    until_said(window, "Cancelled.", 20)
    wait(lambda: not server.jobs(), seconds=20)
    assert window.run("return document.querySelector('#result iframe')") is None
    fill(window, "Steps", 1)
    window.click("#generate")
    until_said(window, "Done.")


def test_a_closed_tab_ends_its_job_and_leaves_nothing(server, window, photographs):
    window.go("about:blank")
    wait(lambda: not server.visitors(), server.visitors, 60)
    fresh(window, server)
    window.give(FILES, *photographs)
    until_said(window, "2 photographs.")
    fill(window, "Steps", 1000)
    window.click("#generate")
    until_said(window, "8 frames;")
    assert server.jobs() and len(server.visitors()) == 1
    uploads = server.root / "uploads"
    assert [file for file in uploads.rglob("*.png")]
    window.go("about:blank")
    wait(lambda: not server.jobs() and not server.visitors(), lambda: (server.jobs(), server.visitors()), 60)
    assert not [file for file in uploads.rglob("*.png")]


# --- What is refused ---


def bomb(file: Path) -> Path:
    """A PNG of some hundred bytes that says it has 144 million pixels."""
    chunks = b""
    head = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0)
    for name, data in ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")):
        chunks += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return file


def test_bad_uploads_are_refused_in_a_sentence_and_good_ones_still_work(server, window, photographs, tmp_path):
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    many = []
    for number in range(51):
        many.append(tmp_path / f"{number}.png")
        many[-1].write_bytes(photographs[0].read_bytes() + bytes([number]))
    large = tmp_path / "large.jpg"
    with large.open("wb") as file:
        file.write(b"\xff\xd8\xff")
        file.truncate(200 << 20)
    for files, words in (
        ([text], "no photograph by its first bytes"),
        ([bomb(tmp_path / "bomb.png")], "more than 64 megapixels"),
        (many, "51 photographs are more than 50"),
    ):
        fresh(window, server)
        window.give(FILES, *files)
        until_said(window, words, 60)
    fresh(window, server)
    window.give(FILES, large)
    wait(lambda: "maximum allowed size" in window.run("return document.body.innerText"), lambda: status(window), 60)
    held = sum(file.stat().st_size for file in server.root.rglob("*") if file.is_file())
    assert held < 64 << 20
    fresh(window, server)
    window.give(FILES, *photographs)
    until_said(window, "2 photographs.")


def posted(server: Server, path: str, body: bytes, kind: str, **headers: str) -> tuple[int, str]:
    request = Request(server.address + path, body, {"Content-Type": kind, **headers})
    try:
        with urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def multipart(name: str, content: bytes) -> tuple[bytes, str]:
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return head.encode() + content + b"\r\n--x--\r\n", "multipart/form-data; boundary=x"


def test_names_that_are_paths_stay_in_the_upload_folder(server, photographs):
    before = {file for file in server.place.rglob("*") if "uploads" not in file.parts}
    for name in ("../../../../evil.png", "..\\\\..\\\\evil.png", "/tmp/fvgen-evil.png", "....//....//evil.png"):
        code, said = posted(server, "gradio_api/upload", *multipart(name, photographs[0].read_bytes()))
        if code == 200:
            (kept,) = re.findall(r'"(.*?)"', said)
            assert (server.root / "uploads") in Path(kept).resolve().parents
    assert {file for file in server.place.rglob("*") if "uploads" not in file.parts} == before
    assert not Path("/tmp/fvgen-evil.png").exists()


def test_nothing_outside_the_work_folder_is_read_or_fetched(server, photographs, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")

    def got(path: str, **headers: str) -> int:
        try:
            with urlopen(Request(server.address + path, headers=headers), timeout=60) as answer:
                return answer.status
        except HTTPError as error:
            return error.code

    for path in (secret, "/etc/passwd", server.root / "lock", REPOSITORY / "pyproject.toml", Path.home()):
        assert got(f"gradio_api/file={path}") in (403, 404)
    for path in ("gradio_api/file=http://127.0.0.1:1/x", "gradio_api/proxy=http://127.0.0.1:1/x", "walks/x/../../lock"):
        assert got(path) in (400, 404)
    assert got("", Host="stranger.example") == 400
    assert got("") == 200

    def judged(path: object) -> tuple[int, str]:
        body = {"data": [[{"path": str(path), "meta": {"_type": "gradio.FileData"}}]], "session_hash": "me"}
        return posted(server, "gradio_api/run/judge", json.dumps(body).encode(), "application/json")

    code, said = posted(server, "gradio_api/upload", *multipart("a.png", photographs[0].read_bytes()))
    assert code == 200 and "1 photograph." in judged(json.loads(said)[0])[1]  # what was uploaded is read
    for path in (secret, "/etc/passwd", server.root / "lock", "http://127.0.0.1:1/x.png"):
        code, said = judged(path)
        assert code >= 400 and "photograph." not in said and "root:" not in said
    assert not list(server.root.rglob("secret.png")) and not list(server.root.rglob("passwd"))
    code, _ = posted(server, "gradio_api/run/generate", b'{"data": []}', "application/json")
    assert code == 404  # nobody goes past the queue
    long = {"Content-Length": str(1 << 30)}
    assert posted(server, "gradio_api/upload", b"x", "multipart/form-data; boundary=x", **long)[0] == 413


# --- Many at once, and the end ---


def test_twenty_visitors_queue_and_all_finish(server, photographs):
    client = pytest.importorskip("gradio_client")
    ends: dict[int, str] = {}

    def visit(number: int) -> None:
        one = client.Client(server.address, verbose=False)
        files = [client.handle_file(str(photograph)) for photograph in photographs]
        said, made = one.predict(files, "the usual one", 0, 1, "walk", False, 0, 0, 0, number, api_name="/generate")[:2]
        link = re.search(r'href="(walks/[^"]+walk\.zip)"', str(made))
        with urlopen(server.address + link[1]) as answer:
            archive = zipfile.ZipFile(io.BytesIO(answer.read()))
        ends[number] = f'"seed": {number}' in archive.read("walk/run.json").decode() and "Done." in said
        one.close()

    begun, before = time.monotonic(), set(server.visitors())
    visitors = [threading.Thread(target=visit, args=(number,)) for number in range(20)]
    for visitor in visitors:
        visitor.start()
    most = 0
    while any(visitor.is_alive() for visitor in visitors):
        assert time.monotonic() - begun < 1500
        most = max(most, len(server.jobs()))
        time.sleep(0.5)
    print(f"twenty visitors: {time.monotonic() - begun:.0f} s")
    assert ends == dict.fromkeys(range(20), True)
    assert most == 1  # one job at a time
    wait(lambda: set(server.visitors()) <= before, server.visitors, 60)


def test_the_server_ends_in_order_and_leaves_nothing(server, photographs):
    root = server.root
    assert root.stat().st_mode & 0o777 == 0o700
    assert server.end() == 0
    assert not root.exists() and "removed" in "".join(server.lines)
    said = "".join(server.lines)  # Gradio's own refusals come with a traceback, once
    assert said.count("Traceback") == said.count("InvalidPathError: Cannot move")
