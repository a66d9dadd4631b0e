"""Run ``qandc evaluate``: read options, call :func:`qandc.evaluation.evaluate`, print and save."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qandc.cli.options import Device
from qandc.cli.terminal import check_output, err, out, print_evaluation, stage_bars
from qandc.evaluation.images import MAX_PIXELS
from qandc.support.arguments import Count, Seed, check_value
from qandc.support.files import write_json

__all__ = ["evaluate"]


def evaluate(
    images: Annotated[Path, typer.Argument(help="An .npz (arr_0, uint8, NHWC) or a folder of PNG or JPEG files.")],
    reference: Annotated[
        Path,
        typer.Argument(
            help="The same, or an .npz of statistics, or fashion-mnist: those of its 60,000 training images."
        ),
    ],
    features: Annotated[
        str, typer.Option(help="Network: fashion-classifier, efficientnet-lite0 or inception.")
    ] = "fashion-classifier",
    inception_weights: Annotated[
        Path | None,
        typer.Option(help="pt_inception-2015-12-05-6726825d.pth of pytorch-fid, with --features inception."),
    ] = None,
    allow_unequal: Annotated[
        bool, typer.Option("--allow-unequal", help="Compare different numbers of images all the same.")
    ] = False,
    save_statistics: Annotated[
        Path | None, typer.Option(help="Write the statistics of REFERENCE to this .npz, to be given in its place.")
    ] = None,
    kernel_subsets: Annotated[int, typer.Option(help="Random subsets of 1000 images for the kernel distance.")] = 100,
    seed: Annotated[int, typer.Option(help="Of these subsets.")] = 0,
    max_pixels: Annotated[
        int, typer.Option(help="Height x width that one image of a file may have; raise it for files you trust.")
    ] = MAX_PIXELS,
    device: Device = "auto",
    json_output: Annotated[
        Path | None, typer.Option("--json", help="Also write the numbers to this JSON file.")
    ] = None,
) -> None:
    """Compare images with a reference: Fréchet distances, inception score, precision, recall, kernel distance."""
    from qandc.evaluation.compare import evaluate as run
    from qandc.evaluation.extractors import load_extractor
    from qandc.sampling.pipelines import resolve_device
    from qandc.support.results import result_header

    for path, suffix in ((save_statistics, ".npz"), (json_output, ".json")):
        if path is not None:
            check_output(path, suffix)
    check_value("--kernel-subsets", Count, kernel_subsets)
    check_value("--seed", Seed, seed)
    where = resolve_device(device)
    with err.status("loading the network"):
        extractor = load_extractor(features, where, inception_weights)
    with stage_bars() as show:
        result = run(
            images,
            reference,
            extractor,
            allow_unequal=allow_unequal,
            kernel_subsets=kernel_subsets,
            seed=seed,
            max_pixels=max_pixels,
            progress=show,
        )
    print_evaluation(result)
    if save_statistics is not None:
        result.statistics.save(save_statistics)
        out.print(f"wrote {save_statistics}", soft_wrap=True)
    if json_output is not None:
        settings = {
            "allow_unequal": allow_unequal,
            "kernel_subsets": kernel_subsets,
            "seed": seed,
            "max_pixels": max_pixels,
            "device": str(where),
        }
        write_json(json_output, {**result_header(settings), "rows": [result.record()], "goals": []})
