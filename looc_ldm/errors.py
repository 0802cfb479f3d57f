"""The documented path of `looc_ldm.utils.errors`."""

from looc_ldm.utils.errors import ConfigError as ConfigError
from looc_ldm.utils.errors import DataError as DataError
from looc_ldm.utils.errors import ModelError as ModelError
from looc_ldm.utils.errors import Terminated as Terminated
from looc_ldm.utils.errors import TrainingError as TrainingError
from looc_ldm.utils.errors import UnreadableImage as UnreadableImage
from looc_ldm.utils.errors import UserError as UserError
from looc_ldm.utils.errors import is_first_process as is_first_process
from looc_ldm.utils.errors import one_line as one_line
from looc_ldm.utils.errors import one_line_errors as one_line_errors
from looc_ldm.utils.errors import print_once as print_once
