"""The documented path of `looc_ldm.commands.main`."""

from looc_ldm.commands.main import main as main

if __name__ == "__main__":
    main()
