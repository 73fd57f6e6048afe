"""A mask of an image that fits in no memory: time and memory of segmentation in tiles, under a hard limit.

    python benchmarks/large_masks.py --photos path/to/photographs --scratch path/to/a/large/disk --docs docs
    python benchmarks/large_masks.py --side 4096 --run runs/NAME

The picture is made of random crops of photographs and lies in a memory-mapped file. At --whole pixels, where the image
fits whole, logits in tiles are held against those of the whole. Then it is segmented at --side pixels in a process in
which Linux refuses any allocation beyond --limit: RLIMIT_DATA, which counts all private writable memory, but no pages
of files that are mapped shared. Without --run the model is that of the recipe `masks` with fresh weights: times do not
depend on them. Linux only.
"""

import argparse
import re
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _script import exit_status
from gigapixel import Watch, make_picture, photographs

import linsight
from linsight.errors import LinsightError
from linsight.runtime.device import list_devices
from linsight.runtime.files import write_text
from linsight.tasks import task_of
from linsight.train import load_trained, resolve

PAGE = "segment.md"
BLOCK = re.compile(r"(<!-- results: large -->\n).*?(?=<!-- end: large -->)", re.DOTALL)
PLAIN: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def segmenter(options: argparse.Namespace) -> Any:
    """The model, in evaluation mode."""
    if options.run:
        return load_trained(options.run).model.eval()
    torch.manual_seed(0)
    return task_of(resolve("masks"), {"classes": tuple(map(str, range(11)))}).build().eval()


def difference(model: Any, pixels: Any, tile: int) -> float:
    """Of the logits in tiles from those of the whole image, of the largest."""
    mean, std = (torch.tensor(PLAIN[key]).view(3, 1, 1) for key in ("mean", "std"))
    image = (torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255 - mean) / std
    with torch.inference_mode():
        whole = model(image[None])
    parts = linsight.stream(model, pixels, tile=tile, **PLAIN)
    return float((parts - whole).abs().max() / whole.abs().max())


def measured(options: argparse.Namespace, folder: Path) -> str:
    """The result, in Markdown."""
    picture = folder / "picture.npy"
    make_picture(picture, options.side, photographs(options.photos))
    pixels = np.load(picture, mmap_mode="r")
    torch.set_num_threads(options.threads)
    resource.setrlimit(resource.RLIMIT_DATA, (int(options.limit * 1e9), int(options.limit * 1e9)))
    model, whole = segmenter(options), min(options.whole, options.side)
    off = difference(model, pixels[:whole, :whole], options.tile)
    with Watch(folder) as watch:
        begun, spent = time.perf_counter(), time.process_time()
        maps = getattr(torch, options.dtype)
        mask = linsight.stream(
            model, pixels, output="mask", tile=options.tile, scratch=folder / "maps", dtype=maps, **PLAIN
        )
        wall, cpu = time.perf_counter() - begun, time.process_time() - spent
    facts, count = watch.facts(), sum(p.numel() for p in model.parameters())
    where = f"{options.threads} threads of {list_devices()[-1]['name']}"
    return (
        f"{options.side:,} x {options.side:,} pixels by a model of {count / 1e6:.2f} M parameters, tiles of "
        f"{options.tile}, maps in {options.dtype}: {wall / 60:.1f} minutes ({cpu:,.0f} CPU seconds on {where}), "
        f"{facts['anon_mb']:,.0f} MB of memory under a limit of {options.limit:g} GB, {facts['scratch_gb']:.1f} GB of "
        f"files; {len(np.unique(mask[::64, ::64]))} classes in the mask. At {whole:,} pixels a side its logits differ "
        f"from those of the whole image by {off:.1e} of the largest."
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--photos", type=Path, help="a folder of photographs; none: one that comes with matplotlib")
    add("--scratch", type=Path, help="a folder on a large disk; none: the system's")
    add("--run", help="a trained run of the task segment")
    add("--side", type=int, default=16384)
    add("--whole", type=int, default=1000, help="side at which the whole image fits")
    add("--tile", type=int, default=1024)
    add("--dtype", default="bfloat16", help="of the maps")
    add("--limit", type=float, default=8.0, help="of memory, in GB")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--docs", type=Path, help=f"the folder of {PAGE}")
    options = parser.parse_args(arguments)
    if options.docs and not BLOCK.search((options.docs / PAGE).read_text(encoding="utf-8")):
        raise LinsightError(f"'{options.docs / PAGE}' has no place for the result: '<!-- results: large -->'")
    return options


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""

    def work() -> None:
        options = parse(arguments)
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
            text = measured(options, Path(folder)) + "\n"
        print(text)
        if options.docs:
            page = (options.docs / PAGE).read_text(encoding="utf-8")
            write_text(options.docs / PAGE, BLOCK.sub(lambda found: found[1] + text, page))

    return exit_status(__file__, work)


if __name__ == "__main__":
    sys.exit(main())
