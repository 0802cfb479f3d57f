"""The documented path of `looc_ldm.commands.main`."""

from looc_ldm.commands.main import main as main
from looc_ldm.commands.main import parse_command as parse_command

if __name__ == "__main__":
    main()
