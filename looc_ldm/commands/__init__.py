"""Commands of `looc-ldm`, one file per subject."""
