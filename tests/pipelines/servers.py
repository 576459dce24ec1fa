"""Servers on this machine for tests of sources: HTTP with and without ranges, one that fails or is silent, and S3."""

import contextlib
import functools
import http.server
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from moto.server import ThreadedMotoServer

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Files of one folder, as `python -m http.server` gives them: always whole."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass


class Ranges(Quiet):
    """Files of one folder, with the one range that a request asks for."""

    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if asked is None or not path.is_file():
            super().do_GET()
            return
        data = path.read_bytes()
        start, end = int(asked[1]), min(int(asked[2]) + 1, len(data))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        self.wfile.write(data[start:end])


class Failing(Quiet):
    """Answers for any name below /500/ with that status, and so on; other names are files."""

    def do_GET(self) -> None:
        status = re.match(r"/(\d{3})/", self.path)
        if status is None:
            super().do_GET()
            return
        self.send_response(int(status[1]))
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextlib.contextmanager
def web(folder: Path, handler: type[Quiet] = Quiet) -> Iterator[str]:
    """A web server of a folder; gives its URL."""
    made = functools.partial(handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), made) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def silent() -> Iterator[str]:
    """A server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextlib.contextmanager
def closed() -> Iterator[str]:
    """The URL of a port on which nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # kept from others, and not listening
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@contextlib.contextmanager
def s3() -> Iterator[dict[str, str]]:
    """A stand-in for S3; gives the environment that leads there."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield ENVIRONMENT | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    finally:
        server.stop()
