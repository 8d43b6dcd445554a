"""Object stores on loopback for tests: S3 by moto's server, Google Cloud Storage by `fake_gcs.py`."""

import logging
import os
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import fsspec
from fake_gcs import google

BUCKET = "bucket"
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # as `Store` has it, before gcsfs is imported


@dataclass(frozen=True)
class Served:
    """A bucket. `environment`: by which a process finds it; `read` and `write`: whole objects, past what is tested."""

    scheme: str
    environment: dict[str, str]
    names: Callable[[], list[str]]
    read: Callable[[str], bytes]
    write: Callable[[str, bytes], object]

    def url(self, path: str) -> str:
        return f"{self.scheme}://{BUCKET}/{path}"

    def flip(self, below: str) -> str:
        """Flips a bit of the largest object below a path; returns its name."""
        name = max((name for name in self.names() if name.startswith(f"{below}/")), key=lambda name: len(self.read(name)))
        raw = bytearray(self.read(name))
        raw[len(raw) // 2] ^= 1
        self.write(name, bytes(raw))
        return name


@contextmanager
def amazon() -> Iterator[Served]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        import boto3

        _, port = server.get_host_and_port()
        address = f"http://127.0.0.1:{port}"
        keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
        client = boto3.client(
            "s3", endpoint_url=address, aws_access_key_id="testing", aws_secret_access_key="testing", region_name="us-east-1"
        )
        urllib.request.urlopen(urllib.request.Request(f"{address}/moto-api/reset", method="POST")).close()
        client.create_bucket(Bucket=BUCKET)
        yield Served(
            "s3",
            {"AWS_ENDPOINT_URL": address, **keys},
            lambda: [found["Key"] for found in client.list_objects_v2(Bucket=BUCKET).get("Contents", [])],
            lambda name: client.get_object(Bucket=BUCKET, Key=name)["Body"].read(),
            lambda name, raw: client.put_object(Bucket=BUCKET, Key=name, Body=raw),
        )
        client.close()
    finally:
        server.stop()


@contextmanager
def served(scheme: str) -> Iterator[Served]:
    """A store with an empty bucket."""
    forget()
    if scheme == "s3":
        with amazon() as found:
            yield found
    else:
        with google(BUCKET) as (address, objects):
            yield Served(
                "gs", {"STORAGE_EMULATOR_HOST": address}, lambda: list(objects), lambda name: objects[name], objects.__setitem__
            )
    forget()


def forget() -> None:
    """Connections of this process that fsspec keeps for the next time."""
    for scheme in ("s3", "gs"):
        fsspec.get_filesystem_class(scheme).clear_instance_cache()
