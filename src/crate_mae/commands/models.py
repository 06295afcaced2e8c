"""`crate-mae models`: list the names of models."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelRow:
    """One row of the table.

    Attributes:
        name: for `create_model` and every command.
        parameters: trainable parameters, encoder and decoder.
        encoder_parameters: those of the encoder alone.
        image_size: height and width in pixels.
        patch_size: side of a patch in pixels.
        embed_dim: width of the encoder.
        num_heads: heads of the encoder.
        depth: encoder layers.
        decoder_depth: decoder layers.
    """

    name: str
    parameters: int
    encoder_parameters: int
    image_size: tuple[int, int]
    patch_size: int
    embed_dim: int
    num_heads: int
    depth: int
    decoder_depth: int


def models() -> list[ModelRow]:
    """List the names and sizes of models, and the trained models that come with the library.

    Only trainable parameters are counted. Published counts of CRATE-MAE also include fixed position embeddings, and a
    layer of the official code that is never called.

    Returns:
        One row per preset. Presets are not trained.
    """
    import torch
    from rich.table import Table

    from crate_mae.models import create_model, list_models
    from crate_mae.models.presets import list_bundled
    from crate_mae.terminal import open_console

    rows = []
    for name in list_models():
        with torch.device("meta"):
            model = create_model(name)
        c = model.config
        total, encoder = (sum(p.numel() for p in part.parameters()) for part in (model, model.encoder))
        layers = (c.embed_dim, c.num_heads, c.depth, c.decoder_depth)
        rows.append(ModelRow(name, total, encoder, c.image_size, c.patch_size, *layers))

    table = Table("model", "size", "image / patch", "width", "heads", "layers", box=None)
    table.columns[0].no_wrap = True
    table.columns[0].min_width = max(len(row.name) for row in rows)
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    for row in rows:
        table.add_row(
            row.name,
            f"{row.parameters / 1e6:.2f} M",
            f"{row.image_size[0]} x {row.image_size[1]} / {row.patch_size}",
            str(row.embed_dim),
            str(row.num_heads),
            f"{row.depth} + {row.decoder_depth}",
        )
    # In a narrow terminal, or a pipe, lines wrap instead of losing numbers.
    console = open_console(width=max(open_console().width, 100))
    console.print(table)
    console.print(f"Trained, and in the package: {', '.join(list_bundled())}", highlight=False)
    return rows
