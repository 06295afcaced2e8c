"""`crate-mae data`: check images before training on them, and make a copy of them that is faster to read."""

from collections.abc import Iterator
from pathlib import Path

from rich.table import Table
from rich.text import Text

from crate_mae.commands.console import print_bad, print_json, progress
from crate_mae.data.documents import to_csv
from crate_mae.data.files import output_path, refuse_existing, write_whole
from crate_mae.data.numbers import MAX_BAD, MOST_THREADS, check_whole, describe_not_share
from crate_mae.data.results import DataReport
from crate_mae.errors import UserError, and_more
from crate_mae.terminal import open_console

_SHOWN = 10
_LARGEST_SIDE = 65_536
_8_BIT_MODES = ("L", "RGB", "1 x uint8", "3 x uint8")


def check(
    data: str | Path, *, sample: int | None = None, out: Path | str | None = None, json: bool = False
) -> DataReport:
    """Check images before training: counts, sizes, unreadable and duplicate files, mean and std, and a suitable model.

    Args:
        data: A folder of images, a .parquet file, .tar shards, hf:name, torchvision:CIFAR10, digits, ...
        sample: Number of images to read (a fixed pseudo-random sample); by default, all.
        out: New CSV file that lists unreadable images with the reasons, and exact duplicates of earlier images.
        json: Print one JSON object instead of a table; its keys are the attributes of `DataReport`.

    Returns:
        Everything that is printed, and all unreadable and duplicate images.

    Raises:
        UserError: if the data does not exist, or `out` exists already.
    """
    from crate_mae.data import check, open_source

    if out is not None:
        out = output_path("--out", out)
        refuse_existing(out, "give another name with --out")
    console = open_console(stderr=json)
    source = open_source(data)
    total = len(source) if sample is None else min(sample, len(source))
    with progress(console, "Reading images", total) as advance:
        report = check(source, sample, on_image=advance)
    copies = [(copy, f"duplicate of {first}") for first, *others in report.duplicates for copy in others]
    if out is not None:
        write_whole(out, to_csv(["location", "reason"], [*report.bad, *copies]))
    if json:
        print_json(report.to_dict())
        return report
    console.print(_table(report))
    if out is not None:
        console.print_text(f"{len(report.bad):,} unreadable and {len(copies):,} duplicate images are listed in {out}")
    return report


def resize(
    data: str | Path, out: Path | str, *, size: int, workers: int | None = None, max_bad: float = MAX_BAD
) -> Path:
    """Write a copy of a data set with smaller images, so that large files are decoded once and not in every epoch.

    The copy of a folder is a folder with the same sub-folders and names; everything else becomes one parquet file with
    the same labels. Images are reduced as in training, and never enlarged. Those that are small enough are copied as
    they are; of the others, JPEG, WebP, AVIF and HEIC files become JPEG of quality 95, all others PNG.

    Args:
        data: A folder of images, a .parquet file, .tar shards, hf:name, torchvision:CIFAR10, digits, ...
        out: New folder, outside the folder of the images.
        size: Maximum length of the shorter side, in pixels. Random crops should not have to be enlarged: `crate-mae
            pretrain` prints a suitable size if reading takes much of the time.
        workers: Number of processes that read images; by default, one less than the number of cores, at most 8.
        max_bad: Maximum share of unreadable images, which are listed and left out.

    Returns:
        The path of the copy.

    Raises:
        UserError: if the data does not exist, `out` exists already, or too many images cannot be read; nothing is
            written then.
    """
    check_whole("--size", size, 1, _LARGEST_SIDE)
    if workers is not None:
        check_whole("--workers", workers, 0, MOST_THREADS)
    if mistake := describe_not_share("--max-bad", max_bad):
        raise UserError(mistake)
    from crate_mae.data import open_source
    from crate_mae.data.resize import resize_images

    out = output_path("OUT", out)
    source = open_source(data)
    console = open_console()
    with progress(console, "Resizing images", len(source)) as advance:
        bad = resize_images(source, out, size, workers=workers, max_bad=max_bad, on_image=advance)
    print_bad(console, bad)
    console.print_text(f"Saved {len(source) - len(bad):,} images in {out}")
    return out


def _table(report: DataReport) -> Table:
    from crate_mae.data.decode import describe_unread

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    read = "" if report.checked == report.images else f", of which {report.checked:,} were read"
    rows = [
        ("images", f"{report.images:,}{read}"),
        ("classes", "none" if report.classes is None else f"{len(report.classes)}: {_counts(report.classes)}"),
        ("height (pixels)", _spread(report.heights)),
        ("width (pixels)", _spread(report.widths)),
        ("modes", _counts(report.modes)),
        ("formats", _counts(report.formats)),
        *_values(report),
        ("unreadable", _listed(len(report.bad), [f"{bad.location}: {bad.reason}" for bad in report.bad])),
        *([("not read", not_read)] if (not_read := describe_unread(report.left_out, _SHOWN)) else []),
        ("duplicates", _listed(len(report.duplicates), [" = ".join(group) for group in report.duplicates])),
        ("mean", _numbers(report.mean)),
        ("std", _numbers(report.std)),
    ]
    if report.suggested_model is not None:
        rows.append(("suggested model", f"{report.suggested_model} with {report.channels} channel(s)"))
    for name, value in rows:
        table.add_row(name, Text(value, overflow="fold"))
    return table


def _values(report: DataReport) -> Iterator[tuple[str, str]]:
    """A line for each unusual range of values, and for grey images that are stored as colour."""
    for mode, (low, high) in report.ranges.items():
        yield f"values of {mode}", f"{low:g} to {high:g} become 0 to 1"
    for mode, (low, high) in report.values.items():
        bits = 16 if mode.startswith("I;16") else 8 if mode in _8_BIT_MODES else 0
        used = int(high).bit_length() if bits else 0
        if used < bits:
            yield f"values of {mode}", f"{low:,.0f} to {high:,.0f} of {2**bits - 1:,}: {used} of {bits} bits are used"
    if report.grey_colour:
        readable = report.checked - len(report.bad)
        advice = ": --channels 1 is enough" if report.grey_colour == readable else ""
        yield "grey as colour", f"{report.grey_colour:,} of {readable:,} images{advice}"


def _counts(counts: dict[str, int]) -> str:
    return and_more([f"{name} {count:,}" for name, count in counts.items()], _SHOWN)


def _spread(values: tuple[int, ...]) -> str:
    if not values:
        return ""
    smallest, median, largest = values
    return f"{smallest}" if smallest == largest else f"{smallest} to {largest}, median {median}"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _listed(total: int, items: list[str]) -> str:
    more = [f"... and {total - _SHOWN:,} more"] if total > _SHOWN else []
    return "\n".join([f"{total:,}", *items[:_SHOWN], *more])
