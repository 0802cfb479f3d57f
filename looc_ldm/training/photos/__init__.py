"""Train both stages in a row, with a report: `looc-ldm train photos` and `looc-ldm quickstart`."""
