"""Commands of `looc-ldm`, a file a subject; `add_parsers` of each says what can be typed."""
