"""The way from the published layer to the monotone one, a piece at a time, for `measure.py`.

Nothing of this is in the library, which has the two ends. A `Pieces` says which pieces a layer has; `installed` builds
all layers so while a model is built or loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from crate_mae.models import autoencoder, encoder
from crate_mae.models.layers import ISTA, MSSA, DecoderLayer, Dictionary, EncoderLayer, SubspaceAttention
from crate_mae.models.monotone import (
    BoundedISTA,
    CompressingEncoderLayer,
    Compression,
    Decompression,
    MonotoneEncoderLayer,
    OrthogonalSubspaces,
    rate_from_half,
)
from crate_mae.theory.attention import attention_membership
from crate_mae.theory.compression import balanced_membership, symmetric_membership
from crate_mae.theory.sparse_coding import sparse_codes

MEMBERSHIPS = {
    "softmax": attention_membership,
    "symmetric": symmetric_membership,
    "balanced": balanced_membership,
}


class Pieces(NamedTuple):
    """What a layer is made of.

    Attributes:
        subspaces: U "free", or square and "orthogonal"; the output projection is tied to it either way.
        step: "published", Z + sum_k P_k W_k U_k^T, or "descent", X + sum_k kappa_k (P_k W_k - W_k) U_k^T.
        membership: which P.
        temperature: s = p^-1/2 "fixed", or "learned" for each head.
        shared: whether all layers of a side have one U.
        dictionary: "published" ISTA; its D "bounded"; bounded and started from "relu" of X or from "zero"; "zero two",
            two steps from zero; or "none", relu(X) alone.
        threshold: lambda "fixed", or "learned" for each layer (with "zero" alone).
        encoder_rate: kappa of the encoder, "at least 1/2" or "above 0".
        decoder_rate: kappa of the decoder, "positive" or, as once in the encoder, "below 1".
        sides: whether "both" encoder and decoder are made of these pieces, or one of them alone.
    """

    subspaces: Literal["free", "orthogonal"] = "orthogonal"
    step: Literal["published", "descent"] = "descent"
    membership: Literal["softmax", "symmetric", "balanced"] = "balanced"
    temperature: Literal["fixed", "learned"] = "learned"
    shared: bool = False
    dictionary: Literal["published", "bounded", "relu", "zero", "zero two", "none"] = "zero"
    threshold: Literal["fixed", "learned"] = "fixed"
    encoder_rate: Literal["at least 1/2", "above 0"] = "at least 1/2"
    decoder_rate: Literal["positive", "below 1"] = "positive"
    sides: Literal["both", "encoder", "decoder"] = "both"


class FreeSubspaces(OrthogonalSubspaces):
    """The same parameter, used as it is."""

    def matrix(self) -> Tensor:
        """U^T, of no particular kind."""
        return self.weight

    def retract_(self) -> None:
        """Nothing to keep."""


def _own_copy(_module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: object) -> None:
    state[f"{prefix}weight"] = state[f"{prefix}weight"].clone()


class Step(SubspaceAttention):
    """The attention step of some pieces; `rate_of` makes kappa of its parameter, which starts at `first_rate`."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        pieces: Pieces,
        side: list[OrthogonalSubspaces],
        rate_of: Callable[[Tensor], Tensor] = torch.sigmoid,
        first_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dim, num_heads)
        self.pieces, self.rate_of = pieces, rate_of
        self.subspaces = (OrthogonalSubspaces if pieces.subspaces == "orthogonal" else FreeSubspaces)(embed_dim)
        if pieces.shared and side:
            self.subspaces.weight = side[0].weight
            self.subspaces.register_state_dict_post_hook(_own_copy)  # safetensors does not save a tensor twice
        side.append(self.subspaces)
        start = torch.full((num_heads, 1, 1), -0.5 * math.log(embed_dim / num_heads))
        if pieces.temperature == "learned":
            self.log_scale = nn.Parameter(start)
        else:
            self.register_buffer("log_scale", start, persistent=False)
        if pieces.step == "descent":
            self.rate_parameter = nn.Parameter(torch.full((num_heads, 1, 1), first_rate))

    def forward(self, x: Tensor) -> Tensor:
        """What the encoder adds and the decoder takes away."""
        w = self.project(x)
        return self.step(w, self.membership(w) @ w)

    def bases(self) -> Tensor:
        """U_k."""
        return self.subspaces.matrix().unflatten(0, (self.num_heads, -1)).mT

    def project(self, x: Tensor) -> Tensor:
        """W_k."""
        return self.split(self.subspaces(x))

    def membership(self, w: Tensor) -> Tensor:
        """P_k."""
        # The softmax takes a number for its scale; a scale inside W serves all.
        return MEMBERSHIPS[self.pieces.membership](torch.exp(self.log_scale / 2) * w, 1.0)

    def step(self, w: Tensor, mixed: Tensor) -> Tensor:
        """The step from the tokens' projections W_k, unmixed and mixed."""
        change = mixed if self.pieces.step == "published" else self.rate_of(self.rate_parameter) * (mixed - w)
        return F.linear(self.per_head(change).transpose(1, 2).flatten(2), self.subspaces.matrix().mT)


