"""A bucket of Google Cloud Storage on this machine, for other processes.

The emulator from PyPI does not check generations, by which a writer makes sure that
nobody else has written, and does not report them. `_Handler` adds both.
"""

import contextlib
import http.server
import pathlib
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.storage import Storage

NAME = "bucket"


class Bucket:
    """A running emulator with one bucket.

    Attributes:
      environment: Environment variables with which other processes find the bucket.
      changes: Number of requests so far that changed an object.
    """

    def __init__(self, port: int, storage: Storage) -> None:
        self._address = address = f"http://127.0.0.1:{port}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": address,  # gcsfs and Google's own library
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_CLOUD_PROJECT": "project",
            # Do not look for Google's network and for kinds of buckets.
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "EPATH_USE_TF": "false",
        }
        self.changes = 0
        self._storage = storage
        self._calls: dict[int, Callable[[], None]] = {}

    def call_after(self, changes: int, function: Callable[[], None]) -> None:
        """Call a function before the bucket answers the given request from now on."""
        self._calls[self.changes + changes] = function

    def on_change(self) -> None:
        self.changes += 1
        if function := self._calls.pop(self.changes, None):
            function()

    def delete(self, name: str) -> None:
        """Delete an object."""
        self._storage.delete_file(NAME, name)

    def put(self, folder: pathlib.Path, prefix: str) -> None:
        """Upload a folder."""
        for path in folder.rglob("*"):
            if path.is_file():
                name = f"{prefix}/{path.relative_to(folder).as_posix()}"
                query = urllib.parse.urlencode({"uploadType": "media", "name": name})
                url = f"{self._address}/upload/storage/v1/b/{NAME}/o?{query}"
                urllib.request.urlopen(url, data=path.read_bytes()).close()

    def get(self, folder: pathlib.Path) -> None:
        """Download the whole bucket into a folder."""
        for name in list(self._storage.objects[NAME]):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._storage.get_file(NAME, name))


@contextlib.contextmanager
def running_bucket() -> Iterator[Bucket]:
    """Run an emulator in a thread."""
    storage = Storage(use_memory_fs=True)
    server.buckets.create_bucket(NAME, storage)

    def handle(*args) -> _Handler:
        return _Handler(bucket, storage, *args)

    with http.server.HTTPServer(("127.0.0.1", 0), handle) as listener:
        bucket = Bucket(listener.server_port, storage)
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        try:
            yield bucket
        finally:
            listener.shutdown()
            thread.join()


class _Handler(server.RequestHandler):
    def __init__(self, bucket: Bucket, *args) -> None:
        self._bucket = bucket
        super().__init__(*args)

    def parse_request(self) -> bool:
        """Read a request; False if nothing more is to be answered."""
        if not super().parse_request():
            return False
        if self.command != "GET":
            self._bucket.on_change()
        return self._meets_conditions()

    def end_headers(self) -> None:
        if generation := self._generation():
            self.send_header("x-goog-generation", generation)
        super().end_headers()

    def _meets_conditions(self) -> bool:
        """Answer a request whose conditions on the generation do not hold."""
        query = self._query()
        if query.get("uploadType") == "multipart":
            return True  # The name is in the content. These objects have one writer.
        generation = self._generation() or "0"
        if query.get("ifGenerationMatch", generation) != generation:
            status = 412
        elif query.get("ifGenerationNotMatch") == generation:
            status = 304 if self.command == "GET" else 412
        else:
            return True
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return False

    def _generation(self) -> str | None:
        """Return the generation of the object of this request, if it exists."""
        path = urllib.parse.urlsplit(self.path).path
        name = urllib.parse.unquote(path.partition("/o/")[2])
        with contextlib.suppress(NotFound):
            name = name or self._query().get("name", "")
            return self.storage.get_file_obj(NAME, name)["generation"]
        return None

    def _query(self) -> dict[str, str]:
        return dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
