"""Parameters around the functions of `theory`: layers, encoder, decoder, autoencoder, weights in and out.

Names are imported when first used, as in `crate_mae` itself.
"""

from crate_mae.lazy import lazy_package

__getattr__, __dir__, __all__ = lazy_package(__name__, __file__)
