"""What the data says about itself: images that should not be there, or not under their label.

    from trainer.audit import examine

`python -m trainer audit` prints and writes what is found. Nothing is ever deleted or moved.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
