"""The storage contract and whole runs on a real S3 server, which is killed while they write."""

import json
import os
import re
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from storage import checkpoints, reports
from storage.config import StorageConfig
from storage.filesystem import Storage, StorageError
from storage.manifest import Dataset, list_datasets
from storage.testing import StorageContract
from tests.cluster.conftest import SMALL, Command
from tests.system.rgw import Gateway

pytestmark = pytest.mark.system

PATIENT = 8
"""Retries that last longer than the server is away; the default number may not."""
LITTLE = {
    "harvest.max_rows": 32_768,
    "train.rows": 61_440,
    "train.publish_every_rows": 30_720,
    "evaluate.num_latents": 0,
    "storage.num_retries": PATIENT,
}


@pytest.fixture(scope="module", autouse=True)
def _environment(gateway: Gateway) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in gateway.environment.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def storage() -> Storage:
    return Storage(StorageConfig(root=f"s3://bucket/{uuid.uuid4().hex}/deeper"))


class TestContract(StorageContract):
    """Everything that the other backends pass."""


def test_more_keys_than_one_answer_holds_are_listed(storage: Storage) -> None:
    keys = [f"folder/{index:04d}" for index in range(1100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: storage.put(key, b""), keys))
    assert storage.list("folder") == keys
    assert storage.names("folder") == [key.removeprefix("folder/") for key in keys]


def test_an_object_of_many_parts_is_replaced_whole(storage: Storage) -> None:
    first, second = os.urandom(2**20) * 130, os.urandom(2**20) * 70
    for content in (first, second):
        storage.put("key", content)
        assert storage.get("key") == content
    assert not storage.put_if_absent("key", first)
    assert storage.get("key") == second


