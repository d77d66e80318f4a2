"""Label pairs in the browser: a page on 127.0.0.1, and the server behind it.

Only this machine reaches the server, and only with the token of its link. Requests with another
Host are refused, so that no web site can reach it through a name of its choice. Answers are
Markdown; HTML in them is shown as text, images are left out, and the page's policy allows no
script, style or connection but its own.
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markupsafe import escape

from mlx_align.errors import ConfigError, MlxAlignError
from mlx_align.preferences.labelling import CHOICES, LabelSession, check_rater
from mlx_align.system.json_text import to_json
from mlx_align.types import Text

HOST = "127.0.0.1"
TOKEN_HEADER = "X-Token"
# Verdict, criteria and note.
MAX_BODY_BYTES = 1 << 20
_PAGE = Path(__file__).with_name("assets") / "label.html"


class LabelServer:
    """The server of a labelling session. Use as a context manager.

    Args:
        session: The session.
        rater: Name that the page proposes.
        port: Port; 0 for a free one.

    Raises:
        ConfigError: The port is in use.
    """

    def __init__(self, session: LabelSession, rater: str = "", port: int = 0) -> None:
        self.session = session
        self.rater = rater
        self.token = secrets.token_urlsafe(24)
        self.markdown = safe_markdown()
        handler = type("Handler", (_Handler,), {"server_of": self})
        try:
            self._server = ThreadingHTTPServer((HOST, port), handler)
        except OSError as error:
            raise ConfigError(
                f"--port {port}: can't be used ({(error.strerror or str(error)).lower()}); leave "
                "it out for a free one"
            ) from error
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self.url = f"http://{HOST}:{self.port}/?token={self.token}"
        # An error that ends the session, such as a full disk.
        self.failed: MlxAlignError | None = None
        self._stopped = threading.Event()

    def __enter__(self) -> LabelServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def wait(self) -> None:
        """Wait until a rater closes the session, or it fails.

        Raises:
            MlxAlignError: A judgement couldn't be written.
        """
        # A wait without a limit would keep signals from being handled.
        while not self._stopped.wait(0.2):
            pass
        if self.failed is not None:
            raise self.failed

    def stop(self, failed: MlxAlignError | None = None) -> None:
        """End `wait`."""
        self.failed = failed
        self._stopped.set()

    def state(self, rater: str) -> dict[str, Any]:
        """What the page of a rater shows: progress and the next pair, without who wrote what."""
        session, progress = self.session, self.session.progress(rater)
        task = session.next(rater)
        found: dict[str, Any] = {
            "rater": rater,
            "done": progress.done,
            "total": progress.total,
            "skipped": progress.skipped,
            "by_criterion": session.by_criterion,
            "criteria": [{"name": k, "text": text} for k, text in session.criteria.items()],
            "pair": None,
        }
        if task is not None:
            found["pair"] = {
                "id": task.pair.id,
                "prompt": self.render(task.pair.prompt),
                "answers": [self.render(answer) for answer in task.answers],
            }
        return found

    def render(self, text: Text) -> str:
        """Safe HTML of a text or of the turns of a conversation."""
        if isinstance(text, str):
            return str(self.markdown.render(text))
        parts = []
        for turn in text:
            if len(text) > 1:
                parts.append(f"<p class=role>{escape(turn.role)}</p>")
            parts.append(str(self.markdown.render(turn.content)))
            parts += [
                f"<pre>{escape(call.name)}({escape(call.arguments)})</pre>"
                for call in turn.tool_calls
            ]
        return "".join(parts)


def safe_markdown() -> MarkdownIt:
    """A Markdown renderer that shows HTML as text, no images, and links that open elsewhere.

    markdown-it itself refuses links to `javascript:`, `vbscript:`, `file:` and most `data:`.
    """
    renderer = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")

    def link_open(self: RendererHTML, tokens: Any, index: int, options: Any, env: Any) -> str:
        tokens[index].attrSet("target", "_blank")
        tokens[index].attrSet("rel", "noopener noreferrer")
        return str(self.renderToken(tokens, index, options, env))

    renderer.add_render_rule("link_open", link_open)
    return renderer


class _Handler(BaseHTTPRequestHandler):
    server_of: LabelServer
    protocol_version = "HTTP/1.1"
    server_version = "mlx-align"
    sys_version = ""
    timeout = 60

    def do_GET(self) -> None:  # the name that http.server calls
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if not self._allowed(query.get("token")):
            return
        if url.path == "/":
            self._send_page()
        elif url.path == "/api/state":
            self._answer(lambda: self.server_of.state(check_rater(query.get("rater"))))
        else:
            self._send(404, {"error": "not found"})

    def do_POST(self) -> None:  # the name that http.server calls
        if not self._allowed(None):
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            self._send(413, {"error": "the request is too large"})
            return
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            self._send(400, {"error": "expected a JSON object"})
            return
        actions = {"/api/judge": self._judge, "/api/undo": self._undo, "/api/quit": self._quit}
        action = actions.get(urlsplit(self.path).path)
        if action is None:
            self._send(404, {"error": "not found"})
        else:
            self._answer(lambda: action(body))

    def _judge(self, body: Mapping[str, Any]) -> dict[str, Any]:
        rater = check_rater(body.get("rater"))
        criteria = body.get("criteria") or {}
        if not isinstance(criteria, dict) or not all(
            isinstance(one, str | None) for one in criteria.values()
        ):
            raise ConfigError("criteria: expected a verdict by name")
        self.server_of.session.judge(
            rater,
            str(body.get("pair", "")),
            str(body.get("choice", "")),
            criteria,
            str(body.get("note") or ""),
        )
        return self.server_of.state(rater)

    def _undo(self, body: Mapping[str, Any]) -> dict[str, Any]:
        rater = check_rater(body.get("rater"))
        self.server_of.session.undo(rater)
        return self.server_of.state(rater)

    def _quit(self, body: Mapping[str, Any]) -> dict[str, Any]:
        threading.Timer(0.1, self.server_of.stop).start()
        return {"closed": True}

    def _allowed(self, token: str | None) -> bool:
        """Check host and token; sends the refusal if they are wrong."""
        port = self.server_of.port
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            self._send(403, {"error": "this server is for 127.0.0.1 only"})
            return False
        given = self.headers.get(TOKEN_HEADER) or token or ""
        if not hmac.compare_digest(given.encode("utf-8", "replace"), self.server_of.token.encode()):
            self._send(403, {"error": "wrong token; open the link that mlx-align label printed"})
            return False
        return True

    def _answer(self, action: Callable[[], dict[str, Any]]) -> None:
        try:
            found = action()
        except ConfigError as error:
            self._send(400, {"error": str(error)})
        except MlxAlignError as error:  # the judgement isn't written: nothing more can be
            self._send(500, {"error": str(error)})
            self.server_of.stop(error)
        else:
            self._send(200, found)

    def _send(self, status: int, content: Mapping[str, Any]) -> None:
        self._send_bytes(
            status, "application/json", to_json(content).encode(), "default-src 'none'"
        )

    def _send_page(self) -> None:
        nonce = secrets.token_urlsafe(12)
        page = _PAGE.read_text(encoding="utf-8").replace("NONCE", nonce)
        facts = {"rater": self.server_of.rater, "choices": CHOICES}
        # In a script element, only "<" could end it.
        page = page.replace("@FACTS@", to_json(facts).replace("<", "\\u003c"))
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        self._send_bytes(200, "text/html; charset=utf-8", page.encode(), policy)

    def _send_bytes(self, status: int, kind: str, content: bytes, policy: str) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Write no log: the addresses have the token."""
