"""The documented path of `looc_ldm.utils.errors`."""

from looc_ldm.utils.errors import UserError as UserError
