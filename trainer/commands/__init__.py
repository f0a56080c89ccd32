"""Work with a finished run: look at it, check it, evaluate it, use it, hand it on."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
