"""Train the denoiser of the emoji world, whole or as a twin that never knew one concept.

A twin is the same network, trained in the same way from random weights without any picture or caption of one object or
style, on fewer pictures than the whole model (`Recipe`'s defaults). Text encoder and autoencoder, the public parts, are
kept. Latents and text embeddings are made once and held in memory, so a step costs only the denoiser. Every step draws
from its own generator: a run that was interrupted goes on with the same pictures.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from concept_erasure.evals.worlds.emoji.grammar import Drawing, draw
from concept_erasure.evals.worlds.emoji.render import COLOURS, STYLES, render
from concept_erasure.evals.worlds.emoji.sprites import Sprites

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["Captions", "Latents", "Recipe", "make_latents", "noise_loss", "train_denoiser"]

_LOG = logging.getLogger(__name__)
_LAST = "training.safetensors"
_RECORD = "training.json"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the weights.

    Attributes:
        cycles: Steps at which cycles end. Each begins with the full rate and ends with a low one, so that the model
            is usable there; a run may be given further cycles later.
        batch_size: Pictures a step.
        rate: Learning rate: a plateau, then a linear fall to a hundredth in every cycle.
        warm_up: Steps of the linear warm-up of the first cycle.
        fall: Share of a cycle in which the rate falls; until then the cycle may be given another length.
        weight_decay: Of AdamW.
        ema: Decay of the running average of the weights, per step.
        blank: Share of captions replaced by the blank prompt, for guidance.
        snr: Cap of the signal-to-noise weights (min-SNR, Hang et al. 2023, arXiv:2303.09556, Eq. 4).
        copies: Rendered pictures for each object, style and ground.
        leave_out: Name of an object or style of which nothing is shown; None trains the whole model.
        seed: Of the weights and everything drawn.
    """

    cycles: tuple[int, ...] = (6400,)
    batch_size: int = 24
    rate: float = 1e-3
    warm_up: int = 100
    fall: float = 0.3
    weight_decay: float = 0.01
    ema: float = 0.998
    blank: float = 0.1
    snr: float = 5.0
    copies: int = 12
    leave_out: str | None = None
    seed: int = 0

    @property
    def steps(self) -> int:
        """All of them."""
        return self.cycles[-1]

    def _cycle(self, step: int) -> tuple[int, int, float]:
        """Return number and end of the cycle of a step, and the step at which its rate begins to fall."""
        number = min(sum(step >= end for end in self.cycles), len(self.cycles) - 1)
        begin, end = (0, *self.cycles)[number], self.cycles[number]
        return number, end, end - self.fall * (end - begin)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        _, end, falls = self._cycle(step)
        left = (end - step) / (end - falls)
        return self.rate * max(0.01, min(1.0, (step + 1) / self.warm_up, left))

    def continues(self, other: Mapping[str, Any], step: int) -> bool:
        """Return whether a run of another recipe, stopped at a step, can go on with this one."""
        ended = [end for end in other["cycles"] if end <= step]
        begun = Recipe(**{**dict(other), "cycles": tuple(other["cycles"])})
        rest = {**asdict(self), "cycles": None} == {**dict(other), "cycles": None}
        if not rest or list(self.cycles[: len(ended)]) != ended:
            return False
        if begun.cycles == self.cycles[: len(begun.cycles)] or len(ended) == len(begun.cycles):
            return True
        return step <= min(begun._cycle(step)[2], self._cycle(step)[2])

    def numbers_left_out(self, sprites: Sprites) -> dict[str, int]:
        """Return what `draw` leaves out.

        Raises:
            ValueError: If the name is neither an object's nor a style's.
        """
        if self.leave_out is None:
            return {}
        names = [one.name for one in sprites.objects]
        if self.leave_out in names:
            return {"leave_out_object": names.index(self.leave_out)}
        if self.leave_out in STYLES:
            return {"leave_out_style": STYLES.index(self.leave_out)}
        raise ValueError(
            f"leave_out must be an object ({', '.join(names[:4])}, ...) or one of {', '.join(STYLES)}; "
            f"got {self.leave_out!r}"
        )


