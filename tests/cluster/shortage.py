"""AWS as it is when machines are short: a server before the emulated one that refuses some."""

import http.client
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REFUSAL = b"""<?xml version="1.0" encoding="UTF-8"?><Response><Errors><Error>
<Code>InsufficientInstanceCapacity</Code>
<Message>There is no Spot capacity available that matches your request.</Message>
</Error></Errors><RequestID>0</RequestID></Response>"""


class Front(ThreadingHTTPServer):
    """Passes requests on, but those for spot instances while there are none, and those for quotas
    while there is one."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], behind: tuple[str, int]) -> None:
        super().__init__(address, _Handler)
        self.behind = behind
        self.no_spot = threading.Event()
        self.refused = 0
        self.quota: float | None = None
        """vCPUs of every kind that the account may have; None: it may not ask."""
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    server: Front

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        wanted = b"Action=RunInstances" in body and b"MarketType=spot" in body
        # A dry run asks what the account may do, not what there is.
        if wanted and b"DryRun=true" not in body and self.server.no_spot.is_set():
            self.server.refused += 1
            self._answer(500, {"Content-Type": "text/xml"}, REFUSAL)
            return
        if (
            "GetServiceQuota" in self.headers.get("X-Amz-Target", "")
            and self.server.quota is not None
        ):
            told = {"Quota": {"Value": self.server.quota}}
            kind = {"Content-Type": "application/x-amz-json-1.1"}
            self._answer(200, kind, json.dumps(told).encode())
            return
        connection = http.client.HTTPConnection(*self.server.behind, timeout=60)
        connection.request("POST", self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        self._answer(answer.status, dict(answer.getheaders()), content)
        connection.close()

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""
