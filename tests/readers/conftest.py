"""A tiny reader."""

from reader_helpers import base as base
from reader_helpers import reader_folder as reader_folder
from reader_helpers import reader_run as reader_run
