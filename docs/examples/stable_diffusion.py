"""Erase a concept from a real text-to-image pipeline: fit, compare pictures, keep, export, certify.

python stable_diffusion.py PIPELINE [--erase "van gogh"] [--anchor art] [--preserve picasso monet ...]

PIPELINE is a folder or a name on the hub, such as stable-diffusion-v1-5/stable-diffusion-v1-5.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

import concept_erasure as ce

PROMPTS = ["a painting by {}", "a picture in the style of {}", "{} art", "a portrait by {}"]


def options(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", nargs="?", help="folder or name on the hub")
    parser.add_argument("--erase", default="van gogh")
    parser.add_argument("--anchor", default="art")
    parser.add_argument("--preserve", nargs="*", default=["monet", "picasso", "rembrandt"])
    parser.add_argument("--prompt", default="a starry night in the style of {}")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, help="folder for the pictures, LoRA and eraser")
    args = parser.parse_args(argv)
    if args.pipeline is None:
        parser.print_help()
        raise SystemExit(0)
    return args


def main(argv=None):
    args = options(argv)
    from diffusers import DiffusionPipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(args.pipeline).to(device, dtype)
    pipe.set_progress_bar_config(disable=True)
    out = args.out or Path(tempfile.mkdtemp())
    out.mkdir(parents=True, exist_ok=True)

    def pictures(label):
        """Draw the erased and a preserved concept from the same noise."""
        drawn = {}
        for name in [args.erase, *args.preserve[:1]]:
            generator = torch.Generator().manual_seed(0)
            picture = pipe(
                args.prompt.format(name), num_inference_steps=args.steps, generator=generator
            ).images[0]
            picture.save(out / f"{label}-{name.replace(' ', '_')}.png")
            drawn[name] = np.asarray(picture, dtype=float) / 255
        return drawn

    def moved(new, old):
        """Mean change of a pixel, for each concept."""
        return "  ".join(f"{name} {abs(new[name] - old[name]).mean():.3f}" for name in old)

    before = pictures("before")

    # One solve, no pictures needed. Nothing in the pipeline changes yet.
    eraser = ce.UceEraser.fit(pipe, erase=[args.erase], anchor=args.anchor, preserve=args.preserve)

    # Inside the block the weights are edited; afterwards every bit is back.
    with eraser.apply(pipe):
        erased = pictures("uce")
    print(f"UCE moved the pictures by       {moved(erased, before)}")
    print(f"after undo they differ by       {moved(pictures('undone'), before)}")

    # How far an attacker with the weights stays away, whatever embedding he feeds in.
    print(eraser.certificate)

    # Keep it: a small folder for this library, or a LoRA for anything that loads one.
    eraser.save_pretrained(out / "uce")
    eraser.to_lora(pipe, out / "uce.safetensors")
    with ce.Eraser.from_pretrained(out / "uce").apply(pipe, form="hook"):
        print(f"as a hook, against the weights  {moved(pictures('hook'), erased)}")

    # The exact projection cannot be inverted: its certificate is not zero. Here at the end token of
    # the prompt, which has read all of it; other prompts are kept softly at all positions.
    anchored = ce.AnchoredProjectionEraser.fit(
        pipe,
        erase=[args.prompt.format(args.erase)],
        anchor=args.prompt.format(args.anchor),
        rule="first_eot",
        preserve=[args.prompt.format(name) for name in args.preserve],
        preserve_rule="all_but_sot",
        hard=False,
    )
    print(anchored.certificate)
    with anchored.apply(pipe):
        print(f"anchored projection moved by    {moved(pictures('anchored'), before)}")

    # The same projections as for any vectors, fitted on what the text encoder puts out.
    positive = [prompt.format(args.erase) for prompt in PROMPTS]
    negative = [prompt.format(name) for prompt in PROMPTS for name in [args.anchor, *args.preserve]]
    leace = ce.LeaceEraser.fit(ce.diffusion.text_representations(pipe, positive, negative))
    with leace.apply(pipe, sites="text_encoder"):
        print(f"LEACE moved the pictures by     {moved(pictures('leace'), before)}")
    print(f"pictures are in {out}")


if __name__ == "__main__":
    main()