class Sparsify(BoundedISTA):
    """The sparse coding of some pieces, other than the published one and the library's own."""

    def __init__(self, embed_dim: int, pieces: Pieces, **settings: Any) -> None:
        super().__init__(embed_dim, **settings)
        self.pieces = pieces
        if pieces.threshold == "learned":
            self.log_threshold = nn.Parameter(torch.tensor(math.log(self.threshold)))
        if pieces.dictionary == "none":
            self.dictionary.requires_grad_(False)
        if pieces.dictionary in ("bounded", "relu"):
            ISTA.reset_parameters(self)

    def forward(self, x: Tensor) -> Tensor:
        """Codes of the tokens X."""
        if self.pieces.dictionary == "none":
            return F.relu(x)
        steps = 2 if self.pieces.dictionary == "zero two" else 1
        start = {"bounded": x, "relu": F.relu(x)}.get(self.pieces.dictionary)
        threshold: Any = self.log_threshold.exp() if self.pieces.threshold == "learned" else self.threshold
        return sparse_codes(x, self.lasso_dictionary(), self.step_size, threshold, steps, start=start)


class PiecesEncoderLayer(EncoderLayer):
    """An encoder layer of some pieces."""

    def __init__(
        self, embed_dim: int, num_heads: int, pieces: Pieces, side: list[OrthogonalSubspaces], drop_path: float
    ) -> None:
        nn.Module.__init__(self)
        self.pieces, self.ista_skip = pieces, False
        self.starts_from_norm = pieces.step == "descent"
        self.norm1, self.norm2 = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        rate = rate_from_half if pieces.encoder_rate == "at least 1/2" else torch.sigmoid
        self.attn = Step(embed_dim, num_heads, pieces, side, rate)
        self.drop_path = DropPath(drop_path)
        self.ista = ISTA(embed_dim) if pieces.dictionary == "published" else Sparsify(embed_dim, pieces)


class PiecesDecoderLayer(DecoderLayer):
    """A decoder layer of some pieces."""

    def __init__(self, embed_dim: int, num_heads: int, pieces: Pieces, side: list[OrthogonalSubspaces]) -> None:
        nn.Module.__init__(self)
        self.pieces, self.starts_from_norm = pieces, pieces.step == "descent"
        self.norm1, self.norm2 = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.dictionary = Dictionary(embed_dim)
        rate = (torch.exp, Decompression.FIRST_RATE) if pieces.decoder_rate == "positive" else (torch.sigmoid, 0.0)
        self.attn = Step(embed_dim, num_heads, pieces, side, *rate)


class UnmixedMSSA(MSSA):
    """The published attention with P = I."""

    def forward(self, x: Tensor) -> Tensor:
        """sum_k X U_k W_k^T: a linear map of each token."""
        w = self.project(x)
        return self.step(w, w)


class UnmixedCompression(Compression):
    """The step of compressing and monotone layers with P = I, which is 0."""

    def mix(self, w: Tensor) -> Tensor:
        """W_k."""
        return w


class UnmixedEncoderLayer(EncoderLayer):
    """A published layer without mixing."""

    attention = UnmixedMSSA


class UnmixedCompressingEncoderLayer(CompressingEncoderLayer):
    """A compressing layer without mixing."""

    attention = UnmixedCompression


class UnmixedMonotoneEncoderLayer(MonotoneEncoderLayer):
    """A monotone layer without mixing."""

    attention = UnmixedCompression


@contextmanager
def installed(pieces: Pieces | Literal["unmixed"] | None) -> Iterator[None]:
    """While the block runs, CRATE's layers are built of these pieces; None leaves them as they are.

    "unmixed" leaves all but the encoder's attention, where P = I. The decoder needs attention: without it, a mask token
    sees nothing of its image.
    """
    if pieces is None:
        yield
        return
    if pieces == "unmixed":
        layers = {
            "EncoderLayer": UnmixedEncoderLayer,
            "CompressingEncoderLayer": UnmixedCompressingEncoderLayer,
            "MonotoneEncoderLayer": UnmixedMonotoneEncoderLayer,
        }
        assert set(layers) == {name for name in vars(encoder) if name.endswith("EncoderLayer")}, "a kind was forgotten"
        with mock.patch.multiple(encoder, **layers):
            yield
        return

    def encoder_block(**_settings: Any) -> Any:
        side: list[OrthogonalSubspaces] = []

        def build(*, dim: int, num_heads: int, drop_path: float, **_vit_only: Any) -> nn.Module:
            return PiecesEncoderLayer(dim, num_heads, pieces, side, drop_path)

        return build

    usual_decoder = autoencoder.build_decoder

    def build_decoder(config: Any) -> Any:
        side: list[OrthogonalSubspaces] = []

        def layer(dim: int, num_heads: int, **_settings: Any) -> nn.Module:
            return PiecesDecoderLayer(dim, num_heads, pieces, side)

        with mock.patch.multiple(autoencoder, DecoderLayer=layer, MonotoneDecoderLayer=layer):
            return usual_decoder(config)

    with ExitStack() as patched:
        if pieces.sides != "encoder":
            patched.enter_context(mock.patch.object(autoencoder, "build_decoder", build_decoder))
        if pieces.sides != "decoder":
            patched.enter_context(mock.patch.object(encoder, "crate_block", encoder_block))
        yield
