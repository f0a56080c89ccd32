from .loaded import Loaded as Loaded
from .loaded import load as load