@dataclass(frozen=True, eq=False)
class Latents:
    """Encoded pictures of every object in every style on every ground.

    Attributes:
        mean: Shape ``(objects, styles, grounds, copies, c, h, w)``, scaled as the denoiser sees them.
        deviation: Likewise; a latent is drawn around the mean with it.
    """

    mean: Tensor
    deviation: Tensor

    def sample(self, drawings: list[Drawing], generator: torch.Generator) -> Tensor:
        """Return a latent for each drawing, shape ``(n, c, h, w)``, float32."""
        place = torch.tensor([(d.obj, d.style, d.colour) for d in drawings])
        copy = torch.randint(self.mean.shape[3], (len(drawings),), generator=generator)
        at = (*place.to(self.mean.device).unbind(1), copy.to(self.mean.device))
        noise = torch.randn(len(drawings), *self.mean.shape[4:], generator=generator)
        return self.mean[at].float() + self.deviation[at].float() * noise.to(self.mean.device)


@torch.no_grad()
def make_latents(
    vae: Any,  # noqa: ANN401 - diffusers is optional
    sprites: Sprites,
    recipe: Recipe,
) -> Latents:
    """Render and encode the pictures; what is left out is not rendered and stays zero.

    Args:
        vae: An autoencoder of diffusers.
        sprites: The sheet, on the same device.
        recipe: Gives copies, seed and what to leave out.
    """
    left_out = recipe.numbers_left_out(sprites)
    generator = torch.Generator().manual_seed(recipe.seed)
    shape = (len(sprites.objects), len(STYLES), len(COLOURS), recipe.copies)
    means, deviations = [], []
    for obj in range(shape[0]):
        grid = torch.cartesian_prod(
            torch.arange(shape[1]), torch.arange(shape[2]), torch.arange(shape[3])
        )
        style, colour = grid[:, 0], grid[:, 1]
        pictures = render(sprites, torch.full_like(style, obj), style, colour, generator=generator)
        found = vae.encode(pictures).latent_dist
        shown = (style != left_out.get("leave_out_style", -1)) & (
            obj != left_out.get("leave_out_object", -1)
        )
        scale = (shown * vae.config.scaling_factor).to(found.mean)[:, None, None, None]
        means.append((found.mean * scale).half())
        deviations.append((found.std * scale).half())
    tail = means[0].shape[1:]
    return Latents(
        torch.stack(means).view(*shape, *tail), torch.stack(deviations).view(*shape, *tail)
    )


