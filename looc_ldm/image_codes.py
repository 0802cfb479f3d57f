"""The documented path of `looc_ldm.codes.images`."""

from looc_ldm.codes.images import check_codes as check_codes
from looc_ldm.codes.images import decode_image as decode_image
from looc_ldm.codes.images import decode_pixels as decode_pixels
from looc_ldm.codes.images import encode_image as encode_image
from looc_ldm.codes.images import encode_pixels as encode_pixels
from looc_ldm.codes.images import image_of as image_of
from looc_ldm.codes.images import pixels_of as pixels_of
from looc_ldm.codes.images import read_pixels as read_pixels
from looc_ldm.codes.images import set_tiling as set_tiling
from looc_ldm.codes.images import short_fingerprint as short_fingerprint
