"""What may reach Gradio, and what its answers may do: a wall before the page, on the way of every request.

Only the addresses that the page itself uses exist; whatever else Gradio offers (fetching of addresses, recordings,
logs) does not. Bodies have an end. Answers forbid browsers to load anything from elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fvgen.errors import UserError
from fvgen.system.doors import parse_json
from fvgen.ui.limits import MOST_BODY, Limits, names_an_address

Ask = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Ask]]
Send = Callable[[Ask], Awaitable[None]]
App = Callable[[Ask, Receive, Send], Awaitable[None]]

API = "/gradio_api"
KNOWN = re.compile(
    r"/|/(?:config|theme\.css|favicon\.ico|robots\.txt|manifest\.json)/?"
    r"|/(?:assets|static|svelte|walks)/.*"
    rf"|{API}/(?:info|app_id|startup-events|theme\.css|upload|upload_progress|queue/join|queue/data|cancel|reset)/?"
    rf"|{API}/heartbeat/[\w-]+|{API}/run/[\w-]+/?|{API}/file=.*",
    re.DOTALL,
)
UPLOAD = f"{API}/upload"
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; worker-src 'self' blob:; "
        "frame-ancestors 'self'; form-action 'self'; base-uri 'self'; object-src 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Refused(Exception):
    """A request that goes no further, by its HTTP status and a sentence."""


class Guard:
    """ASGI middleware. uploads: the folder that Gradio keeps uploads in. hosts: names that the page is asked for by;
    any if None."""

    def __init__(self, app: App, limits: Limits, uploads: Path, hosts: Collection[str] | None = None) -> None:
        self.app, self.limits, self.uploads, self.hosts = app, limits, uploads, hosts

    async def __call__(self, scope: Ask, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        async def answer(message: Ask) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                own = {name for name, _ in message.get("headers", [])}
                more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *(row for row in more if row[0] not in own)]
            await send(message)

        try:
            judge_path(scope["path"])
            judge_host(dict(scope["headers"]).get(b"host", b"").decode("latin-1"), self.hosts)
            if scope["method"] == "POST":
                receive = await self._limited(scope, receive)
            await self.app(scope, receive, answer)
        except Refused as refusal:
            if begun:  # too late for another answer
                return
            status, sentence = refusal.args
            kind = [(b"content-type", b"text/plain; charset=utf-8")]
            await answer({"type": "http.response.start", "status": status, "headers": kind})
            await answer({"type": "http.response.body", "body": sentence.encode()})

    async def _limited(self, scope: Ask, receive: Receive) -> Receive:
        upload = scope["path"].rstrip("/") == UPLOAD
        most = self.limits.all_bytes + MOST_BODY if upload else MOST_BODY
        told = dict(scope["headers"]).get(b"content-length", b"")
        if told.isdigit() and int(told) > most:
            raise too_large(most)
        if not upload:
            return replayed(await whole(receive, most), receive)
        if held_bytes(self.uploads) + most > self.limits.folder_bytes:
            raise Refused(507, "too many photographs are waiting here; try again in an hour")
        return counted(receive, most)


def judge_path(path: str) -> None:
    """Raises Refused for an address that the page does not use."""
    plain = unquote(path)
    if not KNOWN.fullmatch(plain) or "://" in plain or "\0" in plain or ".." in plain.split("/"):
        raise Refused(404, "there is nothing at this address")


def judge_host(host: str, hosts: Collection[str] | None) -> None:
    """Raises Refused for a name that is not this machine's: a stranger's page may have one that leads here, and would
    read ours as its own."""
    if hosts is not None and re.sub(r":\d+$", "", host).strip("[]").lower() not in hosts:
        raise Refused(400, "this page is asked for by another name; open it at its own address")


def too_large(most: int) -> Refused:
    return Refused(413, f"this is more than {most >> 20} MB; send less")


def held_bytes(folder: Path) -> int:
    """Of all files below a folder, from which some may vanish meanwhile."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size
        except OSError:
            continue
    return total


async def whole(receive: Receive, most: int) -> bytes:
    """The body of a request, if it is JSON that the page may act on. Raises Refused for a longer one, and for one that
    names files by addresses."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
        if len(body) > most:
            raise too_large(most)
    try:
        if body and names_an_address(parse_json(body, "the request")):
            raise Refused(400, "photographs are dropped on the page, not named by an address")
    except UserError as error:
        raise Refused(400, "this request is no JSON") from error
    return body


def replayed(body: bytes, receive: Receive) -> Receive:
    """A body that was read already, then what follows it: the end of the connection."""
    sent = False

    async def again() -> Ask:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def counted(receive: Receive, most: int) -> Receive:
    """The pieces of a body as they come, until they are too many."""
    total = 0

    async def piece() -> Ask:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > most:
            raise too_large(most)
        return message

    return piece
