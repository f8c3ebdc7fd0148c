"""Train a model that is shipped: ``python -m trainers.pretrain [--model sam_tiny] --data DIR --out DIR``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from trainers.pretrain.export import PROMPTNET, SAM_TINY, export
from trainers.pretrain.loop import Plan
from trainers.pretrain.pool import build_pool
from trainers.pretrain.recipe import Recipe, TinyRecipe
from trainers.pretrain.sampler import Sampler
from trainers.pretrain.samtinyscenes import SceneSampler
from trainers.pretrain.samtinytraining import train_sam_tiny
from trainers.pretrain.training import train


def main(arguments: list[str] | None = None) -> None:
    """Parse, make the pool, train, export ``MODEL.safetensors`` into the output folder."""
    parser = argparse.ArgumentParser(prog="python -m trainers.pretrain", description=__doc__)
    parser.add_argument("--model", choices=("bundled", "sam_tiny"), default="bundled")
    parser.add_argument("--data", type=Path, help="folder of the labelled sets; missing: made images only")
    parser.add_argument("--out", type=Path, required=True, help="pool, checkpoint and weights go here")
    parser.add_argument("--minutes", type=float, help="wall time of the whole training")
    parser.add_argument("--steps", type=int, default=100_000, help="steps of the whole training")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--synthetic", type=int, default=Recipe().synthetic, help="made images in the pool")
    parser.add_argument("--pool", type=Path, help="folder of the pool; default: OUT/pool")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--start", type=Path, help="a weight file to go on from, such as the shipped one")
    parser.add_argument("--rate", type=float, help="peak learning rate; default: the recipe's")
    parser.add_argument("--bfloat16", action="store_true", help="compute the network in bfloat16")
    given = parser.parse_args(arguments)
    if (given.out / "checkpoint.pt").exists() and not given.resume:
        parser.error(f"--out {given.out.name}: holds a checkpoint; add --resume or choose another folder")
    torch.set_num_threads(given.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    changed = {"synthetic": given.synthetic} | ({} if given.rate is None else {"rate": given.rate})
    recipe, tiny = replace(Recipe(), **changed), replace(TinyRecipe(), **changed)
    pool = build_pool(given.pool or given.out / "pool", given.data, recipe, given.seed, given.workers)
    kinds = {kind: len(numbers) for kind, numbers in pool.groups.items()}
    print(f"pool: {kinds}; device {device}", flush=True)
    plan = Plan(
        out=given.out, steps=given.steps, minutes=given.minutes, seed=given.seed, device=device,
        workers=given.workers, start=given.start, bfloat16=given.bfloat16,
    )  # fmt: skip
    if given.model == "sam_tiny":
        weights, losses = train_sam_tiny(SceneSampler(pool, tiny, seed=given.seed), tiny, plan)
        form, numbers = SAM_TINY, tiny.as_dict()
    else:
        sampler = Sampler(pool, recipe, seed=given.seed, size=recipe.batch - recipe.corrected)
        weights, losses = train(sampler, recipe, plan)
        form, numbers = PROMPTNET, recipe.as_dict()
    done = torch.load(given.out / "checkpoint.pt", map_location="cpu", weights_only=True)["step"]
    facts = {"recipe": numbers, "steps": done, "pool": kinds}
    export(weights, given.out / f"{given.model}.safetensors", facts, form)
    print(f"done: {done} steps, {len(losses)} of them now", flush=True)


if __name__ == "__main__":
    main()