@pytest.mark.parametrize(
    ("bucket", "changes", "answer", "code"),
    [
        ("bucket", {"AWS_SECRET_ACCESS_KEY": "not-the-secret-of-this-user"}, "403 Forbidden", "SignatureDoesNotMatch"),
        ("bucket", {"AWS_ACCESS_KEY_ID": "no-such-user"}, "403 Forbidden", "InvalidAccessKeyId"),
        ("no-such-bucket", {}, "404 Not Found", "NoSuchBucket"),
    ],
)
def test_a_refusal_is_one_sentence_without_the_keys(
    bucket: str, changes: dict[str, str], answer: str, code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    root = f"s3://{bucket}/place"
    run = refusal("run", "tiny", "--root", root, "--set", "cluster.metrics_port=0", log=tmp_path / "run")
    status = refusal("status", "--root", root, log=tmp_path / "status")
    assert f"answered GET with {answer} ({code})" in status
    for text in (run, status):
        (sentence,) = [line for line in text.splitlines() if line.startswith("error: ")]
        assert root in sentence
        assert f"{os.environ['AWS_ENDPOINT_URL']} answered" in sentence
        assert answer in sentence
        assert "Traceback" not in text
        assert os.environ["AWS_SECRET_ACCESS_KEY"] not in text
        assert os.environ["AWS_ACCESS_KEY_ID"] not in text


def refusal(*arguments: str, log: Path) -> str:
    """What a command says that ends with the exit status for the user's mistakes."""
    command = Command(*arguments, log=log)
    assert command.process.wait(60) == 2, log.read_text()
    return log.read_text()


def test_a_refusal_is_not_retried(monkeypatch: pytest.MonkeyPatch, storage: Storage) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-of-this-user")
    for request in (storage.list, storage.names, storage.get, storage.exists, storage.delete):
        with pytest.raises(StorageError, match="403 Forbidden"):
            request("key")
    assert storage.num_retries_done == 0


def test_what_is_written_while_the_server_dies_is_neither_lost_nor_torn(gateway: Gateway, storage: Storage) -> None:
    contents = {f"{kind}/{index}": os.urandom(2**20) for kind in ("put", "create") for index in range(30)}
    writer = Storage(storage.config.model_copy(update={"num_retries": PATIENT}))
    done: list[str] = []

    def write(key: str) -> None:
        if key.startswith("put"):
            writer.put(key, contents[key])
        else:
            writer.adopt_or_refuse(key, contents[key])  # adopts what a try made whose answer was lost
        done.append(key)

    with ThreadPoolExecutor(4) as pool:
        written = [pool.submit(write, key) for key in contents]
        wait_until(lambda: len(done) >= 10)
        kill_and_restart(gateway)
        assert len(done) < len(contents)
        for future in written:
            future.result()
    assert writer.num_retries_done >= 4
    assert {key: storage.get(key) for key in storage.list("")} == contents


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "little.toml"
    path.write_text(SMALL)
    return path


def run(recipe: Path, root: str, log: Path) -> Command:
    sets = [word for name, value in LITTLE.items() for word in ("--set", f"{name}={value}")]
    return Command("run", str(recipe), "--root", root, *sets, log=log)


@pytest.fixture(scope="module")
def on_disk(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of the same run in a folder."""
    folder = tmp_path_factory.mktemp("on-disk")
    run(recipe, str(folder / "root"), folder / "log").wait()
    return results(Storage(StorageConfig(root=str(folder / "root"))))


def results(storage: Storage) -> dict[str, Any]:
    """Id of the one run, checksums of all chunks, digests of all published weights."""
    (run_id,), (dataset_id,) = reports.list_runs(storage), list_datasets(storage)
    commits = Dataset.open(storage, dataset_id).commits()
    published = checkpoints.list_checkpoints(storage, run_id)
    return {
        "run": run_id,
        "chunks": {shard: commit.chunks for shard, commit in commits.items()},
        "weights": {(record.name, record.step): record.tensors_sha256 for record in published},
    }


@pytest.fixture(scope="module")
def in_bucket(gateway: Gateway, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """The root of the same run in a bucket, whose server is dead for two seconds of the harvest."""
    storage = Storage(StorageConfig(root=f"s3://bucket/{uuid.uuid4().hex}"))
    command = run(recipe, storage.url(), tmp_path_factory.mktemp("in-bucket") / "log")
    wait_until(lambda: num_commits(storage) >= 2)
    assert num_commits(storage) < 8
    kill_and_restart(gateway)
    wait_until(lambda: num_retries(command) > 0)
    assert f"report: {storage.url()}/runs/" in command.wait()
    return storage


def test_a_run_in_a_bucket_whose_server_died_is_bit_for_bit_the_run_in_a_folder(
    in_bucket: Storage, on_disk: dict[str, Any]
) -> None:
    assert len(on_disk["chunks"]) == 8
    assert len(on_disk["weights"]) == 4
    assert results(in_bucket) == on_disk


def test_the_other_commands_find_a_finished_run_in_a_bucket(in_bucket: Storage, recipe: Path, tmp_path: Path) -> None:
    root = in_bucket.url()
    (status,) = json.loads(Command("status", "--root", root, "--json", log=tmp_path / "status").wait())
    assert (status["finished"], status["controller"]) == (True, None)
    assert status["rows_committed"] == status["rows_planned"] == 32_768
    assert set(status["scored_step"].values()) == {60}
    report = json.loads(Command("report", "--root", root, "--json", log=tmp_path / "report").wait())
    assert {sae["name"] for sae in report["saes"]} == {"matryoshka", "random"}
    assert f"run {status['run']} is finished" in run(recipe, root, tmp_path / "again").wait()


def num_commits(storage: Storage) -> int:
    return sum("/commits/" in key for key in storage.list("activations"))


def num_retries(command: Command) -> float:
    """What a living run's metrics say of its workers' requests."""
    (address,) = re.findall(r"http://\S+/metrics", command.log.read_text())
    with urllib.request.urlopen(address, timeout=5) as answer:
        values = re.findall(r"^dollhouse_storage_retries_total{.*} (\S+)$", answer.read().decode(), re.MULTILINE)
    return sum(map(float, values))


def wait_until(happened: Callable[[], bool], timeout_seconds: float = 60.0) -> None:
    give_up = time.monotonic() + timeout_seconds
    while not happened():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def kill_and_restart(gateway: Gateway) -> None:
    gateway.kill_gateway()
    time.sleep(2)
    gateway.start_gateway()
