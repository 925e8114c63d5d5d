"""A bucket of an emulated S3, behind a front that makes it fail."""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import boto3
from moto.server import ThreadedMotoServer

Failure = Literal["refuses", "answers 503", "answers 403", "resets", "is silent"]

_STATUS: dict[str, tuple[str, str]] = {
    "answers 503": ("503 Service Unavailable", "SlowDown"),
    "answers 403": ("403 Forbidden", "InvalidAccessKeyId"),
}


class Bucket:
    """An empty bucket; a context that ends its server."""

    def __enter__(self) -> "Bucket":
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        self._front = Front(self._server.get_host_and_port())
        client = self._client(self._server.get_host_and_port()[1])
        self.name = f"results-{self._front.port}"
        client.create_bucket(Bucket=self.name)
        self.behind = client
        """A client that the front is not in the way of."""
        return self

    def __exit__(self, *error: object) -> None:
        self._front.close()
        self._server.stop()

    @property
    def env(self) -> dict[str, str]:
        """What makes a program talk to it, through the front."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._front.port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing-secret-key-0123456789",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @contextmanager
    def failing(self, how: Failure) -> Iterator[None]:
        """It fails as long as the block is under way."""
        self._front.fail(how)
        try:
            yield
        finally:
            self._front.recover()

    def files(self, prefix: str = "") -> dict[str, int]:
        """The sizes of all files below a prefix, by what follows that in their names; without those
        that stand for folders."""
        pages = self.behind.get_paginator("list_objects_v2").paginate(
            Bucket=self.name, Prefix=prefix
        )
        found = (file for page in pages for file in page.get("Contents", []))
        sizes = {file["Key"].removeprefix(prefix): file["Size"] for file in found}
        return {name: size for name, size in sizes.items() if name and not name.endswith("/")}

    def read(self, name: str) -> bytes:
        """A file's content."""
        return bytes(self.behind.get_object(Bucket=self.name, Key=name)["Body"].read())

    def _client(self, port: int) -> Any:
        return boto3.client(
            "s3",
            region_name="us-east-1",
            endpoint_url=f"http://127.0.0.1:{port}",
            aws_access_key_id="testing",
            aws_secret_access_key="testing-secret-key-0123456789",
        )


class Front:
    """Passes connections on to an address, unless it is told to fail; the port stays the same."""

    def __init__(self, behind: tuple[str, int]) -> None:
        self._behind, self._failure = behind, ""
        self._open: set[socket.socket] = set()
        self.port = 0
        self._listen()

    def fail(self, how: Failure) -> None:
        """From now on connections fail; those that are open end."""
        self._failure = how
        if how == "refuses":
            self._unlisten()
        for connection in list(self._open):
            _end(connection)

    def recover(self) -> None:
        """From now on connections are passed on."""
        refused, self._failure = self._failure == "refuses", ""
        for connection in list(self._open):
            _end(connection)
        if refused:
            self._listen()

    def close(self) -> None:
        """Ends all connections, and accepts no more."""
        self.fail("refuses")

    def _listen(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _unlisten(self) -> None:
        _end(self._listener)
        self._listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            self._open.add(connection)
            if self._failure in _STATUS:
                _answer(connection, *_STATUS[self._failure])
            elif self._failure == "resets":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif self._failure == "is silent":
                while connection.recv(1 << 16):
                    pass
            else:
                self._pass_on(connection)
        self._open.discard(connection)

    def _pass_on(self, connection: socket.socket) -> None:
        with socket.create_connection(self._behind) as server:
            back = threading.Thread(target=_pump, args=(server, connection), daemon=True)
            back.start()
            _pump(connection, server)
            back.join()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    _end(source)
    _end(target)


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _answer(connection: socket.socket, status: str, code: str) -> None:
    """Answers a request as S3 does, and reads what is left of it: else the answer may be lost."""
    request = connection.makefile("rb")
    line = request.readline()
    while request.readline().strip():
        pass
    body = f"<Error><Code>{code}</Code><Message>not now</Message></Error>"
    body = "" if line.startswith(b"HEAD") else f'<?xml version="1.0" encoding="UTF-8"?>{body}'
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    connection.shutdown(socket.SHUT_WR)
    while connection.recv(1 << 16):
        pass
