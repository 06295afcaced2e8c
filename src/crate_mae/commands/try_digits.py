"""`crate-mae try`: pretrain on the digits of scikit-learn."""

from pathlib import Path

from crate_mae.commands.pretrain import Run, pretrain
from crate_mae.commands.reconstruct import reconstruct


def try_digits(*, out: Path | str = Path("crate-mae-try"), epochs: int = 100) -> Run:
    """Pretrain on handwritten digits, complete masked ones, save a picture, and print what to do next.

    The 1,797 digits of 8 x 8 pixels come with scikit-learn. 1,500 are trained on; on the other 297 the model is
    measured, and they are shown in the picture. On two CPU cores this takes less than three minutes.

    Args:
        out: Folder of the run. An existing run is resumed, or displayed again if it has finished.
        epochs: Passes over the training images.

    Returns:
        The run.
    """
    from crate_mae.terminal import open_console
    from crate_mae.training.options import PretrainOptions

    run = pretrain("digits:train", out=out, val="digits:test", recipe="digits", epochs=epochs)
    assert isinstance(run.config, PretrainOptions)
    picture = run.path / "completed_digits.png"
    reconstruct(str(run.path), "digits:test", out=picture, mask_ratio=run.config.mask_ratio, count=12, overwrite=True)
    rows = [row for row in run.metrics() if row["held_out_loss"] is not None]
    first, last = rows[0]["held_out_loss"], rows[-1]["held_out_loss"]
    open_console().print(
        f"\nLoss on digits it never saw: {first:.3f} at the start, {last:.3f} now.\n"
        f"Look at {picture}: each column is one digit, as it is, with half of it hidden, and completed.\n"
        f"Now with your own images:\n"
        f"    crate-mae data check FOLDER\n"
        f"    crate-mae pretrain FOLDER --out runs/mine",
        soft_wrap=True,
        markup=False,
    )
    return run
