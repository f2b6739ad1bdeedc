"""Where models live: file formats and checkpoints."""
