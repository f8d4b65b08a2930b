"""`python tests/helpers/bucket.py PORT NAME`: serve an empty in-memory bucket.

gcp-storage-emulator, with what tensorstore needs and it lacks: a download says which generation of
the object it is, and a download, a write or a deletion that names one fails if that is no more the
newest.
"""

import sys
from collections.abc import Callable
from http import HTTPStatus

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.storage import Storage


def generation(request, storage, name: str) -> str:
    try:
        return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
    except NotFound:
        return "0"


def tells(handle: Callable) -> Callable:
    def download(request, response, storage, *rest):
        newest = generation(request, storage, request.params["object_id"])
        if request.query.get("generation", [newest]) != [newest]:
            response.status = HTTPStatus.NOT_FOUND
            return
        handle(request, response, storage, *rest)
        response["x-goog-generation"] = generation(request, storage, request.params["object_id"])

    return download


def checks(handle: Callable) -> Callable:
    def change(request, response, storage, *rest):
        name = request.params.get("object_id") or request.query.get("name", [""])[0]
        for wanted in request.query.get("ifGenerationMatch", ()):
            if wanted != generation(request, storage, name):
                response.status = HTTPStatus.PRECONDITION_FAILED
                return
        handle(request, response, storage, *rest)

    return change


def main(port: int, bucket: str) -> None:
    better = {
        objects.download: tells(objects.download),
        objects.get: tells(objects.get),
        objects.insert: checks(objects.insert),
        objects.delete: checks(objects.delete),
    }
    for _, handlers in server.HANDLERS:
        for method, handle in handlers.items():
            handlers[method] = better.get(handle, handle)
    # After each write it would write what it knows of every object, of which nothing is kept.
    Storage._write_config_to_file = lambda self: None
    server.create_server("localhost", port, in_memory=True, default_bucket=bucket).run()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
