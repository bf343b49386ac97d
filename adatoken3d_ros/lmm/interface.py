# SPDX-License-Identifier: Apache-2.0
"""What a 3D large multimodal model is to everything else: pictures in, spatial tokens with places, a prompt, boxes out.

The way of the data, C wide in the vision tower and D wide in the language model:

    rgb (V views) -> encode_images   (V, P, C)  a feature for each patch; `sizes` say which pixel it is
    places (..., 3) -> lift_places   (..., C)   what is averaged beside the features, linear in the mean
    means over voxels                (M, C) each
    -> scene_tokens                  (M, D)     spatial tokens as the language model reads them
    -> splice: [system | M spatial tokens | question with clicks]  (1, S, D)  -> decoder

An architecture is a folder beside this file that makes a `SpatialLMM`; the registry finds it by its config.json.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.prefill import Layout
from adatoken3d_ros.lmm.identity import model_identity, tensor_digest, weights_identity
from adatoken3d_ros.lmm.text_places import located
from adatoken3d_ros.lmm.vision.tower import VisionTower
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.geometry import PatchGeometry
from adatoken3d_ros.scene.patches import PatchConfig, PatchPoints, patch_points


class SpliceError(ValueError):
    """Prompt, spatial tokens and clicks that do not go together, or not into the context."""


@dataclass(frozen=True)
class Placeholder:
    """A place in the prompt for vectors that are not text: all spatial tokens, or the vector of click `index`."""

    kind: Literal["image", "click"]
    index: int = 0


@dataclass(frozen=True)
class PromptIds:
    """A tokenised prompt: runs of token ids, and placeholders between them.

    Attributes:
        points: it does not ask for words: what the last layer makes of its last row tells which box is meant.
    """

    pieces: tuple[tuple[int, ...] | Placeholder, ...]
    points: bool = False

    @property
    def n_clicks(self) -> int:
        return sum(isinstance(piece, Placeholder) and piece.kind == "click" for piece in self.pieces)

    @property
    def n_tokens(self) -> int:
        """Rows that the prompt takes in the language model without the spatial tokens."""
        return self.n_clicks + sum(len(piece) for piece in self.pieces if not isinstance(piece, Placeholder))

    @property
    def n_system(self) -> int:
        """Rows before the scene."""
        at = self.pieces.index(Placeholder("image"))
        return sum(1 if isinstance(piece, Placeholder) else len(piece) for piece in self.pieces[:at])


@dataclass(frozen=True, eq=False)
class Spliced:
    """One input of the language model, [system | spatial tokens | question].

    Attributes:
        embeds: (1, S, D) in the language model's dtype.
        layout: where the spatial tokens are, and their positions.
    """

    embeds: Tensor
    layout: Layout

    @property
    def spatial_start(self) -> int:
        """Row of the first spatial token."""
        return self.layout.spatial_start

    @property
    def n_spatial(self) -> int:
        """Spatial tokens."""
        return self.layout.n_spatial

    @property
    def n_question(self) -> int:
        """Rows after the last spatial token."""
        return self.layout.n_question

    @property
    def n_tokens(self) -> int:
        """S, all rows."""
        return int(self.embeds.shape[1])


@dataclass(frozen=True, eq=False)
class ViewTokens:
    """Which tokens of which views M spatial tokens are, where a model's tokens are those of its views.

    Attributes:
        view: (M,) int64 number of the token's view, rising.
        cell: (M,) int64 its place in the view's grid, row-major.
        grids: rows and columns of each view.
    """

    view: Tensor
    cell: Tensor
    grids: tuple[tuple[int, int], ...]

    @classmethod
    def of_one_view(cls, n: int) -> ViewTokens:
        """n tokens in one line."""
        return cls(torch.zeros(n, dtype=torch.int64), torch.arange(n), ((1, n),))


@dataclass(frozen=True, eq=False)
class SeenViews:
    """What the views of a scene show, for a model that says places in words.

    Attributes:
        xyz: (M, 3) places of the tokens, scene frame, metres. view, cell: (M,) int64, see `ViewTokens`.
        grids: rows and columns of each view's tokens. poses: T_world_camera (4, 4) of each view.
    """

    xyz: NDArray[np.float64]
    view: NDArray[np.int64]
    cell: NDArray[np.int64]
    grids: tuple[tuple[int, int], ...]
    poses: tuple[NDArray[np.float64], ...]


@dataclass(frozen=True)
class ModelSizes:
    """What the scene's memory and the budgets need to know of a model.

    Attributes:
        patches: what preprocessing makes of a picture, and which pixel each patch stands for.
        feature_width: C.
        voxel_size: edge of the voxels in which patches are averaged, metres.
        num_views: views of a scene that the model was trained with.
        max_spatial_tokens: most of them in a prompt.
        context_length: most tokens of prompt and answer together.
        tokens: what a spatial token is: the mean of a voxel over all views, or one of a view's own grid.
        parts: smaller patches of a token whose places are kept beside its own (`PatchPoints.parts`).
    """

    patches: PatchGeometry
    feature_width: int
    voxel_size: float
    num_views: int
    max_spatial_tokens: int
    context_length: int
    tokens: Literal["voxels", "views"] = "voxels"
    parts: int = 0


class SpatialLMM(nn.Module, ABC):
    """A loaded model; a module, so that it can be moved and its weights named.

    Attributes:
        sizes: see there.
        shape_hash: 16 hexadecimal digits that tell models of another shape apart.
        loaded_identity: `identity` of the weights as they lie in the files, set by who loads them.
        quantization: what its linear layers are kept in, `none` or one of `lmm.quantized.formats.KINDS`.
        vision: the tower.
        decoder: the language model, layer by layer, and its first legal gate.
        grounds: whether it can tell which of some boxes a description means (`object_tokens`, `point_at`).
        lifts_boxes: whether it writes boxes of a picture (`lift_boxes`).
        takes_clicks: whether a question may have points of the scene in it (`embed_clicks`).
        writes_clicks: whether it takes them in words (`write_clicks`) and not as vectors.
        tells_poses: whether it can be told where its views are (`tell_poses`).
    """

    takes_clicks: bool = False
    grounds: bool = False
    lifts_boxes: bool = False
    writes_clicks: bool = False
    tells_poses: bool = False
    loaded_identity: str | None = None
    quantization: str = "none"
    shape_hash: str
    sizes: ModelSizes
    vision: VisionTower
    decoder: Decoder

    @property
    def identity(self) -> str:
        """Tells models of other shape or other weights apart; the same for weights that were loaded in another dtype.

        It goes with every saved scene, strategy and latency fit. Without a checkpoint it is computed anew each time:
        such a model may be in training.
        """
        if self.loaded_identity is not None:
            return self.loaded_identity
        # Tied weights count once, by their first name, as they do in files.
        named = {tensor.data_ptr(): (name, tensor) for name, tensor in reversed(self.state_dict().items())}
        weights = weights_identity((name, tensor_digest(tensor)) for name, tensor in named.values())
        return model_identity(self.shape_hash, weights)

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the language model."""
        return self.decoder.dtype

    def encode_images(
        self, rgb: Sequence[NDArray[np.uint8]], *, should_stop: Callable[[], bool] | None = None
    ) -> Tensor:
        """V images (H, W, 3) uint8 -> (V, P, C) float32 features of the patches, row-major, without positions.

        Raises:
            Cancelled: should_stop() was true before one of the tower's layers.
        """
        with self.vision.interruptible(should_stop):
            features: Tensor = self.vision(rgb)
        return features

    def encode_views(
        self, rgb: Sequence[NDArray[np.uint8]], *, should_stop: Callable[[], bool] | None = None
    ) -> list[Tensor]:
        """As `encode_images`, (P, C) of each image; P may differ where a model keeps an image's shape."""
        return list(self.encode_images(rgb, should_stop=should_stop))

    def place_tokens(self, frame: PosedFrame, config: PatchConfig) -> PatchPoints:
        """Where the patches of a view are, those of its `grid`."""
        return patch_points(frame, config)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the patches of a view of that size."""
        return self.sizes.patches.rows, self.sizes.patches.columns

    @abstractmethod
    def lift_places(self, xyz: Tensor) -> Tensor:
        """(..., 3) metres in the model's frame -> (..., H) float32, to be averaged over a voxel's patches."""

    @abstractmethod
    def scene_tokens(self, features: Tensor, places: Tensor) -> Tensor:
        """Means over voxels of features (M, C) and of `lift_places` (M, H) -> spatial tokens (M, D).

        Without columns, places (M, 0) are in the features already. Columns after the first D are what the splice adds
        to the tokens in later layers.
        """

    def merge_patches(self, patches: Tensor) -> Tensor:
        """(M, n, C) what the tower gave the n patches of each of M tokens of views -> (M, C) of `encode_images`.

        For training, which keeps what the tower gave. Raises NotImplementedError where a token is one patch.
        """
        raise NotImplementedError(f"{type(self).__name__} merges no patches")

    def lay_out(self, spatial: Tensor, where: ViewTokens | None) -> tuple[Tensor, Tensor | None]:
        """Spatial tokens (M, D) -> the rows (N, D) that they take in a prompt, and which of these they are (M,) int64;
        None for all."""
        return spatial, None

    def embed_clicks(self, xyz: Tensor) -> Tensor:
        """(n, 3) metres in the model's frame -> (n, D); n may be 0.

        Raises:
            NotImplementedError: for a model that takes no clicks.
        """
        raise NotImplementedError(f"{type(self).__name__} takes no clicks")

    @abstractmethod
    def prompt(self, tokenizer: Any, question: str, *, n_clicks: int = 0, template: str = "") -> PromptIds:
        """Tokenises a question in the model's conversation; an empty template is the model's own.

        Raises:
            PromptError: for a question that cannot be put to the model.
        """

    def description(self, question: str) -> str | None:
        """What a question asks to be pointed at, in words that `ground_prompt` takes; None where it asks for words."""
        return located(question)

    def ground_prompt(self, tokenizer: Any, description: str, *, n_clicks: int = 0) -> PromptIds:
        """Tokenises a question about which box is meant; raises as `prompt`.

        Raises:
            NotImplementedError: for a model that does not `grounds`; so do the next two.
        """
        raise NotImplementedError(f"{type(self).__name__} points at no boxes")

    def object_tokens(self, features: Tensor, parts: Tensor, boxes: Tensor) -> Tensor:
        """What the model knows of each of N boxes: (N, D).

        Args:
            features: (M, C) of the scene's tokens, as encoded.
            parts: (M, K, 3) places of their smaller patches, metres, model's frame; NaN where there is none.
            boxes: (N, 6) centre and size in that frame.
        """
        raise NotImplementedError(f"{type(self).__name__} points at no boxes")

    def point_at(self, state: Tensor, objects: Tensor) -> Tensor:
        """Probabilities (N + 1,) float32 of N objects (N, D), the last that it is none of them.

        Args:
            state: (D,) of the last row of a `ground_prompt` as it leaves the last layer.
        """
        raise NotImplementedError(f"{type(self).__name__} points at no boxes")

    @abstractmethod
    def splice(
        self, prompt: PromptIds, spatial: Tensor, clicks: Tensor | None = None, *, where: ViewTokens | None = None
    ) -> Spliced:
        """Puts spatial tokens (M, D) and click vectors (n, D) into the embedded text; no clicks where none are taken.

        `where` is given to a model whose tokens are those of views.

        Raises:
            SpliceError: for wrong shapes, another number of clicks than the prompt has, or a sequence that is longer
                than the context.
        """

    def tell_poses(self, tokenizer: Any, prompt: PromptIds, poses: Sequence[NDArray[np.float64]]) -> PromptIds:
        """A prompt that says before the views where each was taken from and where it looked, T_world_camera (4, 4) of
        each, scene frame, metres.

        Raises:
            NotImplementedError: for a model that is not told so.
        """
        raise NotImplementedError(f"{type(self).__name__} is not told where its views are")

    def write_clicks(
        self, text: str, clicks: NDArray[np.float64], seen: SeenViews | None, *, coordinates: bool = False
    ) -> str:
        """A question with a mark for each of its points and these (n, 3), scene frame -> the question in words; with
        `coordinates` in metres, too, for a model that was told where its views are.

        Before anything has been seen the words are as many as they will be.

        Raises:
            NotImplementedError: for a model that takes no points in words.
        """
        raise NotImplementedError(f"{type(self).__name__} takes no points in words")

    def lift_boxes(self, text: str, seen: SeenViews) -> list[tuple[float, ...]]:
        """Boxes that an answer gives in its views, in the scene frame: centre and size, metres."""
        return []

    def boxes(self, text: str) -> list[tuple[float, ...]]:
        """Boxes in an answer, in the model's frame: centre and size, metres; none of a model that writes none."""
        return []

    def move_boxes(self, text: str, by: Sequence[float]) -> str:
        """An answer, or the beginning of one, with its boxes moved by (3,) metres.

        What is made of a beginning must begin what is made of the whole, which may hold back a box that is not closed.
        """
        return text
