"""`python -m looc_ldm` is `looc-ldm`."""

from looc_ldm.commands.main import main

if __name__ == "__main__":
    main()
