"""Codes on disk: `.looc` files and tables."""

from looc_ldm.codes.looc_file import CodesError as CodesError
from looc_ldm.codes.looc_file import ImageCodes as ImageCodes
from looc_ldm.codes.looc_file import read_codes as read_codes
from looc_ldm.codes.looc_file import write_codes as write_codes
