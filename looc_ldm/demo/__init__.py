"""The demo page: `page` builds it with gradio, `codecs` compares codes with JPEG and WebP."""
