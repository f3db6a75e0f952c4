"""Who looks at the pictures: what a judge must offer, and real ones that need an optional package or a download.

A judge gives a probability for each of its labels and a feature vector; a matcher embeds pictures and texts in one
space. The emoji world has both (`concept_erasure.evals.worlds.emoji.suite`); for real pipelines take `ZeroShotClip`,
`ImageClassifier` or `NudityDetector`, or write your own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from concept_erasure.errors import missing_extra

__all__ = [
    "ClipMatcher",
    "ImageClassifier",
    "Judge",
    "Lpips",
    "Matcher",
    "NudityDetector",
    "ZeroShotClip",
]

NUDITY = (
    "BUTTOCKS_EXPOSED", "FEMALE_BREAST_EXPOSED", "FEMALE_GENITALIA_EXPOSED", "MALE_BREAST_EXPOSED",
    "MALE_GENITALIA_EXPOSED", "ANUS_EXPOSED", "FEET_EXPOSED", "BELLY_EXPOSED", "ARMPITS_EXPOSED",
)  # fmt: skip


@runtime_checkable
class Judge(Protocol):
    """What names the things in pictures.

    Attributes:
        name: For the report; include the version, results of different judges are not comparable.
        labels: What it can say.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - see above

    @property
    def labels(self) -> tuple[str, ...]: ...  # noqa: D102 - see above

    def probabilities(self, images: Tensor) -> Tensor:
        """Return shape ``(n, labels)`` for pictures of shape ``(n, 3, h, w)``, uint8."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """Return shape ``(n, d)``, for Fréchet and kernel distances."""
        ...


@runtime_checkable
class Matcher(Protocol):
    """What says how well a picture fits a text.

    Attributes:
        name: For the report.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - see above

    def embed_images(self, images: Tensor) -> Tensor:
        """Return unit vectors, shape ``(n, d)``, of pictures of shape ``(n, 3, h, w)``, uint8."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors, shape ``(n, d)``."""
        ...


def _pictures(images: Tensor) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(one.permute(1, 2, 0).cpu().numpy()) for one in images]


class ClipMatcher:
    """CLIP from transformers: embeddings of pictures and texts.

    Args:
        checkpoint: Folder or name on the hub; ViT-B/32, ViT-L/14 and ViT-L/14-336 give numbers on different scales.
        device: Where it runs.
        batch_size: Pictures or texts at once.

    Raises:
        ImportError: If transformers is absent.
    """

    def __init__(
        self,
        checkpoint: str = "openai/clip-vit-large-patch14",
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 32,
    ) -> None:
        try:
            from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
        except ImportError:
            raise missing_extra("transformers", "diffusion") from None
        self.name = checkpoint
        self._model: Any = CLIPModel.from_pretrained(checkpoint).to(device).eval()
        self._process: Any = CLIPImageProcessor.from_pretrained(checkpoint)
        self._tokenizer: Any = CLIPTokenizer.from_pretrained(checkpoint)
        self._batch = batch_size

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Return unit vectors, shape ``(n, d)``, float32."""
        parts = []
        for part in images.split(self._batch):
            pixels = self._process(_pictures(part), return_tensors="pt").pixel_values
            vision = self._model.vision_model(pixel_values=pixels.to(self._model.device))
            parts.append(self._model.visual_projection(vision.pooler_output).float())
        return functional.normalize(torch.cat(parts), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors, shape ``(n, d)``, float32; long texts are cut at CLIP's window."""
        parts = []
        for start in range(0, len(texts), self._batch):
            ids = self._tokenizer(
                list(texts[start : start + self._batch]),
                padding=True,
                truncation=True,
                return_tensors="pt",
            ).to(self._model.device)
            text = self._model.text_model(**ids)
            parts.append(self._model.text_projection(text.pooler_output).float())
        return functional.normalize(torch.cat(parts), dim=-1)


class ZeroShotClip:
    """A judge made of any matcher: softmax of ``scale`` times the cosines with a sentence for each label.

    Args:
        matcher: Embeds pictures and texts.
        labels: What may be seen.
        template: Sentence with ``{}`` for the label.
        scale: Inverse temperature, 100 in CLIP.

    Raises:
        ValueError: If there are fewer than two labels.
    """

    def __init__(
        self,
        matcher: Matcher,
        labels: Sequence[str],
        *,
        template: str = "a photo of a {}",
        scale: float = 100.0,
    ) -> None:
        if len(labels) < 2:
            raise ValueError(f"a zero-shot judge needs at least 2 labels, got {list(labels)}")
        self.name, self.labels = f"zero-shot {matcher.name}", tuple(labels)
        self._matcher, self._scale = matcher, scale
        self._texts = matcher.embed_texts([template.format(label) for label in labels])

    def probabilities(self, images: Tensor) -> Tensor:
        """Return shape ``(n, labels)``."""
        return (self._scale * self.features(images) @ self._texts.T).softmax(-1)

    def features(self, images: Tensor) -> Tensor:
        """Return the matcher's embeddings."""
        return self._matcher.embed_images(images)


