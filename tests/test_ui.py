"""`fvgen ui` without a browser: what visitors may send, what they may see, and what is left of them."""

from __future__ import annotations

import asyncio
import io
import json
import os
import socket
import struct
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import ui_jobs
from checks import refusal
from PIL import Image

from fvgen.errors import UserError
from fvgen.system.packages import install
from fvgen.ui import guard, serve
from fvgen.ui.answers import BOTH, Answers, Asked, Follow
from fvgen.ui.guard import Guard, judge_path
from fvgen.ui.limits import Limits, judge_uploads, kind_of, names_an_address, safe_name
from fvgen.ui.order import USUAL, Order, frame_size, path_words, seed_of
from fvgen.ui.running import Running
from fvgen.ui.sessions import Sessions, take_photographs

SMALL = Limits(photographs=4, file_bytes=20_000, all_bytes=50_000, pixels=10_000, all_pixels=25_000)


def picture(kind: str = "JPEG", width: int = 60, height: int = 40, seed: int = 0, **options) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind, **options)
    return file.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A decompression bomb: a PNG of a few hundred bytes whose header says what it grows to."""
    rows = zlib.compress(b"\0" * 1000)
    chunks = b""
    for name, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", rows),
        (b"IEND", b""),
    ):
        chunks += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.fixture
def upload(tmp_path: Path):
    """Puts a file where Gradio would."""
    folder = tmp_path / "uploads"

    def put(name: str, content: bytes) -> Path:
        place = folder / f"{zlib.crc32(content):08x}"
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
        return place / name

    folder.mkdir()
    put.folder = folder
    return put


# --- Uploads ---


def test_kinds_are_told_by_first_bytes_whatever_the_name(upload):
    pytest.importorskip("pillow_heif")
    from pillow_heif import register_heif_opener

    register_heif_opener()
    made = {".jpg": picture("JPEG"), ".png": picture("PNG"), ".webp": picture("WEBP"), ".heic": picture("HEIF")}
    for kind, content in made.items():
        assert kind_of(content[:32]) == kind
        assert judge_uploads([upload("holiday.txt", content)], upload.folder, SMALL) == [f"holiday{kind}"]
    for head in (b"", b"GIF89a", b"%PDF-1.7", b"<svg", b"#!/bin/sh", b"RIFF....WAVE", b"....ftypisom", b"PK\3\4"):
        assert kind_of(head) is None


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("../../etc/passwd.jpg", "passwd.jpg"),
        ("..\\..\\windows\\x.jpg", "x.jpg"),
        ("/absolute/one.JPEG", "one.jpg"),
        (".hidden.jpg", "hidden.jpg"),
        ("...", "photograph.jpg"),
        ("", "photograph.jpg"),
        ("a\0b\n<script>.jpg", "a_b__script.jpg"),
        ("Küche 3.png", "Küche 3.jpg"),
        ("x" * 300 + ".jpg", "x" * 60 + ".jpg"),
        ("photo.tar.gz", "photo.tar.jpg"),
    ],
)
def test_names_cannot_be_paths(given, kept):
    assert safe_name(given, ".jpg") == kept
    assert Path(kept).name == kept and not kept.startswith(".")


def test_equal_names_are_told_apart():
    names: list[str] = []
    for given in ("a.jpg", "A.png", "b/a.jpg"):
        names.append(safe_name(given, ".jpg", names))
    assert names == ["a.jpg", "A-2.jpg", "a-3.jpg"]


def test_what_is_too_much_is_refused_in_one_sentence(upload):
    def judged(*files: Path) -> str:
        return refusal(lambda: judge_uploads(files, upload.folder, SMALL))

    good = [upload(f"{seed}.jpg", picture(seed=seed)) for seed in range(5)]
    assert judge_uploads(good[:4], upload.folder, SMALL) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert judged(*good) == "5 photographs are more than 4; drop fewer"
    assert "no photographs" in judged()
    large = upload("large.png", picture("PNG", 100, 90))
    assert "'large.png' has" in judged(large) and "together" not in judged(large)
    heavy = [upload(f"h{seed}.jpg", picture("JPEG", 99, 99, seed, quality=95)) for seed in range(4)]
    assert len(heavy[0].read_bytes()) < SMALL.file_bytes and "together" in judged(*heavy)
    wide = [upload(f"w{seed}.jpg", picture("JPEG", 99, 99, seed, quality=5)) for seed in range(3)]
    assert "megapixels together" in judged(*wide)
    assert "is 101x100, more than" in judged(upload("p.jpg", picture("JPEG", 101, 100, quality=5)))


def test_what_is_no_photograph_is_refused_in_one_sentence(upload):
    def judged(name: str, content: bytes) -> str:
        sentence = refusal(lambda: judge_uploads([upload(name, content)], upload.folder, Limits()))
        assert str(upload.folder) not in sentence  # where it lies is nobody's business
        return sentence

    assert (
        judged("text.jpg", b"hello\n") == "'text.jpg' is no photograph by its first bytes; give JPEG, PNG, WebP or HEIC"
    )
    assert "is empty" in judged("empty.jpg", b"")
    assert "cannot be read" in judged("cut.jpg", picture()[:20])
    assert "more than 64 megapixels" in judged("bomb.png", png_of(12_000, 12_000))
    assert "exceeds limit" in judged("bomb.png", png_of(60_000, 60_000))


def test_only_what_was_uploaded_is_read(upload, tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(picture())
    link = upload.folder / "link.jpg"
    link.symlink_to(secret)
    for path in (secret, upload.folder / ".." / "secret.jpg", link, upload.folder / "gone.jpg", upload.folder):
        assert "was not uploaded" in refusal(lambda path=path: judge_uploads([path], upload.folder, Limits()))


# --- Choices ---


def test_paths_are_presets_and_nothing_of_this_machine(tmp_path):
    assert path_words(USUAL, 3.0) is None
    assert path_words("through", 3.0) == "through"
    assert path_words("orbit", None) == "orbit" and path_words("orbit", -12.5) == "orbit:-12.5"
    for name in (str(tmp_path), "/etc/passwd", "orbit:3", ""):
        assert "there is no path" in refusal(lambda name=name: path_words(name, None))


def test_sizes_and_seeds_have_bounds():
    assert frame_size(None, None, 100) is None and frame_size(10, 10, 100) == (10, 10)
    for height, width in ((10, None), (None, 10), (10, 11), (-5, -5), (1, 50)):
        refusal(lambda height=height, width=width: frame_size(height, width, 100))
    assert seed_of(None) == 0 and seed_of(2**32 - 1) == 2**32 - 1
    for number in (-1, 2**32):
        refusal(lambda number=number: seed_of(number))


def test_the_same_choices_have_one_folder_and_others_another():
    base = Order(("a.png",), (("walk", "tiny"),), None, None, 4, None, 0, False, "cpu")
    assert base.folder == Order(*(getattr(base, name) for name in base.__dataclass_fields__)).folder
    others = [
        Order(("b.png",), (("walk", "tiny"),), None, None, 4, None, 0, False, "cpu"),
        Order(("a.png",), (("walk", "other"),), None, None, 4, None, 0, False, "cpu"),
        Order(("a.png",), (("walk", "tiny"),), "orbit", None, 4, None, 0, False, "cpu"),
        Order(("a.png",), (("walk", "tiny"),), None, None, 5, None, 0, False, "cpu"),
        Order(("a.png",), (("walk", "tiny"),), None, None, 4, None, 1, False, "cpu"),
    ]
    assert len({base.folder, *(other.folder for other in others)}) == 6
    with_scene = Order(("a.png",), (("walk", "tiny"),), None, None, 4, None, 0, True, "cpu")
    assert with_scene.folder == base.folder  # fitted to the walk that is there


# --- Visitors ---


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    now = [0.0]
    made = Sessions(tmp_path, 60.0, lambda: now[0])
    made.now = now
    return made


def test_a_visitor_gets_photographs_that_follow_from_their_bytes(sessions):
    session = sessions.of("me")
    place = sessions.uploads / "x"
    place.mkdir()
    files = []
    for seed in range(2):
        files.append(place / f"{seed}.jpg")
        files[-1].write_bytes(picture(seed=seed))
    names = take_photographs(session, files, sessions.uploads, Limits())
    assert [(session.folder / name).read_bytes() for name in names] == [file.read_bytes() for file in files]
    assert take_photographs(session, files, sessions.uploads, Limits()) == names
    others = take_photographs(session, files[::-1], sessions.uploads, Limits())
    assert others[0].parent != names[0].parent and not (session.folder / names[0]).exists()


def test_nothing_but_results_is_handed_out(sessions):
    session = sessions.of("me")
    for name in ("look/look.html", "0123456789ab/walk.zip", "0123456789ab/walk/run.html", "0123456789ab/walk/run.json",
                 "photographs/x/a.jpg", "cache/a", "0123456789ab/other/run.html"):  # fmt: skip
        (session.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (session.folder / name).write_text("x")
    allowed = {"look/look.html", "0123456789ab/walk.zip", "0123456789ab/walk/run.html"}
    everything = {str(file.relative_to(session.folder)) for file in session.folder.rglob("*") if file.is_file()}
    assert {name for name in everything if sessions.served(session.token, name)} == allowed
    for name in (
        "look/../look/look.html",
        "../../lock",
        "/etc/passwd",
        "look/look.html\n",
        "look",
        "",
        "look/render.mp4",
    ):
        assert sessions.served(session.token, name) is None
    for token in ("me", "", "..", session.token[:-1]):
        assert sessions.served(token, "look/look.html") is None
    assert sessions.of("me").token == session.token != sessions.of("you").token
    assert (sessions.root / "sessions" / session.token) == session.folder


def test_a_closed_tab_leaves_nothing_and_takes_nothing_of_others(sessions):
    mine, theirs = sessions.of("me"), sessions.of("you")
    both, own = sessions.uploads / "both.jpg", sessions.uploads / "own.jpg"
    for file in (both, own):
        file.write_bytes(picture())
    mine.uploads, theirs.uploads = {both, own}, {both}
    sessions.close("me")
    assert not mine.folder.exists() and not own.exists() and both.exists() and theirs.folder.exists()
    assert sessions.served(mine.token, "look/look.html") is None
    sessions.close("me")
    sessions.close(None)
    sessions.close("you")
    assert not both.exists() and list((sessions.root / "sessions").iterdir()) == []


def test_silent_visitors_and_stray_uploads_are_forgotten(sessions):
    old, stray, fresh = sessions.of("old"), sessions.uploads / "a" / "stray.jpg", sessions.uploads / "fresh.jpg"
    for file in (stray, fresh):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x")
    os.utime(stray, (time.time() - 100, time.time() - 100))
    sessions.now[0] = 50
    new = sessions.of("new")
    sessions.now[0] = 100
    sessions.sweep()
    assert not old.folder.exists() and new.folder.exists() and not stray.exists() and fresh.exists()


def test_a_visitor_without_a_name_is_refused(sessions):
    for key in (None, ""):
        assert "no session" in refusal(lambda key=key: sessions.of(key))


# --- Jobs ---


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_job_says_what_it_does_and_how_it_ended(tmp_path):
    def said(call, *arguments) -> list[tuple]:
        return [message for message in Running(call, *arguments).messages(60) if message is not None]

    assert said(ui_jobs.counts, 3) == [("told", "0"), ("told", "1"), ("told", "2"), ("done",)]
    assert said(ui_jobs.refuses) == [("refused", "this is not possible; do that")]
    ((kind, line),) = said(ui_jobs.breaks, str(tmp_path / "terminal"))
    assert kind == "failed" and "secret" not in line and "RuntimeError" in line
    assert "a secret of the server" in (tmp_path / "terminal").read_text()
    assert said(ui_jobs.dies)[0][0] == "failed"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc to look for processes in")
def test_a_stopped_job_ends_at_once_with_all_that_it_started():
    running = Running(ui_jobs.sleeps_with_a_child)
    messages = running.messages(60)
    (_, line) = next(message for message in messages if message is not None)
    own, child = map(int, line.split())
    assert alive(own) and alive(child)
    begun = time.monotonic()
    running.stop()
    assert time.monotonic() - begun < 5 and not alive(own)
    assert [message for message in messages if message is not None] == [("stopped",)]
    until = time.monotonic() + 5  # the child is init's to bury
    while alive(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(child)


def test_a_job_beyond_its_time_is_ended():
    messages = [m for m in Running(ui_jobs.sleeps_with_a_child).messages(0.5) if m is not None]
    assert messages[-1][0] == "refused" and "ended" in messages[-1][1]


def test_a_visitor_has_one_job_which_ends_with_the_tab(sessions):
    session = sessions.of("me")
    with sessions.job(session, ui_jobs.leaves_a_file, session.folder) as running:
        messages = running.messages(60)
        next(message for message in messages if message is not None)
        with pytest.raises(UserError, match="still at work"), sessions.job(session, ui_jobs.counts, 1):
            pass
        sessions.now[0] = 1000
        sessions.sweep()
        assert session.folder.exists()  # busy
        sessions.close("me")
        assert [message for message in messages if message is not None] == [("stopped",)]
    assert not session.folder.exists()
    with pytest.raises(UserError, match="closed"), sessions.job(session, ui_jobs.counts, 1):
        pass


def test_after_cancelling_the_next_job_may_begin(sessions):
    session = sessions.of("me")
    assert sessions.stop("me") is False and sessions.stop("nobody") is False
    first = sessions.job(session, ui_jobs.leaves_a_file, session.folder)
    running = first.__enter__()
    next(message for message in running.messages(60) if message is not None)
    assert sessions.stop("me") is True
    with sessions.job(session, ui_jobs.counts, 1) as second:  # though nobody has left the first one's block
        first.__exit__(None, None, None)
        assert session.running is second
        assert [m for m in second.messages(60) if m is not None][-1] == ("done",)


# --- Answers ---


def test_answers_are_sentences_and_what_comes_from_outside_is_escaped(sessions):
    answers = Answers({"walk": "tiny"}, "cpu", Limits(), sessions)
    place = sessions.uploads / "<img src=x onerror=alert(1)>.jpg"
    place.write_bytes(b"no picture")
    page = answers.judge("me", [str(place)])
    assert "no photograph by its first bytes" in page and "<img" not in page
    asked = Asked([str(place)], USUAL, 0, 0, "walk", False, 0, 0, 0, 0)
    states = list(answers.look("me", asked))
    assert len(states) == 1 and 'role="alert"' in states[0][0] and states[0][1] is None
    for wrong in ({"path": "/etc"}, {"which": "<b>"}, {"height": 10}, {"seed": -1}, {"files": None}):
        ((page, made),) = answers.make("me", asked._replace(**wrong))
        assert 'role="alert"' in page and made is None and "<b>&" not in page
    follow = Follow("Generating", lines := [], lambda: 0.0)
    follow.said(("model", "student"))
    page = follow.said(("told", "<script>"))
    assert "&lt;script&gt;" in page and lines == ["<script>"]
    assert "3 of 4 clips" in follow.said(("step", "clips", 3, 4)) and "3 of 4" in follow.said(None)


def test_both_models_or_one(sessions):
    answers = Answers({"student": "s", "teacher": "t"}, "cpu", Limits(), sessions)
    session = sessions.of("me")
    file = sessions.uploads / "a.jpg"
    file.write_bytes(picture())
    asked = Asked([str(file)], "orbit", 12.0, 4, BOTH, True, 48, 64, 8, 3)
    wanted = answers.order(session, asked)
    assert wanted.models == (("student", "s"), ("teacher", "t")) and wanted.trajectory == "orbit:12"
    assert (wanted.frames, wanted.steps, wanted.size, wanted.seed, wanted.scene) == (8, 4, (48, 64), 3, True)
    assert answers.order(session, asked._replace(which="teacher")).models == (("teacher", "t"),)


# --- The wall ---


@pytest.mark.parametrize("path", [
    "/", "/config", "/theme.css", "/assets/index.js", "/gradio_api/upload", "/gradio_api/queue/join",
    "/gradio_api/heartbeat/ab12", "/gradio_api/file=/tmp/a/b.png", "/walks/token/look/look.html",
])  # fmt: skip
def test_the_page_reaches_what_it_needs(path):
    judge_path(path)


@pytest.mark.parametrize("path", [
    "/gradio_api/proxy=http://x/y", "/gradio_api/file=http://x/y", "/gradio_api/file=https%3A//x/y",
    "/gradio_api/file=/tmp/work/../../etc/passwd", "/gradio_api/file=/tmp/%2e%2e/etc/passwd", "/walks/a/../../b",
    "/gradio_api/vibe-edit", "/gradio_api/process_recording", "/gradio_api/deep_link", "/monitoring", "/docs",
    "/openapi.json", "/gradio_api/run-history/connect", "/login", "/gradio_api/call/generate", "/static/../x", "/a\0",
])  # fmt: skip
def test_nothing_else_exists(path):
    with pytest.raises(guard.Refused) as refused:
        judge_path(path)
    assert refused.value.args[0] == 404


def test_strangers_names_for_this_machine_lead_nowhere():
    own = {"localhost", "127.0.0.1", "::1"}
    for host in ("127.0.0.1:7860", "localhost", "LOCALHOST:1", "[::1]:7860"):
        guard.judge_host(host, own)
    for host in ("stranger.example", "127.0.0.1.stranger.example:7860", "", "localhost:7860:x"):
        guard.judge_host(host, None)  # listening to others, who call it what they like
        with pytest.raises(guard.Refused):
            guard.judge_host(host, own)


def asked_of(tmp_path: Path, path: str, body: bytes, told: int | None = None, limits: Limits = SMALL, pieces: int = 1):
    """(status, what the application behind the guard read, headers) of a POST."""
    read = []

    async def application(scope, receive, send):
        more = True
        while more:
            message = await receive()
            read.append(message["body"])
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    async def call():
        size = -(-len(body) // pieces)
        parts = [body[k * size : (k + 1) * size] for k in range(pieces)]
        sent = []

        async def receive():
            part = parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(parts)}

        async def send(message):
            sent.append(message)

        headers = [] if told is None else [(b"content-length", str(told).encode())]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
        await Guard(application, limits, tmp_path)(scope, receive, send)
        return sent

    start = next(message for message in asyncio.run(call()) if message["type"] == "http.response.start")
    return start["status"], b"".join(read), dict(start["headers"])


def test_bodies_have_an_end(tmp_path):
    most = SMALL.all_bytes + (1 << 20)
    fits = b"x" * (most - 10)
    assert asked_of(tmp_path, "/gradio_api/upload", fits, pieces=9)[:2] == (200, fits)
    assert asked_of(tmp_path, "/gradio_api/upload", b"x", told=200 << 20)[:2] == (413, b"")
    status, read, _ = asked_of(tmp_path, "/gradio_api/upload", b"x" * (most + 1000), pieces=9)  # nothing told
    assert status == 413 and len(read) <= most
    assert asked_of(tmp_path, "/gradio_api/queue/join", b" " * (2 << 20), pieces=9)[:2] == (413, b"")
    (tmp_path / "held").write_bytes(b"x" * 100)
    full = Limits(all_bytes=SMALL.all_bytes, folder_bytes=most + 50)
    assert asked_of(tmp_path, "/gradio_api/upload", b"x", limits=full)[0] == 507


def test_requests_name_no_addresses_and_are_json(tmp_path):
    good = json.dumps({"data": [[{"path": "/tmp/x/a.png", "url": "http://127.0.0.1/a", "meta": {}}], "http://a b"]})
    assert asked_of(tmp_path, "/gradio_api/queue/join", good.encode())[:2] == (200, good.encode())
    bad = json.dumps({"data": [[{"path": "http://example.org/a.png", "meta": {"_type": "gradio.FileData"}}]]})
    assert names_an_address(json.loads(bad)) and not names_an_address(json.loads(good))
    assert asked_of(tmp_path, "/gradio_api/run/predict", bad.encode())[:2] == (400, b"")
    assert asked_of(tmp_path, "/gradio_api/queue/join", b"{")[0] == 400


def test_answers_forbid_browsers_to_load_from_elsewhere(tmp_path):
    _, _, headers = asked_of(tmp_path, "/gradio_api/queue/join", b"{}")
    policy = headers[b"content-security-policy"].decode()
    assert policy.startswith("default-src 'self'") and "http" not in policy and "*" not in policy
    assert headers[b"x-content-type-options"] == b"nosniff"


# --- Serving ---


def test_a_port_in_use_is_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port {port} is in use" in refusal(lambda: serve.judge_port("127.0.0.1", port))
    serve.judge_port("127.0.0.1", port)
    assert "--host" in refusal(lambda: serve.judge_port("203.0.113.77", port))
    assert "--host" in refusal(lambda: serve.judge_port("no.such.host.invalid", port))


def test_no_browser_and_no_gradio_are_one_sentence(monkeypatch):
    import webbrowser

    def none() -> None:
        raise webbrowser.Error("could not locate runnable browser")

    monkeypatch.setattr(webbrowser, "get", none)
    assert "--browser finds no browser" in refusal(serve.judge_browser)
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert install("ui") in refusal(lambda: serve.serve({"walk": "tiny"}))


def test_a_model_that_is_not_there_is_refused_before_anything_starts(monkeypatch, tmp_path):
    monkeypatch.setattr(serve, "find_spec", lambda name: object())
    assert "no model folder" in refusal(lambda: serve.serve({"walk": str(tmp_path / "none")}))
    assert "no model folder" in refusal(lambda: serve.serve({"walk": "tinny"}))
    assert serve.absolute("tiny") == "tiny" and serve.absolute("organisation/name") == "organisation/name"


def test_the_work_folder_is_ones_own_and_goes(tmp_path):
    with serve.work_folder(tmp_path / "new") as root:
        assert root.parent == (tmp_path / "new").resolve() and root.stat().st_mode & 0o777 == 0o700
        (root / "left").write_text("x")
        serve.remove_abandoned(tmp_path / "new")
        assert root.exists()  # its server lives
    assert not root.exists()
    dead = tmp_path / "new" / "fvgen-ui-dead"
    dead.mkdir()
    other = tmp_path / "new" / "fvgen-ui-other"  # not ours: it has no lock
    other.mkdir()
    (dead / "lock").write_text("")
    with serve.work_folder(tmp_path / "new"):
        assert not dead.exists() and other.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_closed_place_is_one_sentence(tmp_path):
    tmp_path.chmod(0o500)
    assert "cannot be written" in refusal(lambda: serve.work_folder(tmp_path / "new").__enter__())


def test_a_file_in_place_of_the_work_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    assert "cannot be written" in refusal(lambda: serve.work_folder(tmp_path / "file").__enter__())


def test_gradio_finds_a_closed_environment(monkeypatch, tmp_path):
    for name in ("GRADIO_SHARE", "GRADIO_ALLOWED_PATHS", "GRADIO_ROOT_PATH", "GRADIO_MCP_SERVER"):
        monkeypatch.setenv(name, "True")
    made = serve.closed_in(tmp_path)
    assert not [name for name in os.environ if name.startswith("GRADIO_")]
    assert made["GRADIO_ANALYTICS_ENABLED"] == made["GRADIO_SHARE"] == "False"
    assert made["GRADIO_TEMP_DIR"] == str(tmp_path / "uploads")


# --- What is made ---


def test_a_zip_holds_everything_and_a_comparison_knows_its_films(tmp_path):
    from fvgen.ui.results import pack, write_comparison

    for name in ("student", "teacher"):
        (tmp_path / name / "frames").mkdir(parents=True)
        (tmp_path / name / "video.mp4").write_bytes(b"film of the " + name.encode())
        (tmp_path / name / "frames" / "00000.png").write_bytes(b"frame")
        run = {"result": {"frames": {"00000.png": "x", "00001.png": "y"}, "known": {"1": "given_000.png"}}}
        (tmp_path / name / "run.json").write_text(json.dumps(run))
    write_comparison(tmp_path, ["teacher", "student"], 10)
    page = (tmp_path / "compare.html").read_text()
    facts = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    assert list(facts["films"]) == ["render", "student", "teacher"]
    assert all((tmp_path / film).parent.is_dir() for film in facts["films"].values())
    assert facts["frames"] == 2 and facts["known"] == [1]
    written = {str(file.relative_to(tmp_path)): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for _ in range(2):  # again, beside the one that is there
        pack(tmp_path)
        with zipfile.ZipFile(tmp_path / "walk.zip") as archive:
            assert {name: archive.read(name) for name in archive.namelist()} == written
