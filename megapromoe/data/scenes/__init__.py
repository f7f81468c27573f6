"""Scenes: pictures of coloured digits with captions, an embedded text-to-image task; see docs/text_to_image.md."""
