"""What the storage floor can be told. Standard library and pydantic only; read by `services.config` and this floor."""

from typing import Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator


class StorageConfig(BaseModel):
    """Where everything lives, and in what pieces."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    root: str = "./dollhouse-data"
    """Any fsspec URL: a folder, s3://bucket/prefix, gs://bucket/prefix, memory://name (one process only)."""
    rows_per_chunk: int = Field(4096, ge=1)
    """Rows of one chunk: one object, one read (4k-8k rows of a bf16 residual stream are tens of megabytes)."""
    chunks_per_shard: int = Field(4, ge=1)
    """Chunks of one shard: the unit of work of a harvester, and of a commit."""
    verify_reads: bool = True
    """Check each chunk against its committed checksum as it is read."""
    num_retries: int = Field(8, ge=0)
    """Tries after the first for a request that failed in a way that may pass."""
    timeout_seconds: float = Field(60.0, gt=0)
    """Longest wait for one request."""

    @model_validator(mode="after")
    def _root_holds_no_secret(self) -> Self:
        if urlsplit(self.root).password is not None:
            raise ValueError("storage.root holds a password: give credentials through the environment, not the URL")
        return self
