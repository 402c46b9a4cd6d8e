"""The sparse autoencoder itself: parameters, encoder, decoder, threshold. How it is trained is in `trainer.py`.

    pre = (x - b_dec) W_enc^T + b_enc
    acts = pre where pre > max(threshold, 0), else 0
    x_hat = acts W_dec + b_dec

Both weights are stored by latent, [d_latent, d_in], since sparse code reads one latent at a time. The threshold stands
in for BatchTopK outside training (Bussmann et al. 2024), so that a row's code depends on that row alone and any prefix
of the latents is a smaller autoencoder by itself. Used by the trainer, by evaluation and by anyone who loads a
published checkpoint.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workers.sae.codes import SparseCodes
from workers.sae.kernels.products import grouped_sums

PARAMETERS = ("W_enc", "W_dec", "b_enc", "b_dec")
_ENCODE_CELLS = 2**23  # dense cells that encode_sparse holds at a time: 32 MiB of float32


class SparseAutoencoder(nn.Module):
    """d_in -> d_latent -> d_in with one scalar threshold. Built from its tensors; `initialise.py` makes fresh ones."""

    threshold: Tensor

    def __init__(
        self,
        W_enc: Float[Tensor, "d_latent d_in"],
        W_dec: Float[Tensor, "d_latent d_in"],
        b_enc: Float[Tensor, " d_latent"],
        b_dec: Float[Tensor, " d_in"],
        threshold: Float[Tensor, ""],
    ) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(W_enc)
        self.W_dec = nn.Parameter(W_dec)
        self.b_enc = nn.Parameter(b_enc)
        self.b_dec = nn.Parameter(b_dec)
        self.register_buffer("threshold", threshold)

    @property
    def d_in(self) -> int:
        """Width of the model activation."""
        return self.W_enc.shape[1]

    @property
    def d_latent(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[0]

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_latent"]:
        """(x - b_dec) W_enc^T + b_enc."""
        return nn.functional.linear(x - self.b_dec, self.W_enc, self.b_enc)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_latent"]:
        """Inference activations: the pre-activations above the threshold (strictly, and above 0), zero elsewhere."""
        pre = self.pre_activations(x)
        return pre.relu() * (pre > self.threshold)

    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "batch d_in"]) -> SparseCodes:
        """`encode` in sparse form, a few rows at a time, so that memory does not grow with batch * d_latent."""
        chunk_rows = max(1, _ENCODE_CELLS // self.d_latent)
        parts = [SparseCodes.from_dense(self.encode(rows)) for rows in torch.split(x, chunk_rows)]
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + part.batch)
        return SparseCodes(
            rows=torch.cat([part.rows + start for part, start in zip(parts, starts, strict=False)]),
            cols=torch.cat([part.cols for part in parts]),
            values=torch.cat([part.values for part in parts]),
            batch=x.shape[0],
            d_latent=self.d_latent,
        )

    def decode(self, acts: Float[Tensor, "*batch d_latent"], prefix: int | None = None) -> Float[Tensor, "*batch d_in"]:
        """acts W_dec + b_dec, from the first `prefix` latents only if given (0 leaves b_dec)."""
        return acts[..., :prefix] @ self.W_dec[:prefix] + self.b_dec

    @torch.no_grad()
    def decode_sparse(self, codes: SparseCodes, prefix: int | None = None) -> Float[Tensor, "batch d_in"]:
        """`decode` of sparse codes, at a cost of nnz * d_in."""
        codes = codes if prefix is None else codes.within(prefix)
        return grouped_sums(self.W_dec, codes.cols, codes.values, codes.row_offsets) + self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """The reconstruction of x, from all latents."""
        return self.decode(self.encode(x))

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and threshold by name, detached, for a safetensors file; `from_tensors` is the inverse."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "SparseAutoencoder":
        """Build from named tensors. ValueError if one is missing, unknown or of another shape."""
        names = (*PARAMETERS, "threshold")
        if set(tensors) != set(names):
            raise ValueError(f"SAE tensors are {sorted(tensors)}: exactly {', '.join(names)} are needed")
        if tensors["W_enc"].ndim != 2:
            raise ValueError(f"SAE tensor W_enc has shape {list(tensors['W_enc'].shape)}: [d_latent, d_in] is needed")
        d_latent, d_in = tensors["W_enc"].shape
        expected = {"W_dec": (d_latent, d_in), "b_enc": (d_latent,), "b_dec": (d_in,), "threshold": ()}
        for name, shape in expected.items():
            if tensors[name].shape != shape:
                found = list(tensors[name].shape)
                raise ValueError(
                    f"SAE tensor {name} has shape {found}: with W_enc {[d_latent, d_in]} it must be {list(shape)}"
                )
        return cls(**tensors)
