"""CRATE-MAE in transformers: `AutoModel.from_pretrained(FOLDER)` and its kin, after `import crate_mae`.

Each file registers with one of transformers' automatic classes when it is imported, which `crate_mae.after_import` does
as soon as transformers has loaded that class, and not before.
"""
