"""Heads on kept features: closed forms, neighbours, many heads trained at once, calibration. A library of its own.

    from trainer.heads import Course, search_head

Everything but `tuning`, the search of train.py, is a function of tensors, for notebooks and scripts too. The same call
on the same machine returns the same bits.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
