from .checkpoint import newest as newest
from .checkpoint import read as read
from .checkpoint import write as write
from .files import replace as replace
from .state import State as State
