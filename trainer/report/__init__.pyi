from .comparison import compare as compare
from .facts import Facts as Facts
from .facts import Finding as Finding
from .facts import Table as Table
from .page import render as render
