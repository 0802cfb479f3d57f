"""The documented path of `looc_ldm.codes.images`."""

from looc_ldm.codes.images import decode_image as decode_image
from looc_ldm.codes.images import encode_image as encode_image
