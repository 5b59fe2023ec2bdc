"""A server that answers wandb what it needs to begin a run, and can be lost."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

USER = {"id": "u", "username": "me", "entity": "me", "email": "a@b.c", "flags": "{}"}
USER |= {"admin": False, "teams": {"edges": []}, "apiKeys": {"edges": []}}
PROJECT = {"id": "p", "name": "dhbe", "entity": {"id": "e", "name": "me"}}
RUN = {"id": "r", "name": "r", "displayName": "r", "config": "{}", "historyLineCount": 0}
RUN |= {"project": PROJECT, "historyTail": "[]", "summaryMetrics": "{}", "tags": []}
ANSWER: dict[str, Any] = {
    "viewer": USER,
    "serverInfo": {"cliVersionInfo": {"max_cli_version": "9"}, "features": []},
    "upsertBucket": {"bucket": RUN, "inserted": True},
    "createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []},
    "QueryType": {"fields": []},
    "MutationType": {"fields": []},
    **dict.fromkeys(("model", "project", "entity", "organizationEntity")),
}


class WandbServer(ThreadingHTTPServer):
    """Listens on a port of this machine."""

    daemon_threads = True
    lost = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def lose(self) -> None:
        """From now on every connection is cut, old ones too."""
        self.lost = True
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """Says the same to every question."""

    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, *_: object) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.lost:
            self.close_connection = True
            return
        limits = {"exitcode": None, "limits": {}}
        body = json.dumps({"data": ANSWER} if "graphql" in self.path else limits).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_PUT = do_GET
