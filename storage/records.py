"""Frozen records that cross a disk or a process boundary, each with a schema version and the digest of its source.

report -> checkpoint -> manifest -> dataset -> configuration: every number can be traced to its tokens by digest.
Written and read by this floor; `workers` and `services` build and consume them.
"""

import hashlib
import json
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

SCHEMA_VERSION = 1

Json = dict[str, Any]


class Record(BaseModel):
    """Base of every record: immutable, strict about unknown keys, with a canonical JSON form and its digest."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    schema_version: Literal[1] = 1

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, so that equal records are equal bytes."""
        return canonical_json(self.model_dump(mode="json"))

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Parse, or raise a ValueError that names `where` (a URL or key) and the first thing wrong with it."""
        try:
            content = json.loads(data)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON ({error}): it is torn or was not written by dollhouse") from error
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"{where} has schema version {version!r}, this program reads {SCHEMA_VERSION}: update dollhouse"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{where}: {field}: {first['msg']}") from error

    def digest(self) -> str:
        """Hexadecimal SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def canonical_json(content: object) -> bytes:
    """JSON with sorted keys and no spaces, UTF-8; NaN is refused."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()


def digest_of(content: object) -> str:
    """Hexadecimal SHA-256 of `canonical_json(content)`."""
    return hashlib.sha256(canonical_json(content)).hexdigest()


class ModelIdentity(Record):
    """Which language model: enough to tell it from any other."""

    name: str
    """As the user named it."""
    fingerprint: str
    """SHA-256 over the local files, or the hub commit."""
    num_layers: int
    d_model: int
    dtype: str
    """Precision of the forward pass."""
    causal: bool
    """False for an encoder, which predicts no next token."""


class TextIdentity(Record):
    """Which text, in which order."""

    source: str
    fingerprint: str
    """SHA-256 over the names and contents of the documents, or of the hub data set's coordinates."""
    description: str
    """A line for people: source, split, interpreter version, number of documents."""


class DatasetRecord(Record):
    """What a dataset is; written once, create-only, when its tokens are complete."""

    dataset_id: str
    model: ModelIdentity
    text: TextIdentity
    hooks: dict[str, int]
    """Hook name -> width (d_in)."""
    context_tokens: int
    packing: str
    dtype: Literal["bfloat16", "float32"]
    num_rows: int
    """Planned rows; row r is the same token for ever."""
    num_documents: int
    rows_per_chunk: int
    chunks_per_shard: int

    @property
    def rows_per_shard(self) -> int:
        """Rows of every shard but the last."""
        return self.rows_per_chunk * self.chunks_per_shard

    @property
    def num_shards(self) -> int:
        """Shards that make the dataset complete."""
        return -(-self.num_rows // self.rows_per_shard)

    @property
    def num_chunks(self) -> int:
        """Chunks of each array; the last one is padded with zeros."""
        return -(-self.num_rows // self.rows_per_chunk)

    def chunks_of(self, shard: int) -> range:
        """Indices of a shard's chunks."""
        first = shard * self.chunks_per_shard
        return range(first, min(first + self.chunks_per_shard, self.num_chunks))

    def rows_in_chunk(self, chunk: int) -> int:
        """Rows of a chunk, padding aside."""
        return min(self.rows_per_chunk, self.num_rows - chunk * self.rows_per_chunk)

    def rows_in_shard(self, shard: int) -> int:
        """Rows of a shard, padding aside."""
        return min(self.rows_per_shard, self.num_rows - shard * self.rows_per_shard)


class Moments(Record):
    """Mergeable statistics of one hook over the unflagged rows of a shard (float64)."""

    count: int
    mean: list[float]
    """Per dimension."""
    sum_squared_deviations: list[float]
    """Per dimension, about `mean`."""


class ChunkRecord(Record):
    """One object of raw bytes."""

    num_bytes: int
    crc32c: int


class ShardCommit(Record):
    """The only thing that makes a shard's rows visible; create-only."""

    dataset_digest: str
    """Digest of the DatasetRecord."""
    shard: int
    first_row: int
    num_rows: int
    chunks: dict[str, list[ChunkRecord]]
    """Array name -> its chunks in this shard, in order."""
    moments: dict[str, Moments]
    """Hook name -> statistics."""
    num_flagged_rows: int
    """BOS, padding and special rows, which the moments leave out."""
    writer: str
    """host/pid/worker that committed it; for people only."""


class CheckpointRecord(Record):
    """A published SAE: `sae.safetensors` beside it has every scale factor folded in."""

    run_id: str
    name: str
    step: int
    rows_trained: int
    dataset_id: str
    dataset_digest: str
    manifest_digest: str
    """Digest of the commits that the stream could see."""
    hook: str
    model: ModelIdentity
    sae: Json
    """The SAE's configuration."""
    train: Json
    """The training configuration."""
    variant: str
    d_in: int
    d_latent: int
    threshold: float
    """Of the folded SAE, in the units of its latents."""
    scale: float
    """The factor that training multiplied its input by."""
    train_metrics: dict[str, float]
    """Loss, FVU, L0 and dead share of the last training steps, on training batches."""
    tensors_sha256: str = ""
    """SHA-256 of sae.safetensors; `checkpoints.publish` fills it in."""


class MetricsReport(Record):
    """All scores of one checkpoint."""

    run_id: str
    name: str
    step: int
    checkpoint_digest: str
    """Digest of the CheckpointRecord."""
    text: TextIdentity
    """What it was evaluated on."""
    evaluate: Json
    """The evaluation's configuration."""
    metrics: Json
    """Scores by name; see workers/evaluating/evaluate.py for the definition of each."""
    num_tokens: int
    """Unflagged held-out tokens behind the fidelity scores."""
    seconds: float


class RunRecord(Record):
    """A run: its configuration, without secrets, addresses and ports."""

    run_id: str
    recipe: str
    config: Json


class RunDataset(Record):
    """Which dataset a run is trained on; written once, when its harvest has found or made it."""

    run_id: str
    dataset_id: str


class RunSummary(Record):
    """What a finished run says of itself."""

    run_id: str
    dataset_id: str
    seconds: dict[str, float]
    """Stage -> wall seconds of this invocation."""
    steal_share: float
    """Share of processor time that the hypervisor gave to others while it ran."""
    restarts: int
    """Actors that had to be replaced."""
    finished: bool
