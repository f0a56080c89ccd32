"""A page about a finished run, `render(facts)`, and one that compares several, `compare(runs)`: self-contained HTML."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