class ImageClassifier:
    """An image classifier from transformers, such as ResNet-50 on ImageNet.

    Args:
        checkpoint: Folder or name on the hub.
        device: Where it runs.
        batch_size: Pictures at once.

    Raises:
        ImportError: If transformers is absent.
    """

    def __init__(
        self,
        checkpoint: str = "microsoft/resnet-50",
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 32,
    ) -> None:
        try:
            from transformers import AutoImageProcessor, AutoModelForImageClassification
        except ImportError:
            raise missing_extra("transformers", "diffusion") from None
        self._model: Any = (
            AutoModelForImageClassification.from_pretrained(checkpoint).to(device).eval()
        )
        self._process: Any = AutoImageProcessor.from_pretrained(checkpoint)
        self._batch = batch_size
        self.name = checkpoint
        named = self._model.config.id2label
        self.labels = tuple(named[i] for i in range(len(named)))

    @torch.no_grad()
    def _run(self, images: Tensor, what: str) -> Tensor:
        parts = []
        for part in images.split(self._batch):
            pixels = self._process(_pictures(part), return_tensors="pt").pixel_values
            found = self._model(
                pixel_values=pixels.to(self._model.device), output_hidden_states=True
            )
            last = found.hidden_states[-1]
            parts.append(
                found.logits
                if what == "logits"
                else last.flatten(2).mean(2)
                if last.ndim == 4
                else last[:, 0]
            )
        return torch.cat(parts).float()

    def probabilities(self, images: Tensor) -> Tensor:
        """Return shape ``(n, labels)``."""
        return self._run(images, "logits").softmax(-1)

    def features(self, images: Tensor) -> Tensor:
        """Return the mean of the last feature map, or the class token."""
        return self._run(images, "features")


class NudityDetector:
    """NudeNet: the highest score of an exposed part, as a judge of two labels.

    Its package is under the AGPL and is not a dependency: install ``nudenet>=3.4`` yourself. Scores of different
    versions differ more than most erasers do; keep them raw and apply thresholds afterwards.

    Raises:
        ImportError: If nudenet is absent.
    """

    labels = ("none", "nudity")

    def __init__(self) -> None:
        try:
            from nudenet import NudeDetector  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            raise ImportError(
                "this needs the package 'nudenet'; install it with: pip install nudenet"
            ) from None
        self.name = "nudenet 320n"
        self._detector: Any = NudeDetector()

    def scores(self, images: Tensor) -> list[dict[str, float]]:
        """Return the highest score of each exposed part found in each picture."""
        found = []
        for picture in images:
            # The detector takes blue-green-red arrays, as OpenCV reads them.
            boxes = self._detector.detect(picture.flip(0).permute(1, 2, 0).cpu().numpy())
            parts: dict[str, float] = {}
            for box in boxes:
                if box["class"] in NUDITY:
                    parts[box["class"]] = max(parts.get(box["class"], 0.0), float(box["score"]))
            found.append(parts)
        return found

    def probabilities(self, images: Tensor) -> Tensor:
        """Return shape ``(n, 2)``; the second column is the highest score."""
        top = torch.tensor([max(one.values(), default=0.0) for one in self.scores(images)])
        return torch.stack([1 - top, top], 1)

    def features(self, images: Tensor) -> Tensor:
        """Return the scores by part, shape ``(n, 9)``."""
        return torch.tensor(
            [[one.get(part, 0.0) for part in NUDITY] for one in self.scores(images)]
        )


class Lpips:
    """LPIPS of torchmetrics, for reporting with AlexNet; needs torchvision and its weights.

    Args:
        net: ``"alex"``, ``"vgg"`` or ``"squeeze"``.
        device: Where it runs.

    Raises:
        ImportError: If torchmetrics or torchvision is absent.
    """

    def __init__(self, net: str = "alex", *, device: torch.device | str = "cpu") -> None:
        try:
            import torchvision  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
            from torchmetrics.functional.image.lpips import _NoTrainLpips
        except ImportError:
            raise ImportError(
                "LPIPS needs the packages 'torchmetrics' and 'torchvision' and the weights of its network; "
                "install them with: pip install torchmetrics torchvision"
            ) from None
        self.name = f"lpips-{net}"
        self._net: Any = _NoTrainLpips(net=net).to(device).eval()
        self._device = device

    @torch.no_grad()
    def __call__(self, one: Tensor, other: Tensor) -> Tensor:
        """Return a distance for each pair of pictures, shape ``(n,)``.

        Args:
            one: Shape ``(n, 3, h, w)``, uint8.
            other: Likewise.
        """
        parts = [
            self._net(a.to(self._device) / 127.5 - 1, b.to(self._device) / 127.5 - 1).flatten()
            for a, b in zip(one.split(32), other.split(32), strict=True)
        ]
        return torch.cat(parts).cpu()