class Captions:
    """Text embeddings, each computed once.

    Args:
        pipe: A pipeline whose tokenizer and text encoder are used.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self._pipe: Any = pipe
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        """Return the last hidden states, shape ``(n, tokens, d)``, float32."""
        tokenizer, encoder = self._pipe.tokenizer, self._pipe.text_encoder
        if new := [text for text in dict.fromkeys(texts) if text not in self._known]:
            ids = tokenizer(
                new, padding="max_length", truncation=True, max_length=tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids.to(encoder.device)  # fmt: skip
            states = encoder(ids).last_hidden_state.float()
            self._known.update(zip(new, states, strict=True))
        return torch.stack([self._known[text] for text in texts])


def noise_loss(
    denoiser: nn.Module,
    latents: Tensor,
    states: Tensor,
    alphas: Tensor,
    *,
    generator: torch.Generator,
    snr: float,
) -> Tensor:
    """Return the weighted error of the predicted noise, ``mean min(SNR, cap) / SNR |eps - eps_hat|^2``.

    Args:
        denoiser: A U-Net of diffusers that predicts noise.
        latents: Clean latents, shape ``(n, c, h, w)``.
        states: Text embeddings, shape ``(n, tokens, d)``.
        alphas: Cumulative products of the scheduler, shape ``(1000,)``.
        generator: Where time steps and noise come from, on the CPU.
        snr: The cap.
    """
    n = len(latents)
    # One time step from each n-th of the range: all noise levels in every batch.
    spread = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    steps = (spread * len(alphas)).long().clamp_max(len(alphas) - 1).to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    alpha = alphas.to(latents)[steps][:, None, None, None]
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    guess = denoiser(noisy, steps, encoder_hidden_states=states).sample
    ratio = (alpha / (1 - alpha)).flatten()
    loss: Tensor = ratio.clamp_max(snr) / ratio * (guess - noise).square().mean((1, 2, 3))
    return loss.mean()


@dataclass(eq=False)
class _Run:
    """A denoiser in training: weights, their average, moments of AdamW, and the step it is at."""

    model: nn.Module
    average: nn.Module
    optimiser: torch.optim.AdamW
    step: int = 0

    @classmethod
    def start(cls, config: Mapping[str, Any], recipe: Recipe, device: torch.device) -> _Run:
        from diffusers import UNet2DConditionModel

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = UNet2DConditionModel.from_config(config)
        average = UNet2DConditionModel.from_config(config)
        average.load_state_dict(model.state_dict())
        model.to(device).train()
        average.to(device).eval().requires_grad_(False)
        optimiser = torch.optim.AdamW(
            model.parameters(),
            lr=recipe.rate,
            betas=(0.9, 0.99),
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        return cls(model, average, optimiser)

    def save(self, folder: Path, recipe: Recipe) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for name, weight in self.model.named_parameters():
            for moment, value in self.optimiser.state[weight].items():
                tensors[f"{moment}.{name}"] = value
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{_LAST}.part")
        (folder / f"{_LAST}.part").replace(folder / _LAST)
        record = {"step": self.step, "recipe": asdict(recipe)}
        (folder / _RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")

    def resume(self, folder: Path, recipe: Recipe) -> None:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        if not recipe.continues(record["recipe"], int(record["step"])):
            raise ValueError(
                f"{folder} holds a run of another recipe, {record['recipe']}; use another folder"
            )
        held = load_file(folder / _LAST)
        for name, module in (("model", self.model), ("average", self.average)):
            module.load_state_dict({k: held[f"{name}.{k}"] for k in module.state_dict()})
        for name, weight in self.model.named_parameters():
            self.optimiser.state[weight] = {
                moment: held[f"{moment}.{name}"].to(weight.device if moment != "step" else "cpu")
                for moment in ("step", "exp_avg", "exp_avg_sq")
            }
        self.step = int(record["step"])

    def update(self, loss: Tensor, recipe: Recipe) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = recipe.learning_rate(self.step)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        # A young average forgets faster: it would hold the random start otherwise.
        decay = min(recipe.ema, (1 + self.step) / (10 + self.step))
        weights = [w.detach() for w in self.model.parameters()]
        torch._foreach_lerp_(list(self.average.parameters()), weights, 1 - decay)


def train_denoiser(
    pipe: DiffusionPipeline,
    sprites: Sprites,
    recipe: Recipe,
    folder: str | Path,
    *,
    gate: Callable[[nn.Module], bool] | None = None,
    gate_every: int = 500,
    save_every: int = 100,
) -> nn.Module:
    """Train a denoiser from random weights, or go on where a run in the folder stopped.

    Args:
        pipe: Text encoder, tokenizer, autoencoder, scheduler and the denoiser's architecture; not changed.
        sprites: The sheet.
        recipe: How.
        folder: For checkpoints.
        gate: Called with the averaged denoiser; training ends when it says that the model is good enough.
        gate_every: Steps between calls.
        save_every: Steps between checkpoints.

    Returns:
        The averaged denoiser, in evaluation mode.

    Raises:
        ValueError: If the folder holds a run of another recipe, or ``leave_out`` is unknown.
    """
    parts: Any = pipe
    device, folder = parts.device, Path(folder)
    sprites = sprites.to(device)
    run = _Run.start(parts.unet.config, recipe, device)
    if (folder / _RECORD).is_file():
        run.resume(folder, recipe)
    if run.step >= recipe.steps:
        return run.average
    latents, captions = make_latents(parts.vae, sprites, recipe), Captions(pipe)
    alphas, left_out = parts.scheduler.alphas_cumprod, recipe.numbers_left_out(sprites)
    _LOG.info("training from step %d of %d, without %s", run.step, recipe.steps, recipe.leave_out)
    begun, total = time.monotonic(), 0.0
    while run.step < recipe.steps:
        chance = recipe.seed * 1_000_003 + run.step
        generator = torch.Generator().manual_seed(chance)
        drawings = draw(sprites.objects, recipe.batch_size, seed=chance, **left_out)
        blank = torch.rand(recipe.batch_size, generator=generator) < recipe.blank
        states = captions(["" if b else d.caption for b, d in zip(blank, drawings, strict=True)])
        loss = noise_loss(
            run.model,
            latents.sample(drawings, generator),
            states,
            alphas,
            generator=generator,
            snr=recipe.snr,
        )
        run.update(loss, recipe)
        total += float(loss.detach())
        if run.step % save_every == 0 or run.step == recipe.steps:
            mean, total = total / save_every, 0.0
            _LOG.info("step %d, loss %.4f, %.0f s", run.step, mean, time.monotonic() - begun)
            run.save(folder, recipe)
        if gate is not None and run.step % gate_every == 0 and gate(run.average):
            break
    run.save(folder, recipe)
    return run.average
