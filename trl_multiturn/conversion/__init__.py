"""Files of rows that other tools wrote, in the form that the trainers and `datasets` read without loss.

The rows themselves are read by `formats`; here are the files, the pairs of episodes, and the report of what was read.
"""

from .convert import convert_rows
from .report import ConversionReport, print_conversion


__all__ = ["ConversionReport", "convert_rows", "print_conversion"]
