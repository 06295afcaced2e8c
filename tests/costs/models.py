"""The smallest preset of every kind of layer: what is counted or estimated of a step has to hold for each."""

EVERY_KIND = (
    "crate_mae_nano_patch2_8",
    "crate_mae_nano_visible_patch2_8",
    "crate_mae_nano_compressing_patch2_8",
    "crate_mae_nano_monotone_patch2_8",
    "vit_mae_nano_patch2_8",
)
