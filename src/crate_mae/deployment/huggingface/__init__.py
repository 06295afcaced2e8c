"""CRATE-MAE in transformers: `AutoModel.from_pretrained(FOLDER)` and its kin, after `import crate_mae.hf`.

Each file registers its classes with the automatic ones of transformers when it is imported.
"""
